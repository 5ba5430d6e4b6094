"""A masked language model: hidden tokens are restored from what stands on both sides.

`choose_hidden` and `hide` make the task of any sequence of ids, `MaskedLM` is a
`Labeller` with the head that restores.

Letters: B batch, T length, K ids a token, M most hidden tokens, D width, V words.

Reference: Devlin et al., BERT, arXiv:1810.04805.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.attention import _checks
from attn_jax.models.labeller import IdInput, Labeller

__all__ = ["Hidden", "MaskedLM", "choose_hidden", "hide", "most_hidden"]

DType = jax.typing.DTypeLike


class Hidden(NamedTuple):
    """Which tokens of a sequence are to be restored.

    Attributes:
      where: int32 [M], different positions.
      asked: bool [M], which of them count; the others fill up.
    """

    where: jax.Array
    asked: jax.Array


def most_hidden(length: int, share: float) -> int:
    """M, how many of so many tokens are hidden at most: the share, at least one.

    Raises:
      ValueError: the share is not above 0 and below 1, or there is no token.

    >>> most_hidden(128, 0.15), most_hidden(3, 0.15)
    (19, 1)
    """
    if not 0 < share < 1:
        raise ValueError(f"`share` must be above 0 and below 1, but is {share}.")
    if length < 1:
        raise ValueError(f"`length` must be at least 1, but is {length}.")
    return max(1, round(share * length))


def choose_hidden(
    rng: jax.Array,
    eligible: jax.Array,
    share: float = 0.15,
    *,
    words: jax.Array | None = None,
) -> Hidden:
    """Draws which tokens of one sequence are to be restored; the shape is fixed.

    Of E eligible tokens it is ``share`` · E of them, rounded, at least one. Where
    tokens are pieces of words, ``words`` lets a word be hidden whole or not at all: it
    then is as many whole words as fit, at least one; a word of more than M pieces is
    never hidden.

    Args:
      rng: key; the same key draws the same.
      eligible: bool [T], which may be hidden: not padding, for one.
      share: of the tokens.
      words: int [T], the number in 0 … T − 1 of the word that a token is a piece of;
        None where each is a word.

    Returns:
      `Hidden` of M = `most_hidden(T, share)` positions.

    Raises:
      ValueError: for wrong shapes, or as `most_hidden`.
      TypeError: ``eligible`` is not bool.

    Reference: Devlin et al., arXiv:1810.04805, section 3.1; whole words as in the
    authors' later release.

    >>> found = choose_hidden(jax.random.key(0), jnp.arange(20) < 14)
    >>> found.where.shape, int(found.asked.sum()), bool((found.where[:2] < 14).all())
    ((3,), 2, True)
    """
    _checks.check_bool("eligible", eligible)
    if eligible.ndim != 1:
        raise ValueError(
            f"`eligible` must be [T] of one sequence, but has shape {eligible.shape}."
        )
    (length,) = eligible.shape
    most = most_hidden(length, share)
    drawn, may = jax.random.uniform(rng, (length,)), eligible
    if words is not None:
        if words.shape != eligible.shape:
            raise ValueError(
                f"`words` must be [T] = {list(eligible.shape)}, but has shape "
                f"{words.shape}."
            )
        drawn = drawn[words]  # the pieces of a word are drawn together
        sizes = jnp.zeros(length, jnp.int32).at[words].add(eligible.astype(jnp.int32))
        may = eligible & (sizes[words] <= most)
    drawn = jnp.where(may, drawn, 2.0)
    order = jnp.argsort(drawn)
    drawn = drawn[order]
    # Behind the last piece of each token's word.
    ends = jnp.searchsorted(drawn, drawn, side="right")
    total = eligible.sum().astype(jnp.float32)
    wanted = jnp.round(share * total).astype(ends.dtype)
    wanted = jnp.minimum(jnp.maximum(wanted, ends[0]), most)
    asked = (ends <= wanted) & (jnp.arange(length) < may.sum())
    return Hidden(order[:most].astype(jnp.int32), asked[:most])


def hide(
    rng: jax.Array,
    ids: jax.Array,
    hidden: Hidden,
    mask: jax.Array,
    words: jax.Array,
    *,
    masked: float = 0.8,
    random: float = 0.1,
) -> jax.Array:
    """Hides the tokens that are asked for, each by its own lot.

    A share ``masked`` of them becomes the mask, a share ``random`` another word, and
    the others stay: a model cannot tell which to trust, so it learns of every token.

    Args:
      rng: key; the same key draws the same.
      ids: int [T, K], of one sequence.
      hidden: by `choose_hidden`.
      mask: int [K], the ids of the mask.
      words: int [V, K], the words that another one is drawn of, evenly.
      masked, random: the shares.

    Returns:
      int [T, K].

    Raises:
      ValueError: the shares are not 0 or more, and 1 at most together.

    Reference: Devlin et al., arXiv:1810.04805, section 3.1 and appendix C.2.

    >>> hidden = Hidden(jnp.array([1, 3]), jnp.array([True, False]))
    >>> seen = hide(jax.random.key(0), jnp.arange(4)[:, None], hidden, jnp.array([9]),
    ...             jnp.array([[7]]), masked=1.0, random=0.0)
    >>> seen[:, 0].tolist()
    [0, 9, 2, 3]
    """
    if not (min(masked, random) >= 0 and masked + random <= 1):
        raise ValueError(
            "`masked` and `random` must be 0 or more, and 1 at most together, but are "
            f"{masked} and {random}."
        )
    lot_rng, word_rng = jax.random.split(rng)
    shape = hidden.where.shape
    lot = jax.random.uniform(lot_rng, shape)[:, None]
    other = words[jax.random.randint(word_rng, shape, 0, words.shape[0])]
    own = ids[hidden.where]
    seen = jnp.where(lot < masked + random, other.astype(ids.dtype), own)
    seen = jnp.where(lot < masked, mask.astype(ids.dtype)[None], seen)
    return ids.at[hidden.where].set(jnp.where(hidden.asked[:, None], seen, own))


class MaskedLM(nnx.Module):
    """A labeller's tower with the head that restores hidden tokens.

    Of what the tower says of a hidden token, x: logits = E · norm(gelu(W x + b)) + c,
    with E the first V rows of the tower's own table of words.

    Args:
      tower: `Labeller` of ids whose first one is the word. Its own head, of what
        ``pool="mean"`` makes of the sequence, says whether the second half follows on
        the first, where that is asked for.
      num_words: V; an id behind them may be the mask.

    Raises:
      ValueError: the tower does not read ids, or its first table is too small.

    Reference: Devlin et al., arXiv:1810.04805, section 3.1.

    >>> tower = Labeller((10, 4), 2, body="transformer", dim=8, depth=1, num_heads=2,
    ...                  mlp_dim=16, max_length=6, pool="mean", rngs=nnx.Rngs(0))
    >>> model = MaskedLM(tower, 9, rngs=nnx.Rngs(0))
    >>> ids, where = jnp.zeros((2, 6, 2), jnp.int32), jnp.array([[0, 3], [1, 2]])
    >>> model(ids, jnp.ones((2, 6), bool), where).shape
    (2, 2, 9)
    """

    def __init__(
        self,
        tower: Labeller,
        num_words: int,
        *,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        if not isinstance(tower.input, IdInput):
            raise ValueError("`tower` must read ids, but its inputs are vectors.")
        if not 1 <= num_words <= tower.input.sizes[0]:
            raise ValueError(
                f"`num_words` must be 1 to {tower.input.sizes[0]}, the rows of the "
                f"tower's first table, but is {num_words}."
            )
        dim = tower.input.embed.features
        self.tower, self.num_words, self.dtype = tower, num_words, dtype
        self.transform = nnx.Linear(dim, dim, dtype=dtype, rngs=rngs)
        # Rows of the table are of the order of √D: so logits begin of the order of 1.
        small = nnx.initializers.constant(dim**-0.5)
        self.norm = nnx.LayerNorm(dim, scale_init=small, dtype=dtype, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(num_words))

    def __call__(
        self,
        inputs: jax.Array,
        key_mask: jax.Array,
        where: jax.Array,
        follows: bool = False,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """Says which words are hidden.

        Args:
          inputs: ids [B, T, K], some of them hidden.
          key_mask: bool [B, T], True = a real token.
          where: int [B, M], the positions asked for.
          follows: whether to say too if the second half follows on the first.
          deterministic: whether dropout is off.
          rngs: stream "dropout", where it is on.

        Returns:
          Logits [B, M, V]; with ``follows`` also those of `tower`'s head, [B, 2].

        Raises:
          ValueError: for wrong shapes, or ``follows`` with a tower that does not pool.
        """
        if where.ndim != 2 or where.shape[0] != inputs.shape[0]:
            raise ValueError(
                f"`where` must be [B, M] with B={inputs.shape[0]}, but has shape "
                f"{where.shape}."
            )
        more: Any = dict(deterministic=deterministic, rngs=rngs)
        x = self.tower.features(inputs, key_mask, pool=False, **more)
        asked = jnp.take_along_axis(x, where[:, :, None], axis=1)
        asked = self.norm(jax.nn.gelu(self.transform(asked)))
        assert isinstance(self.tower.input, IdInput)
        table = self.tower.input.embed.embedding[...][: self.num_words]
        bias = self.bias[...]
        if self.dtype is not None:
            table, bias = table.astype(self.dtype), bias.astype(self.dtype)
        logits = jnp.einsum("bmd,vd->bmv", asked, table) + bias[None, None]
        if not follows:
            return logits
        if self.tower.pool is None:
            raise ValueError("`follows` needs a `tower` that pools.")
        return logits, self.tower.head(self.tower.pooled(x, key_mask))
