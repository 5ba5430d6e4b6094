"""A variant to begin with: `attn-jax new mine.py:attend`.

What is written passes `attn-jax check` as it is: everything that a function can honour
is honoured, and the one line that is to be changed, its scores, stands by itself.
"""

from __future__ import annotations

import builtins
import keyword
import pathlib

__all__ = ["create"]

_TEMPLATE = '''"""An attention variant of my own: softmax of what `scores` says.

One head of one example; `attn_jax.multi_head` maps it over heads and batch. T queries,
S keys and values, H size of a query and a key, V size of a value.
"""

import jax
import jax.numpy as jnp


def {name}_init(rng, head_dim):
    """Parameters of one head. Delete it, and `params`, if there is nothing to learn."""
    return {{"log_temperature": jnp.zeros(())}}


def scores(query, key, params):
    """How much query t asks for key s, [T, S]: here is what makes a variant."""
    temperature = jnp.exp(params["log_temperature"]).astype(query.dtype)
    return temperature * query.shape[1] ** -0.5 * (query @ key.T)


def {name}(
    query,  # [T, H]
    key,  # [S, H]
    value,  # [S, V]
    bias=None,  # added to the scores, broadcasts to [T, S]
    mask=None,  # bool, broadcasts to [T, S], True = attend
    *,
    params,  # of one head, by {name}_init
    key_mask=None,  # bool [S], True = a real token and no padding
    is_causal=False,  # whether query t sees only keys s <= t
):
    """Attention of one head, [T, V]. What it cannot honour, leave out of its arguments:
    then whoever asks for it is told so.
    """
    pairs = len(query), len(key)
    allowed = jnp.ones(pairs, bool) if mask is None else jnp.broadcast_to(mask, pairs)
    if key_mask is not None:
        allowed = allowed & key_mask[None, :]
    if is_causal:
        allowed = allowed & jnp.tri(*pairs, dtype=bool)
    # What no query sees may hold anything, NaN too, which a weight of zero would keep.
    seen = allowed.any(axis=0)[:, None]
    key, value = jnp.where(seen, key, 0), jnp.where(seen, value, 0)

    # Scores and softmax in float32 or wider, whatever the inputs are.
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = scores(query.astype(wide), key.astype(wide), params)
    if bias is not None:
        logits = logits + bias.astype(wide)
    logits = jnp.where(allowed, logits, -1e30)
    # A query that sees nothing gives zeros.
    weights = jnp.where(allowed, jax.nn.softmax(logits, axis=1), 0)
    return weights.astype(value.dtype) @ value
'''


def create(spec: str) -> str:
    """Writes a file with a variant that can be changed.

    Args:
      spec: ``path/file.py:function``; neither the file nor such a function is there.

    Returns:
      What was written, and the commands to go on with.

    Raises:
      ValueError: if it is no such name, the file is there, or cannot be written.

    >>> create("mine:attend")
    Traceback (most recent call last):
      ...
    ValueError: a new variant must be named path/file.py:function, got 'mine:attend'.
    """
    place, _, name = spec.rpartition(":")
    proper = name.isidentifier() and not keyword.iskeyword(name)
    if not place.endswith(".py") or not proper:
        raise ValueError(
            f"a new variant must be named path/file.py:function, got {spec!r}."
        )
    if name in ("scores", "jax", "jnp") or hasattr(builtins, name):
        raise ValueError(
            f"a new variant must have a name of its own, but what is written uses "
            f"{name!r} for something else."
        )
    path = pathlib.Path(place).expanduser()
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(_TEMPLATE.format(name=name))
    except FileExistsError:
        raise ValueError(
            f"{place} is there already and is left as it is: name another file."
        ) from None
    except OSError as error:
        raise ValueError(f"cannot write {place}: {error.strerror}.") from None
    return f"""Wrote {place}: softmax of dot products, until you change `scores`. Next:

  attn-jax check {spec}
  attn-jax compare dot_product {spec} --lengths 256,1024
  python -m experiments.data_scaling --attention {spec}"""
