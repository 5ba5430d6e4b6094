"""Sequence to sequence: two forms that are one model, and padding that is not there."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax import beam_search, sample_symbols
from attn_jax.models import EncoderDecoder, encoder_decoder_functions
from attn_jax.nn.cross_attention import CrossAttention
from attn_jax.nn.decoder import Decoder
from attn_jax.nn.encoder import EncoderBlock

SOURCE, TARGET, LONGEST = 9, 7, 6
greedy = functools.partial(sample_symbols, temperature=0.0)

MODELS = {
    "transformer": dict(),
    "post": dict(norm="post", tied=False, positions="learned", dropout_rate=0.3),
    "relative": dict(positions="shaw", target_positions="rope", shared=True),
    "linear": dict(attention="linear", mixer="linear", cross="linear"),
    "bahdanau": dict(attention="lstm", mixer="lstm", cross="additive"),
    "no attention": dict(attention="lstm", mixer="lstm", cross="summary"),
    "small keys": dict(key_dim=3, attention="additive"),
    "random": dict(cross="performer", positions="none", target_positions="none"),
}


@functools.cache
def _made(name: str):
    options = dict(MODELS[name])
    model = EncoderDecoder(
        TARGET if options.get("shared") else SOURCE,
        TARGET,
        dim=8,
        depth=2,
        num_heads=2,
        max_source=LONGEST,
        max_target=LONGEST,
        rngs=nnx.Rngs(0),
        **options,
    )
    return encoder_decoder_functions(model)


def _batch(rows: int = 3):
    keys = jax.random.split(jax.random.key(1), 2)
    source = jax.random.randint(keys[0], (rows, LONGEST), 0, TARGET)
    target = jax.random.randint(keys[1], (rows, LONGEST), 0, TARGET)
    key_mask = jnp.arange(LONGEST)[None] < jnp.array([[LONGEST], [2], [4]])[:rows]
    return source, target, key_mask


@pytest.mark.parametrize("name", MODELS)
def test_token_by_token_is_all_at_once_and_padding_is_not_there(name):
    functions, params = _made(name)
    source, target, key_mask = _batch()
    whole = jax.jit(functions.apply)(params, source, target, key_mask)
    memory = functions.encode(params, source, key_mask)
    state = functions.init(3, LONGEST)
    step = jax.jit(functions.step)
    for t in range(LONGEST):
        state, logits = step((params, memory), state, target[:, t])
        np.testing.assert_allclose(logits, whole[:, t], atol=2e-5)

    other = jnp.where(key_mask, source, (source + 1) % TARGET)
    found = jax.jit(functions.apply)(params, other, target, key_mask)
    np.testing.assert_allclose(found, whole, atol=2e-5)
    # And what is no padding matters, as do earlier symbols of the target.
    seen = jax.jit(functions.apply)(params, (source + 1) % TARGET, target, key_mask)
    assert (np.abs(seen - whole).max(axis=(1, 2)) > 1e-3).all()
    later = target.at[:, 3].set((target[:, 3] + 1) % TARGET)
    moved = jax.jit(functions.apply)(params, source, later, key_mask)
    moved = np.abs(moved - whole).max(axis=(0, 2))
    assert (moved[:3] < 1e-6).all() and (moved[3:] > 1e-4).all()


@pytest.mark.parametrize("name", ["transformer", "no attention"])
def test_beams_of_a_source_read_one_memory(name):
    functions, params = _made(name)
    source, _, key_mask = _batch()
    search = functools.partial(functions.search, start=0, end=1, num_beams=3)
    found = search(params, source, 5, key_mask)
    # Each sequence has the log-probability that the whole model gives it.
    starts = jnp.zeros((9, 1), jnp.int32)
    tokens = jnp.where(found.tokens < 0, 0, found.tokens).reshape(9, 5)
    rows = jnp.repeat(source, 3, axis=0), jnp.repeat(key_mask, 3, axis=0)
    shifted = jnp.concatenate([starts, tokens[:, :-1]], axis=1)
    logits = functions.apply(params, rows[0], shifted, rows[1])
    each = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, :, None], 2)[
        ..., 0
    ]
    counted = jnp.arange(5)[None] < found.lengths.reshape(9, 1)
    log_probs = jnp.where(counted, each, 0.0).sum(axis=1).reshape(3, 3)
    np.testing.assert_allclose(found.log_probs, log_probs, atol=1e-4)
    # What stands in the batch beside a source is nothing to it.
    alone = search(params, source[1:2], 5, key_mask[1:2])
    np.testing.assert_array_equal(alone.tokens[0], found.tokens[1])


def test_one_beam_is_greedy_and_the_cache_is_the_whole_pass():
    functions, params = _made("transformer")
    source, _, key_mask = _batch()
    args = (params, source, 5, jax.random.key(0), key_mask)
    drawn = functions.generate(*args, start=0, sample=greedy)
    beam = functions.search(params, source, 5, key_mask, start=0, end=1, num_beams=1)
    ends = np.asarray(drawn) == 1
    until = np.cumsum(ends, axis=1) - ends == 0
    np.testing.assert_array_equal(np.where(until, drawn, 1), beam.tokens[:, 0])
    written = jnp.zeros((3, 1), jnp.int32)
    for _ in range(5):
        logits = functions.apply(params, source, written, key_mask)[:, -1]
        new = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        written = jnp.concatenate([written, new[:, None]], axis=1)
    np.testing.assert_array_equal(written[:, 1:], drawn)


@pytest.mark.parametrize("name", ["post", "bahdanau"])
def test_weights_are_what_tokens_look_at(name):
    functions, params = _made(name)
    source, target, key_mask = _batch()
    found = functions.weights(params, source, target, key_mask)
    assert [w.shape for w in found] == 2 * [(3, 2, LONGEST, LONGEST)]
    for weights in found:
        np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=1e-5)
        assert (np.where(key_mask[:, None, None], 0.0, weights) == 0.0).all()


def test_a_memory_may_hold_anything_at_padding():
    decoder = Decoder(
        TARGET, TARGET, mixer="linear", cross="dot_product", dim=8, depth=1,
        num_heads=2, max_length=3, rngs=nnx.Rngs(0),
    )  # fmt: skip
    graphdef, params, rest = nnx.split(decoder, nnx.Param, ...)
    key_mask = jnp.array([[True, True, False]])
    memory = jax.random.normal(jax.random.key(0), (1, 3, 8))

    @jax.jit
    def slopes(params, memory):
        def loss(params):
            model = nnx.merge(graphdef, params, rest)
            read = model.remember(memory, key_mask)
            return jnp.square(model(jnp.zeros((1, 3), jnp.int32), read)).sum()

        return jax.value_and_grad(loss)(params)

    holes = jnp.where(key_mask[:, :, None], memory, jnp.nan)
    jax.tree.map(np.testing.assert_array_equal, *(slopes(params, m) for m in (
        jnp.where(key_mask[:, :, None], memory, 7.0), holes
    )))  # fmt: skip


def test_dropout_is_for_training_alone():
    model = EncoderDecoder(
        9, 7, dim=8, depth=1, num_heads=2, max_source=6, max_target=6,
        dropout_rate=0.5, rngs=nnx.Rngs(0),
    )  # fmt: skip
    functions, params = encoder_decoder_functions(model)
    source, target, key_mask = _batch()
    apply = functools.partial(functions.apply, params, source, target, key_mask)
    one, same, other = (apply(dropout_rng=jax.random.key(s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01 < np.abs(one - apply()).max()
    np.testing.assert_array_equal(apply(), apply())


def test_keys_may_be_of_another_size_than_values():
    _, params = _made("small keys")
    block = params["decoder"]["blocks"][0]
    assert block["mix"]["project"]["kernel"].shape == (8, 2 * 2 * 3 + 8)
    assert block["cross"]["query"]["kernel"].shape == (8, 2 * 3)
    assert block["cross"]["memory"]["kernel"].shape == (8, 2 * 3 + 8)
    attention = params["encoder"]["blocks"][0]["attention"]
    shapes = [attention[x]["kernel"].shape for x in ("query", "key", "value", "out")]
    assert shapes == [(8, 2, 3), (8, 2, 3), (8, 2, 4), (2, 4, 8)]
    make = functools.partial(EncoderDecoder, 9, 7, dim=8, depth=1, num_heads=2)
    make = functools.partial(make, max_source=6, max_target=5, rngs=nnx.Rngs(0))
    same, plain = (encoder_decoder_functions(make(key_dim=k))[1] for k in (4, None))
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), same, plain)
    with pytest.raises(ValueError, match="`key_dim` must be left out, or 4, with pos"):
        make(key_dim=2, positions="rope")
    with pytest.raises(ValueError, match="even head size.*key_dim=3 it is 3"):
        make(key_dim=3, target_positions="rope")


def test_post_norm_ends_with_a_norm_and_tied_outputs_are_the_table():
    block = EncoderBlock(8, num_heads=2, mlp_dim=16, norm="post", rngs=nnx.Rngs(0))
    out = block(3.0 * jax.random.normal(jax.random.key(0), (2, 5, 8)) + 1.0)
    np.testing.assert_allclose(out.mean(axis=-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(out.std(axis=-1), 1.0, atol=1e-2)
    _, tied = _made("transformer")
    assert "head" not in tied["decoder"] and "norm" in tied["decoder"]
    _, post = _made("post")
    assert "norm" not in post["decoder"] and "norm" not in post["encoder"]
    assert "embed" not in _made("relative")[1]


def test_bad_arguments_are_named():
    make = functools.partial(
        EncoderDecoder, 9, 7, dim=8, depth=1, num_heads=2, max_source=6, max_target=6,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    with pytest.raises(ValueError, match="shared=True needs as many symbols"):
        make(shared=True)
    with pytest.raises(ValueError, match="'truncated' cannot honour"):
        make(cross="truncated")
    with pytest.raises(ValueError, match="`norm` must be 'pre' or 'post'"):
        make(norm="middle")
    with pytest.raises(ValueError, match="`norm` must be 'pre' with attention='lstm'"):
        make(attention="lstm", norm="post")
    with pytest.raises(ValueError, match="'rope' with mixer='lstm'"):
        make(mixer="lstm", target_positions="rope")
    model = make()
    with pytest.raises(ValueError, match=r"`source` must be \[B, S\] with 1 ≤ S"):
        model.encode(jnp.zeros((2, 7), jnp.int32))
    with pytest.raises(ValueError, match="`source` must lie in 0 … 8"):
        model.encode(jnp.full((2, 3), 9))
    with pytest.raises(ValueError, match="This decoder needs a `memory`"):
        model.decoder(jnp.zeros((2, 3), jnp.int32))
    functions, params = encoder_decoder_functions(model)
    source = jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match="`start` must lie in 0 … 6"):
        functions.search(params, source, 2, start=7, end=1)
    with pytest.raises(ValueError, match="`end` must lie in 0 … 6"):
        functions.search(params, source, 2, start=0, end=7)
    with pytest.raises(ValueError, match="`source` must lie in 0 … 8"):
        functions.generate(params, source + 9, 2, jax.random.key(0), start=0)
    memory = model.encode(jnp.zeros((2, 3), jnp.int32))
    state = model.decoder.init_state(3)
    with pytest.raises(ValueError, match="`token` must be .* B=2, .* there are 3"):
        model.decoder.step(state, jnp.zeros(3, jnp.int32), memory)


def test_queries_that_see_one_another_are_refused():
    def together(query, key, value, mask=None):
        weights = jax.nn.softmax(query @ key.T / jnp.abs(query).max())
        return weights @ value

    for variant in (together, "shaw"):
        with pytest.raises(ValueError, match="depends on the queries beside it"):
            CrossAttention(8, num_heads=2, variant=variant, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["transformer", "bahdanau"])
def test_what_padding_holds_has_no_gradient(name):
    functions, params = _made(name)
    source, target, key_mask = _batch()

    @jax.jit
    def slopes(params, source):
        logits = functools.partial(functions.apply, params, source, target, key_mask)
        return jax.grad(lambda p: functions.apply(p, source, target, key_mask).sum())(
            params
        ), logits()

    # A traced symbol that there is not is NaN, here at padding alone.
    found, out = slopes(params, jnp.where(key_mask, source, -1))
    assert np.isfinite(out).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


# --------------------------------------------------------------------- the search

SYMBOLS, STEPS = 4, 4


def _step(table, state, token):
    count, history = state
    history = history * 2 + token
    return (count + 1, history), table[history % 5, token]


def _init(batch, length):
    return jnp.zeros((), jnp.int32), jnp.zeros(batch, jnp.int32)


@functools.cache
def _table():
    return 1.5 * jax.random.normal(jax.random.key(3), (5, SYMBOLS, SYMBOLS))


def _all_sequences(start: int, alpha: float):
    """Every sequence, the best first: (finished, score, tokens)."""
    log_p = np.asarray(jax.nn.log_softmax(_table()), float)
    found = []

    def extend(tokens, history, last, log_prob):
        history = history * 2 + last
        for symbol in range(SYMBOLS):
            longer, total = (
                [*tokens, symbol],
                log_prob + log_p[history % 5, last, symbol],
            )
            if symbol and len(longer) < STEPS:
                extend(longer, history, symbol, total)
            else:
                score = total / ((5 + len(longer)) / 6) ** alpha
                found.append((symbol == 0, score, longer))

    extend([], 0, start, 0.0)
    return sorted(found, key=lambda one: (not one[0], -one[1]))


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_as_many_beams_as_sequences_find_them_all_in_order(alpha):
    starts = [1, 2, 3]
    found = beam_search(
        _table(), jnp.array(starts)[:, None], STEPS, step=_step, init=_init, end=0,
        num_beams=128, length_penalty=alpha,
    )  # fmt: skip
    for row, start in enumerate(starts):
        every = _all_sequences(start, alpha)
        count = len(every)
        finished, scores, tokens = zip(*every, strict=True)
        np.testing.assert_allclose(found.scores[row, :count], scores, atol=1e-4)
        assert found.finished[row, :count].tolist() == list(finished)
        # Some are equally likely, and may come in either order.
        lengths = found.lengths[row].tolist()
        score = {
            tuple(written[:length]): one
            for written, length, one in zip(
                found.tokens[row, :count].tolist(),
                lengths[:count],
                found.scores[row, :count].tolist(),
                strict=True,
            )
        }
        assert score == pytest.approx(
            {tuple(t): one for t, one in zip(tokens, scores, strict=True)}, abs=1e-4
        )
        assert (found.tokens[row, count:] == -1).all()
        assert (found.scores[row, count:] == -np.inf).all()


def test_what_comes_after_its_end_is_nothing_to_an_example():
    """A mate that goes on has its beams stepped on, into NaN."""

    def step(table, state, token):
        state, logits = _step(table, state, token)
        return state, jnp.where((token == 3)[:, None], jnp.nan, logits)

    table = jnp.full((5, SYMBOLS, SYMBOLS), -9.0).at[:, 1, 0].set(9.0)
    table = table.at[:, 1, 3].set(8.0).at[:, 2, 1].set(9.0)
    search = functools.partial(
        beam_search, table, steps=STEPS, step=step, init=_init, end=0, num_beams=1
    )
    alone, both = search(jnp.array([[1]])), search(jnp.array([[1], [2]]))
    assert alone.tokens[0, 0].tolist() == [0, 0, 0, 0]
    np.testing.assert_array_equal(alone.tokens[0], both.tokens[0])
    np.testing.assert_array_equal(alone.log_probs[0], both.log_probs[0])


def test_a_longer_answer_does_not_replace_what_was_done():
    """Though by its score, with so large a penalty, it would."""
    p = jnp.full((5, SYMBOLS, SYMBOLS), 1e-9).at[:, 1, 0].set(0.6).at[:, 1, 2].set(0.4)
    p = p.at[:, 2, 0].set(1.0).at[:, 3, 3].set(1.0)
    search = functools.partial(
        beam_search, jnp.log(p), steps=STEPS, step=_step, init=_init, end=0,
        num_beams=1, length_penalty=5.0,
    )  # fmt: skip
    both = search(jnp.array([[1], [3]]))
    assert both.tokens[0, 0].tolist() == [0, 0, 0, 0] and both.lengths[0, 0] == 1
    assert search(jnp.array([[2]])).scores[0, 0] > both.scores[0, 0]


@pytest.mark.parametrize("wrong", [jnp.inf, jnp.nan])
def test_logits_that_say_nothing_are_told(wrong):
    table = _table().at[:, 2, 1].set(wrong)
    found = beam_search(
        table, jnp.array([[2]]), STEPS, step=_step, init=_init, end=0, num_beams=2
    )
    assert (found.tokens == -1).all() and np.isnan(found.log_probs).all()


def test_float64_is_searched_in_float64():
    with jax.enable_x64(True):
        found = beam_search(
            jnp.asarray(_table(), jnp.float64), jnp.array([[1]], jnp.int32), STEPS,
            step=_step, init=_init, end=0, num_beams=2,
        )  # fmt: skip
        assert found.scores.dtype == jnp.float64


def test_an_example_is_done_by_itself_and_nan_is_told():
    def step(table, state, token):
        state, logits = _step(table, state, token)
        return state, jnp.where((token == 3)[:, None], jnp.nan, logits)

    search = functools.partial(
        beam_search, _table(), steps=STEPS, step=step, init=_init, end=0, num_beams=2
    )
    found = search(jnp.array([[1], [3]]))
    assert (found.tokens[1] == -1).all() and np.isnan(found.scores[1]).all()
    assert not found.finished[1].any()
    table = jnp.full((5, SYMBOLS, SYMBOLS), -9.0).at[:, 1, 0].set(9.0)
    table = table.at[:, 2, 1].set(9.0)
    search = functools.partial(
        beam_search, table, steps=STEPS, step=_step, init=_init, end=0, num_beams=1
    )
    both, alone = search(jnp.array([[1], [2]])), search(jnp.array([[2]]))
    assert both.tokens[:, 0].tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]
    assert both.lengths[:, 0].tolist() == [1, 2]
    np.testing.assert_array_equal(alone.tokens[0], both.tokens[1])
    with pytest.raises(ValueError, match="`end` must be one of 4 symbols, but is 4"):
        beam_search(table, jnp.array([[1]]), 2, step=_step, init=_init, end=4)
    with pytest.raises(ValueError, match="`length_penalty` must be 0 or more"):
        beam_search(
            table, jnp.array([[1]]), 2, step=_step, init=_init, end=0, length_penalty=-1
        )
