"""Sequence labellers: one interface, and padding that changes nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax.models import BODIES, Labeller
from attn_jax.models.labeller import IdInput, side_by_side
from attn_jax.nn.recurrent import run_cell, turned
from attn_jax.tools.cost import labeller_cost

SIZES, CLASSES, DIM, LONGEST = (11, 5), 4, 8, 9
OPTIONS = {
    "window": dict(depth=1, mlp_dim=16, window=2),
    "cnn": dict(depth=2, mlp_dim=16, kernel=3),
    "gru": dict(depth=1),
    "lstm": dict(depth=1),
    "s4d": dict(depth=1, state_dim=4),
    "transformer": dict(depth=1, mlp_dim=16, num_heads=2),
}


def build(body, inputs=SIZES, **more):
    model = Labeller(
        inputs,
        CLASSES,
        body=body,
        dim=DIM,
        max_length=LONGEST,
        rngs=nnx.Rngs(0),
        **(OPTIONS[body] | more),
    )
    # The head starts at zero: nothing behind it would be seen.
    rng = np.random.default_rng(0)
    model.head.kernel[...] = jnp.asarray(
        rng.standard_normal((DIM, CLASSES)), jnp.float32
    )
    return model


def ids(rows, length, seed=0):
    rng = np.random.default_rng(seed)
    found = [rng.integers(0, size, (rows, length)) for size in SIZES]
    return np.stack(found, -1).astype(np.int32)


@nnx.jit
def _run(model, x, real):
    return model(x, real)


@nnx.jit
def _slope(model, x, real):
    def square(model, x):
        return (model(x, real)[0, 0] ** 2).sum()

    return nnx.grad(square, argnums=1)(model, x)


@pytest.mark.parametrize("body", BODIES)
def test_padding_may_hold_nan(body):
    model = build(body, inputs=3)
    x = np.random.default_rng(0).standard_normal((2, LONGEST, 3)).astype(np.float32)
    real = np.arange(LONGEST) < np.array([[LONGEST], [4]])

    @nnx.jit
    @nnx.grad
    def grads(model, x):
        return jnp.where(real[..., None], model(x, real), 0).sum()

    dirty = np.where(real[..., None], x, np.nan)
    found, want = (np.asarray(_run(model, a, real))[real] for a in (dirty, x))
    np.testing.assert_array_equal(found, want)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads(model, dirty)))


@pytest.mark.parametrize("body", BODIES)
def test_padding_changes_no_result(body):
    model = build(body)
    run = functools.partial(_run, model)
    x = ids(2, LONGEST)
    real = np.arange(LONGEST) < np.array([[LONGEST], [4]])
    mixed = np.asarray(run(x, real))
    # Other ids in the padding, and the short sequence by itself, unpadded.
    other = np.where(real[..., None], x, ids(2, LONGEST, seed=1))
    assert (np.asarray(run(other, real))[real] == mixed[real]).all()
    alone = np.asarray(model(x[1:, :4], np.ones((1, 4), bool)))
    np.testing.assert_allclose(mixed[1, :4], alone[0], rtol=0, atol=2e-5)
    assert np.abs(mixed[0, :4] - mixed[1, :4]).max() > 1e-3


@pytest.mark.parametrize(
    ("body", "options", "reach"),
    [
        ("window", {}, 2),
        ("cnn", {}, 2),
        ("cnn", dict(dilations=(1, 3)), 4),
        ("cnn", dict(dilations=(1, 0)), 1),
        ("gru", {}, 8),
        ("s4d", {}, 8),
        ("transformer", {}, 8),
    ],
)
def test_a_label_sees_as_far_as_its_model_can(body, options, reach):
    model = build(body, 3, **options)
    real = jnp.ones((1, LONGEST), bool)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, LONGEST, 3)), "f4")
    seen = _slope(model, x, real)
    far = np.flatnonzero(np.abs(np.asarray(seen)[0]).max(-1) > 0)
    assert far.max() == reach


def test_an_id_input_is_the_sum_of_rows_of_its_tables():
    layer = IdInput(SIZES, DIM, rngs=nnx.Rngs(0))
    table = np.asarray(layer.embed.embedding[...])
    x = np.array([[[3, 4]]], np.int32)
    wanted = table[3] + table[SIZES[0] + 4]
    np.testing.assert_allclose(layer(x)[0, 0], wanted, rtol=1e-6)


def test_the_pooled_label_is_the_head_of_the_mean_over_real_vectors():
    model = build("window", pool="mean")
    x, real = ids(1, 5), np.arange(5)[None] < 3
    h = model.body(model.input(x), real)[0, :3]
    np.testing.assert_allclose(model(x, real)[0], model.head(h.mean(0)), atol=1e-5)


def test_costs_are_counted():
    cost = labeller_cost(build("window", 3), 3, 6)
    first = 3 * DIM + DIM
    assert cost.input_params == first
    mix = 5 * DIM * DIM + DIM
    blocks = 2 * DIM * 16 + 16 + DIM
    assert cost.params == first + mix + blocks + 3 * 2 * DIM + DIM * CLASSES + CLASSES
    assert cost.flops > 2 * (3 * DIM + 5 * DIM * DIM + 2 * DIM * 16 + DIM * CLASSES)
    learned = build("transformer", 3, positions="learned")
    assert labeller_cost(learned, 3, 6).position_params == LONGEST * DIM
    # A recurrent layer's loop counts as often as it runs.
    gru = build("gru", 3)
    assert labeller_cost(gru, 3, 6).flops > 2 * 2 * 3 * 2 * DIM * DIM


def test_side_by_side_puts_neighbours_in_order():
    x = jnp.arange(1.0, 5.0).reshape(1, 4, 1)
    assert side_by_side(x, 2)[0, 1].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(body="rnn"), "`body` must be one of window, cnn"),
        (dict(pool="max"), "`pool` must be None or 'mean', but is 'max'"),
        (dict(window=-1), "`window` must be 0 or more, but is -1"),
        (dict(heads=3), "'window' does not take .*heads"),
        (dict(body="cnn", window=None), "'cnn' does not take"),
    ],
)
def test_a_wrong_option_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Labeller(
            SIZES,
            CLASSES,
            dim=DIM,
            max_length=LONGEST,
            rngs=nnx.Rngs(0),
            **(dict(body="window", **OPTIONS["window"]) | change),
        )


def test_wrong_input_is_named():
    model = build("window")
    real = np.ones((1, 3), bool)
    with pytest.raises(ValueError, match=r"`inputs` must be ids \[B, T, 2\]"):
        model(ids(1, 3)[..., :1], real)
    with pytest.raises(TypeError, match="`inputs` must be integers, but .* float32"):
        model(ids(1, 3).astype(np.float32), real)
    with pytest.raises(ValueError, match=r"`key_mask` must be bool \[B, T\] = \[1"):
        model(ids(1, 3), real[:, :2])
    with pytest.raises(ValueError, match="1 to max_length=9 vectors .*, but has 10"):
        model(ids(1, 10), np.ones((1, 10), bool))
    with pytest.raises(ValueError, match="1 to max_length=9 vectors .*, but has 0"):
        model(ids(1, 0), np.ones((1, 0), bool))
    with pytest.raises(ValueError, match=r"`inputs` must be vectors \[B, T, 3\]"):
        build("window", 3)(jnp.zeros((1, 3, 4)), real)
    with pytest.raises(ValueError, match="`kernel` must be odd and .* but is 4"):
        build("cnn", kernel=4)
    with pytest.raises(ValueError, match=r"`dilations` must be depth=2 .* is \(1,\)"):
        build("cnn", dilations=(1,))


@pytest.mark.parametrize("kind", [nnx.GRUCell, nnx.OptimizedLSTMCell])
def test_cells_of_flax_give_what_they_give_in_flax(kind):
    keys = iter(jax.random.split(jax.random.key(0), 99))
    size, hidden, lengths = 4, 6, jnp.array([7, 3, 5])

    def layer():
        return nnx.RNN(kind(size, hidden, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))

    both = nnx.Bidirectional(layer(), layer(), rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(both, nnx.Param, ...)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), params
    )
    x = jax.random.normal(next(keys), (3, 7, size))
    real = (jnp.arange(7)[None] < lengths[:, None])[:, :, None]
    weight = jnp.where(real, jax.random.normal(next(keys), (3, 7, 2 * hidden)), 0.0)

    def theirs(params, x):
        zeros = jnp.zeros((3, hidden))
        start = zeros if kind is nnx.GRUCell else (zeros, zeros)
        run = nnx.merge(graphdef, params, rest)
        x = jnp.where(real, x, 0.0)
        out = run(x, initial_carry=(start, start), seq_lengths=lengths)
        return (out * weight).sum()

    def ours(params, x):
        run, x = nnx.merge(graphdef, params, rest), jnp.where(real, x, 0.0)
        back = run_cell(run.backward_rnn.cell, turned(x, lengths))
        parts = [run_cell(run.forward_rnn.cell, x), turned(back, lengths)]
        return (jnp.concatenate(parts, axis=-1) * weight).sum()

    want, got = (
        jax.value_and_grad(f, argnums=(0, 1))(params, x) for f in (theirs, ours)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), want, got)
