"""Generation: a sequence model as a recurrent network, one token after the other.

A causal model that is written as a pure step, ``(params, state, token) -> (state,
output)``, generates with the cost of one token a token. What the state is, is the
model's own: keys and values, a matrix of constant size, the carry of an LSTM.

`generate` consumes a prompt and goes on from there, in one compiled program.
`generate_uncached` gives the same tokens by a whole forward pass for each of them: the
reference, and what generation costs without a state. `beam_search` looks for the
likeliest sequence by the same step.

Letters: B batch, P tokens of a prompt, L longest sequence, K beams.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn_jax.attention import _checks
from attn_jax.attention._scores import score_dtype

__all__ = ["Beams", "beam_search", "generate", "generate_uncached", "sample_symbols"]

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


# ---------------------------------------------------------------- beam search


class Beams(NamedTuple):
    """What `beam_search` found, the best first.

    Attributes:
      tokens: int32 [B, K, steps], the end symbol behind its first one as well; −1
        where an output did not say what comes next (NaN, +∞, or nothing but −∞), or
        where there are fewer than K sequences.
      log_probs: [B, K], sum of the tokens' log-probabilities, that of the end symbol
        included; −∞ where there is no sequence, NaN where an output said nothing.
      scores: [B, K], what they are ordered by: log_probs / length penalty.
      lengths: int32 [B, K], tokens up to the end symbol, that one included.
      finished: bool [B, K], whether it came to the end symbol; what did not, in
        `steps` tokens, stands behind all that did.
    """

    tokens: jax.Array
    log_probs: jax.Array
    scores: jax.Array
    lengths: jax.Array
    finished: jax.Array


def beam_search(
    params: Any,
    prompt: jax.Array,
    steps: int,
    *,
    step: Step,
    init: Init,
    end: int,
    num_beams: int = 4,
    length_penalty: float = 0.0,
) -> Beams:
    """Searches the likeliest sequences: of each length, the K best go on.

    score(y) = log p(y) / ((5 + |y|) / 6)^α, where |y| counts the end symbol

    Of all one-token extensions of the K sequences that go on, those among the K best
    that take the end symbol are finished, and the K best of the others go on. An
    example is done with K finished sequences, whatever the others of its batch do.
    With one beam that is the greedy sequence; with as many as there are sequences, the
    search is exhaustive.

    One compiled program that ends when all examples are done. `step` is called with
    the tokens of all beams as one batch [B · K]; the state's axes that belong to it
    are those whose size `init` makes of the batch.

    Args:
      params: what `step` takes, any pytree; beams share it.
      prompt: integers [B, P] with P ≥ 1, such as a start symbol.
      steps: most new tokens, at least 1.
      step: pure, ``(params, state, token [B]) -> (state, logits [B, symbols])``.
      init: ``(B, L) -> state``, before any token, with room for L of them.
      end: the symbol that ends a sequence.
      num_beams: K.
      length_penalty: α ≥ 0; 0 compares log-probabilities, and more favours length.

    Returns:
      `Beams`, the best first.

    Raises:
      ValueError: for a prompt of another shape, a number out of its range, an end that
        is no symbol, or logits of another shape.
      TypeError: for a prompt that is not of integers.

    Reference: Wu et al., 2016, arXiv:1609.08144, section 7, whose length penalty it
    is, without the coverage penalty.

    >>> log_p = jnp.log(jnp.array([[0.0, 0.6, 0.4], [0.5, 0.3, 0.2], [1.0, 0.0, 0.0]]))
    >>> found = beam_search(log_p, jnp.array([[0]]), 3, end=0, num_beams=2,
    ...                     step=lambda log_p, state, token: (state, log_p[token]),
    ...                     init=lambda batch, length: None)
    >>> found.tokens[0].tolist(), [f"{p:.2f}" for p in jnp.exp(found.log_probs[0])]
    ([[2, 0, 0], [1, 0, 0]], ['0.40', '0.30'])
    """
    prompt, steps = _check(_checks.as_int32("prompt", prompt), steps)
    if prompt.ndim != 2:
        raise ValueError(f"`prompt` must be [B, P], but has shape {prompt.shape}.")
    num_beams = _checks.check_int("num_beams", num_beams, 1)
    end = _checks.check_int("end", end, 0)
    if not 0 <= length_penalty < math.inf:
        raise ValueError(
            f"`length_penalty` must be 0 or more and finite, but is {length_penalty}."
        )
    return _beam_search(
        params,
        prompt,
        jnp.float32(length_penalty),
        steps=steps,
        num_beams=num_beams,
        end=end,
        step=step,
        init=init,
    )


def _batch_axes(init: Init, batch: int, length: int) -> Any:
    """Of each leaf of a state, the axis that is the batch's; −1 where none is."""
    one, other = (
        jax.eval_shape(lambda b=b: init(b, length)) for b in (batch, batch + 1)
    )

    def axis(x: jax.ShapeDtypeStruct, y: jax.ShapeDtypeStruct) -> int:
        grown = [
            i for i, (m, n) in enumerate(zip(x.shape, y.shape, strict=True)) if m != n
        ]
        if len(grown) > 1 or any(x.shape[i] != batch for i in grown):
            raise ValueError(
                "`init` must make states of which each leaf has one axis of the batch "
                f"or none, but for a batch of {batch} made one of shape {x.shape}."
            )
        return grown[0] if grown else -1

    return jax.tree.map(axis, one, other)


class _Search(NamedTuple):
    """Between two tokens: sequences that go on [B, K, ...], and finished ones."""

    written: jax.Array  # int32 [], tokens so far
    state: Any
    last: jax.Array  # int32 [B, K], the token to go on from
    tokens: jax.Array  # int32 [B, K, steps]
    log_probs: jax.Array  # [B, K]; −∞ is no sequence
    ended: jax.Array  # int32 [B, K, steps]
    ended_log_probs: jax.Array  # [B, K]
    ended_scores: jax.Array  # [B, K]
    ended_lengths: jax.Array  # int32 [B, K]
    failed: jax.Array  # bool [B], an output did not say what comes next


@functools.partial(
    jax.jit, static_argnames=("steps", "num_beams", "end", "step", "init")
)
def _beam_search(
    params: Any,
    prompt: jax.Array,
    length_penalty: jax.Array,
    *,
    steps: int,
    num_beams: int,
    end: int,
    step: Step,
    init: Init,
) -> Beams:
    batch, given = prompt.shape
    length = given + steps - 1
    axes = _batch_axes(init, batch, length)
    given_arrays = (params, prompt, length_penalty)

    def advance(state: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        state, logits = step(params, state, token)
        if logits.ndim != 2 or logits.shape[0] != token.shape[0]:
            raise ValueError(
                f"`step` must return logits [B, symbols] with B={token.shape[0]}, but "
                f"returned shape {tuple(logits.shape)}."
            )
        if end >= logits.shape[1]:
            raise ValueError(
                f"`end` must be one of {logits.shape[1]} symbols, but is {end}."
            )
        return _checks.varying(state, given_arrays), logits

    def each_beam(leaf: jax.Array, axis: int) -> jax.Array:
        return leaf if axis < 0 else jnp.repeat(leaf, num_beams, axis=axis)

    def of_beams(leaf: jax.Array, axis: int, rows: jax.Array) -> jax.Array:
        return leaf if axis < 0 else jnp.take(leaf, rows, axis=axis)

    # The prompt is read once for all beams.
    state = _checks.varying(init(batch, length), given_arrays)
    state = _as_returned(step, params, state, prompt[:, -1])
    state, _ = jax.lax.scan(
        lambda state, token: (advance(state, token)[0], None),
        state,
        jnp.moveaxis(prompt[:, :-1], 1, 0),
    )
    logits_dtype = jax.eval_shape(step, params, state, prompt[:, -1])[1].dtype
    state = jax.tree.map(each_beam, state, axes)

    dtype = score_dtype(logits_dtype)
    none = jnp.full((batch, num_beams), -jnp.inf, dtype)
    unwritten = jnp.full((batch, num_beams, steps), end, jnp.int32)
    start = _Search(
        written=jnp.zeros((), jnp.int32),
        state=state,
        last=jnp.repeat(prompt[:, -1:], num_beams, axis=1),
        tokens=unwritten,
        log_probs=none.at[:, 0].set(0.0),  # all beams are one as yet
        ended=unwritten,
        ended_log_probs=none,
        ended_scores=none,
        ended_lengths=jnp.zeros((batch, num_beams), jnp.int32),
        failed=jnp.zeros(batch, bool),
    )
    start = _checks.varying(start, given_arrays)

    def done(now: _Search) -> jax.Array:
        nothing_left = (now.log_probs == -jnp.inf).all(axis=1)
        return now.failed | nothing_left | (now.ended_log_probs > -jnp.inf).all(axis=1)

    def goes_on(now: _Search) -> jax.Array:
        return (now.written < steps) & ~done(now).all()

    def rows(array: jax.Array, chosen: jax.Array) -> jax.Array:
        """Rows [B, n, ...] of [B, m, ...] by numbers [B, n]."""
        index = chosen.reshape(*chosen.shape, *(1,) * (array.ndim - 2))
        return jnp.take_along_axis(array, index, axis=1)

    def penalty(count: jax.Array) -> jax.Array:
        return ((5.0 + count.astype(dtype)) / 6.0) ** length_penalty.astype(dtype)

    def extend(now: _Search) -> _Search:
        state, logits = advance(now.state, now.last.reshape(-1))
        logits = logits.astype(score_dtype(logits.dtype)).reshape(batch, num_beams, -1)
        symbols = logits.shape[-1]
        alive = now.log_probs > -jnp.inf
        # NaN, +∞, and a row of −∞ alone do not say what comes next.
        unsaid = ~jnp.isfinite(jax.nn.logsumexp(logits, axis=-1))
        failed = now.failed | ((unsaid & alive).any(axis=1) & ~done(now))
        steps_log_p = jnp.where(
            (alive & ~unsaid)[:, :, None], jax.nn.log_softmax(logits), -jnp.inf
        )
        every = (now.log_probs[:, :, None] + steps_log_p).reshape(batch, -1)
        # At most K of the best 2K end, so K others are among them if there are any.
        count = min(2 * num_beams, num_beams * symbols)
        best = _checks.largest(every, count)
        log_probs = jnp.take_along_axis(every, best, axis=1)
        beam, token = best // symbols, (best % symbols).astype(jnp.int32)
        here = jnp.arange(steps, dtype=jnp.int32) == now.written
        tokens = jnp.where(here, token[:, :, None], rows(now.tokens, beam))

        ends = token == end
        top = slice(None, num_beams)
        new = jnp.where(ends & ~done(now)[:, None], log_probs, -jnp.inf)[:, top]
        of_length = jnp.full_like(now.ended_lengths, now.written + 1)[:, : new.shape[1]]
        pool = jax.tree.map(
            lambda *parts: jnp.concatenate(parts, axis=1),
            (now.ended, now.ended_log_probs, now.ended_scores, now.ended_lengths),
            (tokens[:, top], new, new / penalty(now.written + 1), of_length),
        )
        kept = _checks.largest(pool[2], num_beams)
        ended, ended_log_probs, ended_scores, ended_lengths = (
            rows(array, kept) for array in pool
        )

        others = jnp.where(ends, -jnp.inf, log_probs)
        lead = _checks.largest(others, min(num_beams, count))
        lead = jnp.pad(lead, ((0, 0), (0, num_beams - lead.shape[1])), mode="edge")
        distinct = jnp.arange(num_beams, dtype=jnp.int32) < count
        going = jnp.where(distinct, jnp.take_along_axis(others, lead, 1), -jnp.inf)
        beams = rows(beam, lead)
        flat = (
            jnp.arange(batch, dtype=jnp.int32)[:, None] * num_beams + beams
        ).reshape(-1)
        return _Search(
            written=now.written + 1,
            state=jax.tree.map(lambda x, axis: of_beams(x, axis, flat), state, axes),
            last=rows(token, lead),
            tokens=rows(tokens, lead),
            log_probs=going,
            ended=ended,
            ended_log_probs=ended_log_probs,
            ended_scores=ended_scores,
            ended_lengths=ended_lengths,
            failed=failed,
        )

    found = jax.lax.while_loop(goes_on, extend, start)

    # Sequences without an end stand behind those that have one.
    left = jnp.where(done(found)[:, None], -jnp.inf, found.log_probs)
    whole = jnp.full_like(found.ended_lengths, steps)
    tokens, log_probs, scores, lengths = jax.tree.map(
        lambda *parts: jnp.concatenate(parts, axis=1),
        (found.ended, found.ended_log_probs, found.ended_scores, found.ended_lengths),
        (found.tokens, left, left / penalty(jnp.int32(steps)), whole),
    )
    behind = jnp.repeat(jnp.array([0, 1], jnp.int32), num_beams)[None]
    missing = log_probs == -jnp.inf
    order = jnp.lexsort((-scores, jnp.where(missing, jnp.int32(2), behind)), axis=-1)
    order = order[:, :num_beams]
    tokens, log_probs, scores, lengths, missing = (
        rows(array, order) for array in (tokens, log_probs, scores, lengths, missing)
    )
    failed = found.failed[:, None]
    return Beams(
        tokens=jnp.where((missing | failed)[:, :, None], -1, tokens),
        log_probs=jnp.where(failed, jnp.nan, log_probs),
        scores=jnp.where(failed, jnp.nan, scores),
        lengths=jnp.where(missing | failed, 0, lengths),
        finished=(order < num_beams) & ~missing & ~failed,
    )
