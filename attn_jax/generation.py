"""Generation: a sequence model as a recurrent network, one token after the other.

A causal model that is written as a pure step, ``(params, state, token) -> (state,
output)``, generates with the cost of one token a token. What the state is, is the
model's own: keys and values, a matrix of constant size, the carry of an LSTM.

`generate` consumes a prompt and goes on from there, in one compiled program.
`generate_uncached` gives the same tokens by a whole forward pass for each of them: the
reference, and what generation costs without a state.

Letters: B batch, P tokens of a prompt, L longest sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attn_jax.attention import _checks
from attn_jax.attention._scores import score_dtype

__all__ = ["generate", "generate_uncached", "sample_symbols"]

Step = Callable[[Any, Any, jax.Array], tuple[Any, Any]]
Init = Callable[[int, int], Any]
Sample = Callable[[jax.Array, Any], jax.Array]


# ----------------------------------------------------------------- generation


def sample_symbols(
    rng: jax.Array, logits: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """Draws a symbol from softmax(logits / temperature), or takes the likeliest.

    Args:
      rng: a JAX random key; not read where `temperature` is 0.
      logits: [B, number of symbols].
      temperature: 1 samples from the model, 0 is greedy: the likeliest symbol.

    Returns:
      int32 [B]; −1, which is no symbol, where `logits` hold NaN.

    Raises:
      ValueError: if the temperature is negative.

    >>> sample_symbols(jax.random.key(0), jnp.array([[0.0, 9.0]]), temperature=0.0)
    Array([1], dtype=int32)
    """
    if temperature < 0:
        raise ValueError(f"`temperature` must be 0 or more, but is {temperature}.")
    logits = logits.astype(score_dtype(logits.dtype))
    if temperature == 0:
        drawn = jnp.argmax(logits, axis=-1)
    else:
        drawn = jax.random.categorical(rng, logits / temperature, axis=-1)
    return jnp.where(jnp.isnan(logits).any(axis=-1), -1, drawn.astype(jnp.int32))


def generate(
    params: Any,
    prompt: jax.Array,
    steps: int,
    rng: jax.Array,
    *,
    step: Step,
    init: Init,
    sample: Sample = sample_symbols,
) -> jax.Array:
    """Continues a prompt token by token: x_t ~ sample(output of the tokens before t).

    One compiled program: a scan over the prompt that keeps nothing but the state, and
    a scan over the new tokens. Beside the tokens it returns it needs the memory of one
    state and one step, so for linear attention and recurrent networks memory does not
    grow with the length. Token k is drawn with ``jax.random.fold_in(rng, k)``.

    `step`, `init` and `sample` are told apart by identity: pass the same objects again
    and the program is not compiled anew.

    Args:
      params: what `step` takes, any pytree.
      prompt: [B, P, ...] with P ≥ 1: the tokens to begin with, such as a start symbol.
        Integers of any width become int32.
      steps: number of new tokens, at least 1.
      rng: a JAX random key.
      step: pure, ``(params, state, token [B, ...]) -> (state, output)``; the output
        says what the next token is.
      init: ``(B, L) -> state``, before any token, with room for L of them. Where
        `step` returns its arrays in another dtype, they begin in that one.
      sample: ``(rng, output) -> token [B, ...]``, integers of any width where the
        prompt is of integers, else in its dtype.

    Returns:
      The new tokens [B, steps, ...].

    Raises:
      ValueError: if there is no prompt, or `steps` is below 1.
      TypeError: if `steps` is no int, or what is sampled is no token as in the prompt.

    Reference: Katharopoulos et al., 2020, arXiv:2006.16236, section 3.4.

    >>> def step(params, state, token):  # counts up, whatever came before
    ...     return state, jax.nn.one_hot(token + 1, 9)
    >>> generate(None, jnp.array([[2]]), 4, jax.random.key(0), step=step,
    ...          init=lambda batch, length: None,
    ...          sample=lambda rng, logits: jnp.argmax(logits, -1))
    Array([[3, 4, 5, 6]], dtype=int32)
    """
    prompt, steps = _check(prompt, steps)
    return _generate(
        params, prompt, rng, steps=steps, step=step, init=init, draw=sample
    )


def generate_uncached(
    params: Any,
    prompt: jax.Array,
    steps: int,
    rng: jax.Array,
    *,
    apply: Callable[[Any, jax.Array], Any],
    sample: Sample = sample_symbols,
) -> jax.Array:
    """`generate` without a state: a forward pass over all L tokens for each new one.

    The reference that `generate` is equal to, token by token, for the same `rng`.

    Args:
      params: what `apply` takes, any pytree.
      prompt: [B, P, ...] with P ≥ 1.
      steps: number of new tokens, at least 1.
      rng: a JAX random key.
      apply: pure and causal, ``(params, tokens [B, L, ...]) -> outputs [B, L, ...]``,
        where output t is of the tokens up to t.
      sample: as for `generate`.

    Returns:
      The new tokens [B, steps, ...].

    Raises:
      ValueError: if there is no prompt, or `steps` is below 1.
      TypeError: if `steps` is no int, or what is sampled is no token as in the prompt.

    >>> generate_uncached(None, jnp.array([[2]]), 4, jax.random.key(0),
    ...                   apply=lambda params, tokens: tokens + 1,
    ...                   sample=lambda rng, following: following)
    Array([[3, 4, 5, 6]], dtype=int32)
    """
    prompt, steps = _check(prompt, steps)
    return _generate_uncached(
        params, prompt, rng, steps=steps, apply=apply, draw=sample
    )


def _check(prompt: jax.Array, steps: int) -> tuple[jax.Array, int]:
    """The prompt, integers as int32, and the number of steps."""
    if prompt.ndim < 2 or prompt.shape[1] < 1:
        raise ValueError(
            "`prompt` must be [B, P, ...] with at least one token, such as a start "
            f"symbol, but has shape {tuple(prompt.shape)}."
        )
    if jnp.issubdtype(prompt.dtype, jnp.integer):
        prompt = _checks.as_int32("prompt", prompt)
    return prompt, _checks.check_int("steps", steps, 1)


def _drawn(sample: Sample, rng: jax.Array, output: Any, token: jax.Array) -> jax.Array:
    """The next token; what it must look like is told by the one before."""
    new = sample(rng, output)
    if jnp.issubdtype(new.dtype, jnp.integer) and token.dtype == jnp.int32:
        new = _checks.as_int32("sample", new)
    if new.shape != token.shape or new.dtype != token.dtype:
        raise TypeError(
            f"`sample` must return tokens {token.dtype} {tuple(token.shape)} as in "
            f"`prompt`, but returned {new.dtype} {tuple(new.shape)}."
        )
    drawn: jax.Array = _checks.varying(new, token)
    return drawn


def _as_returned(step: Step, params: Any, state: Any, token: jax.Array) -> Any:
    """A first state in the dtypes that it will have after a step."""
    after = jax.eval_shape(step, params, state, token)[0]

    def cast(leaf: Any, then: jax.ShapeDtypeStruct) -> Any:
        same = jnp.result_type(leaf) == then.dtype
        return leaf if same else jnp.asarray(leaf).astype(then.dtype)

    try:
        return jax.tree.map(cast, state, after)
    except ValueError:  # of another structure, which the scan says better
        return state


@functools.partial(jax.jit, static_argnames=("steps", "step", "init", "draw"))
def _generate(
    params: Any,
    prompt: jax.Array,
    rng: jax.Array,
    *,
    steps: int,
    step: Step,
    init: Init,
    draw: Sample,
) -> jax.Array:
    batch, given = prompt.shape[:2]
    state = init(batch, given + steps - 1)

    # A carry keeps its type, so each leaf varies from the start over all the mesh axes
    # that any of these does, and still does after a step that does not touch it.
    given_arrays = (params, prompt, rng)
    token = _checks.varying(prompt[:, -1], given_arrays)

    def advance(state: Any, token: jax.Array) -> tuple[Any, Any]:
        state, output = step(params, state, token)
        return _checks.varying(state, given_arrays), output

    def consume(state: Any, token: jax.Array) -> tuple[Any, None]:
        return advance(state, token)[0], None

    state = _checks.varying(state, given_arrays)
    state = _as_returned(step, params, state, token)
    state, _ = jax.lax.scan(consume, state, jnp.moveaxis(prompt[:, :-1], 1, 0))

    def extend(
        carry: tuple[Any, jax.Array], index: jax.Array
    ) -> tuple[tuple[Any, jax.Array], jax.Array]:
        state, token = carry
        state, output = advance(state, token)
        token = _drawn(draw, jax.random.fold_in(rng, index), output, token)
        return (state, token), token

    steps_to_come = jnp.arange(steps, dtype=jnp.int32)
    _, tokens = jax.lax.scan(extend, (state, token), steps_to_come)
    return jnp.moveaxis(tokens, 0, 1)


@functools.partial(jax.jit, static_argnames=("steps", "apply", "draw"))
def _generate_uncached(
    params: Any,
    prompt: jax.Array,
    rng: jax.Array,
    *,
    steps: int,
    apply: Callable[[Any, jax.Array], Any],
    draw: Sample,
) -> jax.Array:
    given = prompt.shape[1]
    # What is not known yet is zeros; no output before it depends on them.
    room = [(0, 0), (0, steps - 1)] + [(0, 0)] * (prompt.ndim - 2)
    tokens = jnp.pad(prompt, room)

    def extend(
        carry: tuple[jax.Array, jax.Array], index: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        tokens, token = carry
        last = given - 1 + index
        output = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, last, 1, keepdims=False),
            apply(params, tokens),
        )
        token = _drawn(draw, jax.random.fold_in(rng, index), output, token)
        zero = jnp.zeros((), last.dtype)
        where = (zero, last + 1, *(zero,) * (tokens.ndim - 2))
        # The very last token has no place; nobody reads it.
        kept = jax.lax.dynamic_update_slice(tokens, token[:, None], where)
        tokens = jnp.where(index < steps - 1, kept, tokens)
        return (tokens, token), token

    start = _checks.varying((tokens, prompt[:, -1]), params, prompt, rng)
    _, found = jax.lax.scan(extend, start, jnp.arange(steps, dtype=jnp.int32))
    return jnp.moveaxis(found, 0, 1)
