"""Streaming against the encoder on the whole sequence."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax.attention.local import truncated
from attn_jax.nn.attention_fn import as_attention_fn
from attn_jax.nn.encoder import Encoder
from attn_jax.nn.positional import make_positions
from attn_jax.nn.streaming import Streamer, look_ahead, stream, stream_init, stream_step
from attn_jax.positions import sinusoidal, sinusoidal_1d

DIM, LENGTH = 8, 53
NEAR = functools.partial(truncated, left=4, right=2)


def build(depth, attention, **more):
    return Encoder(
        depth,
        DIM,
        num_heads=2,
        mlp_dim=12,
        attention=attention,
        rngs=nnx.Rngs(0),
        **more,
    )


def shaken(model):
    """The model with random values in every parameter, also biases and norms."""
    rng = np.random.default_rng(1)

    def shake(leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        return jnp.asarray(np.asarray(leaf) + np.float32(0.3) * noise)

    return jax.tree.map(shake, model)


@functools.cache
def near(depth=2):
    return shaken(build(depth, NEAR))


def mixed():
    """Three blocks with windows of their own, and positions of the encoder's own.

    One block normalises its queries, and its heads share keys.
    """
    own = make_positions("sinusoidal", dim=DIM, num_heads=2, depth=3, rngs=nnx.Rngs(0))
    attention = functools.partial(truncated, left=0, right=2)
    model = build(3, attention, positions=own)
    model.blocks[1].attention.attention_fn = as_attention_fn(
        "truncated", left=4, right=7, is_causal=True, scale=0.9
    )
    model.blocks[2].attention = nnx.MultiHeadAttention(
        2,
        DIM,
        num_kv_heads=1,
        normalize_qk=True,
        decode=False,
        attention_fn=as_attention_fn("truncated", left=1, right=3),
        rngs=nnx.Rngs(2),
    )
    return shaken(model)


def turned():
    """Two blocks whose queries and keys are turned by the frames' numbers."""
    own = make_positions("rope", dim=DIM, num_heads=2, depth=2, rngs=nnx.Rngs(0))
    return shaken(build(2, NEAR, positions=own))


def frames(length=LENGTH, *, seed=0):
    return np.random.default_rng(seed).standard_normal((length, DIM)).astype(np.float32)


@jax.jit
def offline(model, x, real):
    """The encoder on whole sequences [B, T, D]."""
    return model(x, real[:, None, None])


@functools.partial(jax.jit, static_argnames="chunk")
def streamed(model, x, real, chunk):
    """The stream of every sequence [B, T, D]."""
    return jax.vmap(lambda x, real: stream(model, x, real, chunk=chunk))(x, real)


def close(ours, reference):
    assert ours.shape == reference.shape
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("build_model", "ahead", "chunk"),
    [(near, 4, 4), (mixed, 5, 16), (turned, 4, 4)],
)
def test_the_stream_is_the_encoder_on_the_whole(build_model, ahead, chunk):
    # 53 is no multiple of a chunk, and the ring buffers go around several times.
    model = build_model()
    assert look_ahead(model) == ahead
    x = np.stack([frames(), frames(seed=1)])
    # All frames of one sequence exist, four of five of the other.
    real = np.random.default_rng(5).random((2, LENGTH)) < [[1.0], [0.8]]
    reference = np.where(real[..., None], offline(model, x, real), 0)
    x[~real] = np.nan  # is not read
    close(streamed(model, x, real, chunk=chunk), reference)


def test_any_length_in_any_pieces():
    # One compiled step, and one streamer again and again. Some lengths are below the
    # window, the look-ahead and the chunk.
    model = near()
    streamer = Streamer(model, chunk=4)
    for length, sizes in ((0, ()), (1, (1,)), (3, (1, 2)), (8, (5, 3)), (23, (3, 0))):
        x = frames(length, seed=length)
        came, pieces = 0, []
        for size in (*sizes, length - sum(sizes)):
            pieces.append(streamer.push(x[came : came + size]))
            came += size
            # As many as the full chunks so far and the look-ahead allow.
            known = max(0, came // 4 * 4 - look_ahead(model))
            assert sum(map(len, pieces)) == known
        pieces.append(streamer.finish())
        # Padded, to share the compiled program.
        padded = np.zeros((2, LENGTH, DIM), np.float32)
        padded[:, :length] = x
        real = np.tile(np.arange(LENGTH) < length, (2, 1))
        close(np.concatenate(pieces), offline(model, padded, real)[0, :length])


def test_outputs_depend_on_no_frame_beyond_the_look_ahead():
    x, at = np.stack([frames(), frames()]), 20
    x[1, at, 0] += 10.0  # in all channels alike, LayerNorm would take it out
    outputs = np.asarray(streamed(near(), x, np.ones((2, LENGTH), bool), chunk=4))
    differ = np.flatnonzero((outputs[0] != outputs[1]).any(-1))
    # Two layers see 2 · 2 frames ahead and 2 · 4 back.
    assert differ.tolist() == list(range(at - 4, at + 8 + 1))


def test_frame_by_frame_a_batch_shares_its_slot_and_the_state_does_not_grow():
    model, x = near(1), np.stack([frames(), frames(seed=1)])
    state = stream_init(model)
    axes = dataclasses.replace(state, layers=0, slot=None, frame=None)
    step = jax.jit(
        jax.vmap(
            functools.partial(stream_step, model),
            in_axes=(axes, 0, 0),
            out_axes=(axes, 0, 0),
        )
    )
    layers = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), state.layers)
    state = dataclasses.replace(state, layers=layers)
    first = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    real = np.ones((2, LENGTH), bool)
    ours, valids = [], []
    for at in range(LENGTH):
        state, outputs, valid = step(state, x[:, at, None], real[:, at, None])
        ours.append(outputs)
        valids.append(valid)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == first
    assert state.frame == LENGTH
    valids, ours = np.concatenate(valids, 1), np.concatenate(ours, 1)
    assert valids[:, 2:].all()
    assert not valids[:, :2].any()
    assert not ours[:, :2].any()
    close(ours[:, 2:], np.asarray(offline(model, x, real))[:, :-2])


def test_positions_are_those_of_the_frames_numbers():
    # Without blocks, what is left are positions and the last norm.
    model, x = shaken(build(0, NEAR)), frames()
    by_caller = functools.partial(sinusoidal, dim=DIM)
    run = jax.jit(functools.partial(stream, chunk=4, positions=by_caller))
    close(run(model, x), jax.jit(model.norm)(x + sinusoidal_1d(LENGTH, DIM)))
    own = mixed()
    with pytest.raises(ValueError, match="`positions` must be None.*'sinusoidal'"):
        stream_step(own, stream_init(own), x[:1], positions=by_caller)


def test_bfloat16_is_the_dtype_of_the_state():
    model = build(1, NEAR, dtype=jnp.bfloat16)
    x = jnp.ones((1, DIM), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # norms in Flax need it
        state = stream_init(model, dtype=jnp.bfloat16)
        after, outputs, _ = jax.eval_shape(stream_step, model, state, x)
    for name in ("key", "value", "query", "inputs"):
        assert getattr(state.layers[0], name).dtype == jnp.bfloat16, name
    assert outputs.dtype == jnp.bfloat16
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (state, after))
    assert shapes[0] == shapes[1]


def test_what_cannot_stream_is_named():
    with pytest.raises(TypeError, match=r"`encoder` must be an .*Encoder, but is Lin"):
        look_ahead(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"blocks\[0\] attends by 'dot_product'"):
        stream_init(build(1, "dot_product"))
    plain = build(2, NEAR)
    plain.blocks[1].attention.attention_fn = nnx.dot_product_attention
    with pytest.raises(ValueError, match=r"blocks\[1\] attends by <function dot_prod"):
        stream_init(plain)
    bound = functools.partial(NEAR, key_mask=jnp.ones(5, bool))
    with pytest.raises(ValueError, match="'truncated' with key_mask bound to it"):
        stream_init(build(1, bound))
    own = make_positions("t5", dim=DIM, num_heads=2, depth=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="positions 't5', which a stream"):
        stream_init(build(1, NEAR, positions=own))
    with pytest.raises(ValueError, match="`encoder` must have norm='pre' to stream"):
        stream_init(build(1, NEAR, norm="post"))


def test_wrong_input_is_named():
    model = near()
    state = stream_init(model, chunk=2)
    x = frames(2)
    with pytest.raises(ValueError, match="`chunk` must be at least 1, but is 0"):
        stream_init(model, chunk=0)
    with pytest.raises(ValueError, match=r"`frames` must have shape \[c, D\] with c=2"):
        stream_step(model, state, x[:1])
    with pytest.raises(TypeError, match="`real` must be bool"):
        stream_step(model, state, x, np.ones(2, np.float32))
    with pytest.raises(ValueError, match="`state` has 2 layers, but `encoder` has 1"):
        stream_step(build(1, NEAR), state, x)
    with pytest.raises(ValueError, match=r"`positions\(...\)` must have shape"):
        stream_step(model, state, x, positions=lambda t: jnp.ones((1, DIM)))
    with pytest.raises(ValueError, match=r"`frames` must have shape \[T, D\] with D=8"):
        stream(model, x[:, :3])
    with pytest.raises(ValueError, match=r"`real` must have shape \[T\] with T=2"):
        stream(model, x, np.ones(3, bool))
    streamer = Streamer(model)
    with pytest.raises(ValueError, match=r"shape \[n, D\] with D=8, but has shape \(8"):
        streamer.push(x[0])
    with pytest.raises(TypeError, match="dtype float32.*but has float64"):
        streamer.push(x.astype(np.float64))


def run_from(model, x, start, **options):
    """The stream of x [T, D] in chunks of 4, with a count that begins elsewhere."""
    step = jax.jit(functools.partial(stream_step, **options))
    state = dataclasses.replace(stream_init(model, chunk=4), frame=jnp.int32(start))
    rows = []
    for begin in range(0, len(x), 4):
        state, outputs, _ = step(model, state, x[begin : begin + 4])
        rows.append(outputs)
    return np.concatenate(rows), int(state.frame)


def test_rope_turns_alike_wherever_the_count_stands():
    model, x = turned(), frames(24)
    want, _ = run_from(model, x, 0)
    for start in (10**6, 2**24, 2**31 - 10, -10):  # over both ends of int32
        ours, frame = run_from(model, x, start)
        close(ours, want)
        assert frame == start + 24 if start < 2**30 and start > 0 else frame < 0


def test_added_positions_end_with_the_count():
    model, x = shaken(build(0, NEAR)), frames(8)
    added = functools.partial(sinusoidal, dim=DIM)
    ours, _ = run_from(model, x, 2**31 - 5, positions=added)
    assert np.isnan(ours).all(axis=1).tolist() == [False] * 5 + [True] * 3
    again, _ = run_from(model, x, -4, positions=added)  # 2³² − 4, in int32
    assert np.isnan(again).all()


def test_the_stream_runs_under_x64():
    model, x = turned(), frames()
    want = offline(model, x[None], np.ones((1, LENGTH), bool))[0]
    with jax.enable_x64(True):
        streamer = Streamer(model, chunk=4)
        close(np.concatenate([streamer.push(x), streamer.finish()]), want)
        run = functools.partial(stream, chunk=4)
        assert jax.eval_shape(run, model, x).dtype == jnp.float32
