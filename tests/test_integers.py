"""Whole numbers of any dtype count alike, and those of nothing give nothing.

One table of all functions that take an array of integers: as ids, edges, lengths,
positions or buckets.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax import attention, inputs, masks, positions
from attn_jax.attention import _checks
from attn_jax.attention.convolution import quadratic
from attn_jax.attention.graph import graph_attention, unique_edges
from attn_jax.attention.reformer_attention import bucketed
from attn_jax.models.labeller import IdInput
from attn_jax.nn.decoder import Decoder, decoder_functions
from attn_jax.nn.encoder import Encoder
from experiments.attention_vs_rnn.logistic_mixture import logistic_mixture_log_prob
from experiments.graphs.model import Edges, GraphLabeller, PairBias

# More than int8 and uint8 can count.
MANY = 300


def _rows(count, dim=2):
    return jnp.asarray(np.random.default_rng(0).standard_normal((count, dim)), "f")


@functools.cache
def _decoder(mixer="dot_product"):
    return Decoder(
        MANY,
        MANY,
        mixer=mixer,
        dim=4,
        depth=1,
        num_heads=1,
        max_length=9,
        rngs=nnx.Rngs(0),
    )


def _of_graph(name):
    """A graph network of ids, and what is asked of it but for one argument."""

    def call(given):
        parts = dict(
            nodes=np.array([[1, 2], [3, 4], [5, 6]]),
            senders=np.array([0, 2]),
            receivers=np.array([1, 1]),
            kinds=np.array([0, 100]),
            known=np.array([-1, 100, 1]),
            wanted=np.array([0, 1, 2]),
        ) | {name: given}
        nodes, known, wanted = (parts.pop(n) for n in ("nodes", "known", "wanted"))
        return _graph_labeller()(jnp.asarray(nodes), Edges(**parts), known, wanted)

    return call


@functools.cache
def _graph_labeller():
    model = GraphLabeller(
        (MANY, MANY),
        MANY,
        dim=4,
        depth=1,
        num_heads=1,
        mlp_dim=0,
        num_kinds=MANY,
        reads_labels=True,
        rngs=nnx.Rngs(0),
    )
    attention = model.encoder.blocks[0].attention  # has no bias of kinds at first
    attention.of_kinds[...] = _rows(1, MANY)
    return model


@functools.cache
def _pair_encoder():
    bias = PairBias((MANY, 9), dim=4, num_heads=1, depth=1, rngs=nnx.Rngs(0))
    bias.table[...] = _rows(MANY + 9, 1)[None]
    return Encoder(1, 4, num_heads=1, mlp_dim=4, positions=bias, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module", autouse=True)
def _models():
    """Makes the models before a trace does."""
    for make in (_decoder, _graph_labeller, _pair_encoder):
        make()
    _decoder("linear")


def _by_pairs(pairs):
    encoder = _pair_encoder()
    return encoder(_rows(2, 4)[None], tables=encoder.positions.of_pairs(pairs))


def _step_at(step, state):
    def call(position):
        x = _rows(1, 4)[0]
        return step(state, position[0], x, x, x)[1][None]

    return call


CACHE = attention.cache_state(260, 4, 4)
HASHES = attention.reformer_init_state(260, 4, 4, num_buckets=2, num_rounds=1)
hash_step = functools.partial(attention.reformer_step, rng=jax.random.key(0))


class Case(NamedTuple):
    """A function of one array of integers.

    Attributes:
      call: the function.
      good: numbers that it takes, all at most 127.
      bad: numbers of which one is of nothing, or None where all are of something.
      lost: which rows are NaN where `bad` is traced, or a test of the result.
    """

    call: Any
    good: Any
    bad: Any = None
    lost: Any = None


def _none(out):
    return not out.any()


def _finite(out):
    return np.isfinite(out).all()


def _lost_from_1(out):
    return np.isnan(out[1:]).all()


CASES = {
    "from_lengths": Case(lambda n: masks.from_lengths(n, MANY), [0, 100, 127]),
    "from_edges": Case(
        lambda e: masks.from_edges(e, e[::-1], MANY), [1, 100], [1, MANY], _none
    ),
    "graph_attention": Case(
        lambda e: graph_attention(*3 * [_rows(MANY)], e, e[::-1]),
        [1, 100],
        [1, -1],
        _none,
    ),
    "one_hot": Case(lambda i: inputs.one_hot(i, MANY), [2, 100], [-1], _none),
    "embed": Case(lambda i: inputs.embed(_rows(MANY), i), [2, 100], [MANY], _none),
    "graph_nodes": Case(
        lambda i: inputs.graph_nodes(jnp.zeros(MANY, int), 2, i.reshape(-1, 2))[:, 2],
        [2, 100, 3, 3],
        [-1, 3],
        _none,
    ),
    "sinusoidal": Case(lambda p: positions.sinusoidal(p, 4), [0, 5, 127]),
    "rotary": Case(lambda p: positions.rotary(_rows(3, 4), p), [0, 5, 127]),
    "quadratic": Case(
        lambda p: quadratic(p[:, None], p[:, None], jnp.ones(1), 2.0), [0, 5, 127]
    ),
    "bucketed": Case(
        lambda b: bucketed(*3 * [_rows(3)], b[None], num_buckets=MANY),
        [0, 100, 0],
        [0, MANY, 0],
        [0, 1, 0],
    ),
    "logistic_mixture_log_prob": Case(
        lambda v: logistic_mixture_log_prob(_rows(2, 3), v, largest=MANY),
        [0, 100],
        [0, -1],
        [0, 1],
    ),
    "cache_step": Case(_step_at(attention.cache_step, CACHE), [100], [261], [1]),
    "hash_step": Case(_step_at(hash_step, HASHES), [100], [-1], [1]),
    "IdInput": Case(
        lambda i: IdInput((MANY, 9), 4, rngs=nnx.Rngs(0))(i.reshape(1, 2, 2))[0],
        [100, 8, 3, 0],
        [100, 8, 3, -1],
        [0, 1],
    ),
    "IdInput of one row": Case(
        lambda i: IdInput((1,), 4, rngs=nnx.Rngs(0))(i[None, :, None])[0],
        [0, 0],
        [0, 1],
        [0, 1],
    ),
    "PairBias": Case(
        lambda i: _by_pairs(i.reshape(1, 2, 2, 2))[0],
        [1, 2, 3, 4, 100, 6, 7, 8],
        [1, 2, 3, 4, 100, 6, 7, 9],
        [0, 1],
    ),
    "Decoder": Case(
        lambda t: _decoder()(t[None])[0], [100, 3, 0], [100, MANY, 0], _lost_from_1
    ),
    "Decoder.step": Case(
        lambda t: _decoder().step(_decoder().init_state(2), t)[1],
        [100, 3],
        [3, -1],
        [0, 1],
    ),
    "DecoderState.position": Case(
        lambda p: _decoder("linear").step(
            _decoder("linear").init_state(1)._replace(position=p[0]), jnp.array([1])
        )[1],
        [8],
        [9],
        [1],
    ),
    "generate": Case(
        lambda t: decoder_functions(_decoder())[0].generate(
            decoder_functions(_decoder())[1], t[None], 2, jax.random.key(0)
        ),
        [100, 3],
        [MANY, 3],
        lambda out: (out == -1).all(),
    ),
    "nodes": Case(
        lambda i: _of_graph("nodes")(i.reshape(3, 2)),
        [1, 2, 3, 100, 5, 6],
        [1, 2, 3, 100, -1, 6],
        [0, 1, 1],  # the last node sends to the second
    ),
    "senders": Case(_of_graph("senders"), [0, 2], [0, 3], _finite),
    "receivers": Case(_of_graph("receivers"), [2, 2], [2, -1], _finite),
    "kinds": Case(_of_graph("kinds"), [0, 100], [0, MANY], [0, 1, 0]),
    "known": Case(_of_graph("known"), [-1, 100, 1], [-1, 100, -2], [0, 1, 1]),
    "wanted": Case(_of_graph("wanted"), [1, 0], [1, -1], [0, 1]),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_count_the_same_in_every_dtype(name):
    case = CASES[name]
    run = jax.jit(case.call)
    want, got = (run(np.array(case.good, dtype)) for dtype in (np.int32, np.int8))
    assert _finite(want)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("jit", [False, True])
def test_every_dtype_becomes_int32(jit):
    for dtype in map(np.dtype, "bBhHiIlL"):
        call = functools.partial(_checks.check_ids, "ids", size=MANY)
        found = (jax.jit(call) if jit else call)(np.array([3, 100], dtype))
        assert found.dtype == jnp.int32
        assert found.tolist() == [3, 100]
    with pytest.raises(TypeError, match="`ids` must be integers, but has dtype bool"):
        call(np.array([True]))


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].bad])
def test_a_number_of_nothing_is_refused_or_gives_nan(name):
    case = CASES[name]
    bad = np.array(case.bad)
    with pytest.raises(ValueError, match=r"must lie in 0 … \d+.*, but has"):
        case.call(bad)
    out = np.asarray(jax.jit(case.call)(bad))
    if callable(case.lost):
        assert case.lost(out)
    else:
        lost = np.isnan(out.reshape(len(out), -1)).any(axis=1)
        assert lost.tolist() == [bool(row) for row in case.lost]


def test_large_numbers_do_not_come_back_small():
    # In int32 they would be 3 and 0.
    far = np.array([2**32 + 3, 2**32])
    assert masks.from_lengths(far, 5).all()
    assert not masks.from_lengths(-far, 5).any()
    with pytest.raises(
        ValueError, match="`ids` must lie in 0 … 4, but has values from"
    ):
        inputs.one_hot(far, 5)
    with pytest.raises(ValueError, match="`positions` must lie in -2147483648 … "):
        positions.sinusoidal(far, 2)
    # As traced uint32, 2³² − 1 is −1 in int32.
    traced = np.array([2**32 - 1], np.uint32)
    assert jax.jit(lambda n: masks.from_lengths(n, 5))(traced).all()
    assert not jax.jit(lambda i: inputs.one_hot(i, 5))(traced).any()
    assert jnp.isnan(jax.jit(lambda p: positions.sinusoidal(p, 2))(traced)).all()


def test_edges_of_many_nodes_are_told_apart():
    senders, receivers = np.array([3, 3, 200], np.uint8), np.array([100, 100, 1], "b")
    for dtype in (np.uint8, np.uint64):
        found = unique_edges(senders.astype(dtype), receivers, MANY)
        assert [index.tolist() for index in found] == [[200, 3], [1, 100]]
        assert [index.dtype for index in found] == [dtype, np.int8]


def test_sizes_may_be_narrow_numbers_of_numpy():
    narrow, wide = np.uint8(200), 200
    for call in (
        masks.causal,
        lambda n: masks.window(n, type(n)(3), type(n)(2)),
        lambda n: masks.strided(n, type(n)(3)),
        lambda n: masks.from_lengths(np.array([7]), n),
        lambda n: positions.sinusoidal_1d(n, type(n)(4)),
        lambda n: positions.alibi(n, slope=0.5),
        lambda n: positions.t5_buckets(n),
        lambda n: positions.quadratic_2d(type(n)(2), n, jnp.ones(2), 1.0),
    ):
        np.testing.assert_array_equal(call(narrow), call(wide))
