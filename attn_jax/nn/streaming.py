"""Streaming: an encoder of truncated attention, frame by frame as they come.

A layer of `truncated` attention lets a frame see `left` frames before it and `right`
after it. So the output for a frame is known as soon as the next Σ `right` frames
(L · right for L equal layers) have come, and what a layer must remember does not grow
with the stream: the keys and values of one window, and the `right` frames whose
look-ahead is not complete. The outputs are those of the encoder on the whole sequence.

`stream_step` is one pure step on chunks of c frames, `stream` its `lax.scan` over a
sequence, and `Streamer` an object that takes frames as they come:

>>> near = functools.partial(truncated, left=3, right=2)
>>> encoder = Encoder(
...     1, 4, num_heads=1, mlp_dim=8, attention=near, rngs=nnx.Rngs(0))
>>> streamer = Streamer(encoder)
>>> [len(streamer.push(frame)) for frame in np.ones((5, 1, 4), np.float32)]
[0, 0, 1, 1, 1]
>>> len(streamer.finish())
2

Letters: T frames of a sequence, c frames of a chunk, D size of a frame, L layers.

Reference: Yeh et al., Transformer-Transducer: End-to-End Speech Recognition with
Self-Attention, arXiv:1910.12977, section 3.2 (truncated self-attention).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from attn_jax.attention import _checks
from attn_jax.attention._scores import score_dtype
from attn_jax.attention.local import truncated
from attn_jax.nn.attention_fn import AttentionFn
from attn_jax.nn.encoder import Encoder, EncoderBlock
from attn_jax.positions import frequencies, sinusoidal, turn
from attn_jax.variant import VARIANTS

__all__ = [
    "LayerState",
    "StreamState",
    "Streamer",
    "look_ahead",
    "stream",
    "stream_init",
    "stream_step",
]

Positions = Callable[[jax.Array], jax.Array]

# How far `truncated` sees by itself.
_SIDES = {
    name: inspect.signature(truncated).parameters[name].default
    for name in ("left", "right")
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "value", "key_real", "query", "inputs", "real"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class LayerState:
    """What one layer remembers: W keys and values, and `right` frames that wait.

    Attributes:
      key: [K, W, H], a ring buffer of keys; W ≥ left + right + c.
      value: [K, W, H], the values beside them.
      key_real: bool [W], which of them are of frames that exist.
      query: [right, N, H], the queries of the frames that wait for their look-ahead.
      inputs: [right, D], the layer's inputs of these frames.
      real: bool [right], which of these frames exist.
    """

    key: jax.Array
    value: jax.Array
    key_real: jax.Array
    query: jax.Array
    inputs: jax.Array
    real: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("layers", "slot", "frame"),
    meta_fields=("chunk",),
)
@dataclasses.dataclass(frozen=True)
class StreamState:
    """What `stream_step` remembers of all frames so far. Made by `stream_init`.

    Its size depends on the encoder and on `chunk`, not on the number of frames.

    Attributes:
      layers: the state of each layer.
      slot: int32 [], where the ring buffers take the next chunk.
      frame: int32 [], how many frames have come; only positions read it. From 2³¹ on
        it is negative.
      chunk: c, frames in a chunk. Static.
    """

    layers: tuple[LayerState, ...]
    slot: jax.Array
    frame: jax.Array
    chunk: int


def _window(index: int, attend: Any) -> tuple[int, int, AttentionFn]:
    """Left and right of a layer's window, and the attention inside of a window."""
    found = repr(attend.variant.name if hasattr(attend, "variant") else attend)
    if isinstance(attend, AttentionFn) and attend.variant.base is truncated:
        options = attend.variant.options
        # Arrays of a fixed length fit no stream.
        fixed = [name for name in ("bias", "mask", "key_mask") if name in options]
        if not fixed:
            left, right = (
                _checks.check_int(name, options.get(name, default), 0)
                for name, default in _SIDES.items()
            )
            inner = VARIANTS["dot_product"]
            if options.get("scale") is not None:
                inner = inner.bind(scale=options["scale"])
            if options.get("is_causal"):
                right = 0
            return left, right, dataclasses.replace(attend, variant=inner)
        found = f"'truncated' with {' and '.join(fixed)} bound to it"
    raise ValueError(
        "`encoder` must attend by 'truncated' in every block, since a stream needs a "
        f"bounded look-ahead, but blocks[{index}] attends by {found}; build it with "
        "attention=functools.partial(truncated, left=..., right=...)."
    )


def _last_norm(encoder: Encoder) -> nnx.LayerNorm:
    """The norm behind the last block, which blocks of another kind do not have."""
    if encoder.norm is None:
        raise ValueError(
            "`encoder` must have norm='pre' to stream, but has norm='post'."
        )
    return encoder.norm


def _windows(encoder: Encoder) -> list[tuple[int, int, AttentionFn]]:
    """The window of every layer, once it is sure that the encoder can stream."""
    if not isinstance(encoder, Encoder):
        raise TypeError(
            "`encoder` must be an attn_jax.nn.Encoder, but is "
            f"{type(encoder).__name__}."
        )
    _last_norm(encoder)
    _own_positions(encoder)
    turns = _turn(encoder) is not None  # around the attention, with its positions
    fns: list[Any] = [block.attention.attention_fn for block in encoder.blocks]
    return [_window(i, fn.inner if turns else fn) for i, fn in enumerate(fns)]


def _turn(encoder: Encoder) -> Callable[..., jax.Array] | None:
    """How "rope" turns queries or keys [c, N, H] of frames number [c], or None.

    Only differences of angles count. So those of one frame are rounded, to a multiple
    of 2⁻³¹ turns, and those of n frames are exact multiples of them: whole numbers,
    which lose by their overflow whole turns alone, and the same at n and at n + 2³¹.
    """
    own: Any = encoder.positions
    if own is None or own.name != "rope":
        return None
    turns = frequencies(own.head_dim, own.max_wavelength) / (2 * np.pi) % 1.0
    units = 2 * np.round(np.ldexp(turns, 31)).astype(np.int64) % 2**32

    def turned(x: jax.Array, numbers: jax.Array) -> jax.Array:
        count = jax.lax.bitcast_convert_type(numbers, jnp.uint32)[:, None]
        parts = count * jnp.asarray(units.astype(np.uint32))[None, :]
        dtype = score_dtype(x.dtype)
        angle = jax.lax.bitcast_convert_type(parts, jnp.int32).astype(dtype)
        angle = angle * jnp.asarray(2 * np.pi / 2**32, dtype)
        return jax.vmap(turn, in_axes=(1, None), out_axes=1)(x, angle)

    return turned


def _own_positions(encoder: Encoder) -> Positions | None:
    """What the encoder itself adds to frames of given numbers, or None for nothing."""
    own: Any = encoder.positions
    if own is None or own.name in ("none", "rope"):
        return None
    if own.name == "sinusoidal":
        return functools.partial(
            sinusoidal, dim=own.dim, max_wavelength=own.max_wavelength
        )
    raise ValueError(
        f"`encoder` has positions {own.name!r}, which a stream does not support; it "
        "supports 'none', 'sinusoidal' and 'rope', and what `positions` adds to the "
        "frames."
    )


def _project(block: EncoderBlock, x: jax.Array) -> tuple[jax.Array, ...]:
    """Queries [c, N, H], keys [c, K, H] and values [c, K, H] of inputs [c, D]."""
    layer = block.attention
    h = block.attention_norm(x)
    query, key, value = layer.query(h), layer.key(h), layer.value(h)
    if layer.normalize_qk:
        assert layer.query_ln is not None and layer.key_ln is not None
        query, key = layer.query_ln(query), layer.key_ln(key)
    return query, key, value


def _complete(block: EncoderBlock, x: jax.Array, attended: jax.Array) -> jax.Array:
    """The block's output [c, D] from its inputs and what they attended to [c, N, H]."""
    x = x + block.attention.out(attended)
    return x + block.mlp(block.mlp_norm(x))


def _shapes(encoder: Encoder, dtype: DTypeLike) -> tuple[list[Any], Any]:
    """Shape and dtype of inputs, query, key, value of every layer, and of the output.

    For one frame: [1, D], [1, N, H], [1, K, H], [1, K, H]; [1, D].
    """

    def run(x: jax.Array) -> tuple[list[Any], jax.Array]:
        layers = []
        for block in encoder.blocks:
            query, key, value = _project(block, x)
            layers.append((x, query, key, value))
            x = _complete(block, x, query)
        return layers, _last_norm(encoder)(x)

    dim = _last_norm(encoder).num_features
    return jax.eval_shape(run, jax.ShapeDtypeStruct((1, dim), dtype))


def look_ahead(encoder: Encoder) -> int:
    """How many frames after its own an output depends on, Σ `right` over the layers.

    Args:
      encoder: an `attn_jax.nn.Encoder` of `truncated` attention.

    Returns:
      Number of frames.

    Raises:
      ValueError: if a block attends by something else, or the encoder has positions
        that cannot stream.
      TypeError: if it is no `Encoder`.

    >>> near = functools.partial(truncated, left=3, right=2)
    >>> look_ahead(Encoder(
    ...     4, 8, num_heads=2, mlp_dim=16, attention=near, rngs=nnx.Rngs(0)))
    8
    """
    return sum(right for _, right, _ in _windows(encoder))


def stream_init(
    encoder: Encoder, *, chunk: int = 1, dtype: DTypeLike = jnp.float32
) -> StreamState:
    """The state of `stream_step` before the first frame.

    Args:
      encoder: an `attn_jax.nn.Encoder` of `truncated` attention.
      chunk: c, frames in a chunk.
      dtype: dtype of the frames.

    Returns:
      The state; every layer takes about 2 (left + right + c) + 2 · right rows of D
      numbers.

    Raises:
      ValueError: if the encoder cannot stream, or `chunk` is below 1.
      TypeError: if it is no `Encoder`, or `chunk` is no int.

    >>> near = functools.partial(truncated, left=3, right=2)
    >>> encoder = Encoder(
    ...     1, 8, num_heads=2, mlp_dim=16, attention=near, rngs=nnx.Rngs(0))
    >>> stream_init(encoder).layers[0].key.shape
    (2, 6, 4)
    """
    chunk = _checks.check_int("chunk", chunk, 1)
    windows = _windows(encoder)
    # A multiple of the chunk, so that a chunk never wraps around.
    widest = max((left + right for left, right, _ in windows), default=0)
    size = -(-(widest + chunk) // chunk) * chunk
    layers = []
    for (_, right, _), shapes in zip(windows, _shapes(encoder, dtype)[0], strict=True):
        x, query, key, value = shapes
        layers.append(
            LayerState(
                key=jnp.zeros((key.shape[1], size, key.shape[2]), key.dtype),
                value=jnp.zeros((value.shape[1], size, value.shape[2]), value.dtype),
                key_real=jnp.zeros(size, bool),
                query=jnp.zeros((right, *query.shape[1:]), query.dtype),
                inputs=jnp.zeros((right, *x.shape[1:]), x.dtype),
                real=jnp.zeros(right, bool),
            )
        )
    return StreamState(
        tuple(layers), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), chunk
    )


def _push_rows(waiting: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The c rows that have waited longest, and those that wait on."""
    rows = jnp.concatenate([waiting, new])
    return rows[: new.shape[0]], rows[new.shape[0] :]


def _put(ring: jax.Array, rows: jax.Array, slot: jax.Array) -> jax.Array:
    """A ring buffer [K, W, H] with rows [c, K, H] at a slot."""
    return jax.lax.dynamic_update_slice_in_dim(ring, rows.transpose(1, 0, 2), slot, 1)


def _check_chunk(
    encoder: Encoder, state: StreamState, frames: jax.Array, real: jax.Array | None
) -> None:
    """Checks one chunk of frames against the state and the encoder."""
    sizes = {"c": state.chunk, "D": _last_norm(encoder).num_features}
    _checks.check_shape("frames", frames, ("c", "D"), sizes)
    _checks.check_float("frames", frames)
    if len(state.layers) != len(encoder.blocks):
        raise ValueError(
            f"`state` has {len(state.layers)} layers, but `encoder` has "
            f"{len(encoder.blocks)} blocks; stream_init(encoder) makes the state."
        )
    if real is not None:
        _checks.check_bool("real", real)
        _checks.check_shape("real", real, ("c",), sizes)


def stream_step(
    encoder: Encoder,
    state: StreamState,
    frames: jax.Array,
    real: jax.Array | None = None,
    *,
    positions: Positions | None = None,
) -> tuple[StreamState, jax.Array, jax.Array]:
    """One chunk of frames through the encoder, in time and memory O(left + right + c).

    Output i belongs to the frame that came `look_ahead(encoder)` frames before frame i
    of this chunk. It equals the encoder's output on the whole sequence, without
    dropout. After the last frame, give frames with `real` = False until the outputs of
    all frames are out: to the encoder they do not exist, as nothing does after the end
    of a sequence.

    The function is pure, and encoder and state are pytrees: `jax.jit(stream_step,
    donate_argnums=1)` updates the state in place. For a batch of streams at one pace,
    `jax.vmap` it with the axes
    `dataclasses.replace(state, layers=0, slot=None, frame=None)` of the state: a slot
    for each stream would turn the update of the ring buffers into a scatter.

    Args:
      encoder: an `attn_jax.nn.Encoder` of `truncated` attention.
      state: of all frames before; `stream_init` makes the first.
      frames: [c, D], of the dtype that `stream_init` was given.
      real: bool [c], True = a frame that exists, or None for all. A frame that does
        not exist takes up its place in the window, and nobody attends to it, as with a
        mask of the keys. Its content is not read.
      positions: maps frame numbers int32 [c], counted from 0, to a table [c, D] that
        is added to the frames, such as
        `functools.partial(attn_jax.positions.sinusoidal, dim=D)`. None adds what the
        encoder itself adds, "sinusoidal" positions or nothing. "rope" turns queries
        and keys besides; other kinds cannot stream. What is added to the frames is NaN
        from frame 2³¹ on; "rope" and no positions have no limit.

    Returns:
      The new state; the outputs [c, D], zeros where not valid; and bool [c], which of
      them belong to frames that exist. The first look_ahead(encoder) do not.

    Raises:
      ValueError: if the encoder cannot stream, or on wrong shapes.
      TypeError: if it is no `Encoder`, or on wrong dtypes.

    Reference: Yeh et al., 2019, arXiv:1910.12977, section 3.2.

    >>> near = functools.partial(truncated, left=3, right=1)
    >>> encoder = Encoder(
    ...     2, 8, num_heads=2, mlp_dim=16, attention=near, rngs=nnx.Rngs(0))
    >>> state = stream_init(encoder, chunk=4)
    >>> _, outputs, valid = jax.eval_shape(
    ...     stream_step, encoder, state, jnp.ones((4, 8)))
    >>> outputs.shape, valid.shape
    ((4, 8), (4,))
    """
    windows = _windows(encoder)
    _check_chunk(encoder, state, frames, real)
    chunk, slot = state.chunk, state.slot
    x = frames
    own = _own_positions(encoder)
    if own is not None and positions is not None:
        raise ValueError(
            "`positions` must be None, since `encoder` adds positions itself: "
            "'sinusoidal'."
        )
    positions = own if positions is None else positions
    turn = _turn(encoder)
    numbers = state.frame + jnp.arange(chunk, dtype=jnp.int32)
    if positions is not None:
        table = positions(numbers)
        _checks.check_shape(
            "positions(...)", table, ("c", "D"), {"c": chunk, "D": x.shape[1]}
        )
        # The count is over, and another frame's number must not stand for it.
        table = jnp.where(numbers[:, None] >= 0, table, jnp.nan)
        x = x + table.astype(x.dtype)
    if real is None:
        real = jnp.ones(chunk, bool)
    x = _checks.zero_masked(x, real)
    layers = []
    size = state.layers[0].key_real.shape[0] if state.layers else chunk
    # How many frames before the last of this chunk the key in each slot came, and each
    # frame of the chunk.
    slots = jnp.arange(size, dtype=jnp.int32)
    key_age = ((slot + (size + chunk - 1) - slots) % size)[None, :]
    query_age = jnp.arange(chunk - 1, -1, -1, dtype=jnp.int32)[:, None]
    for (left, right, attend), block, old in zip(
        windows, encoder.blocks, state.layers, strict=True
    ):
        layer = block.attention
        query, key, value = _project(block, x)
        if turn is not None:
            query, key = turn(query, numbers), turn(key, numbers)
        numbers = numbers - right  # of the frames that the next layer gets
        key, value = _put(old.key, key, slot), _put(old.value, value, slot)
        key_real = jax.lax.dynamic_update_slice(old.key_real, real, (slot,))
        # Those whose look-ahead is complete came `right` frames before.
        query, next_query = _push_rows(old.query, query)
        x, next_inputs = _push_rows(old.inputs, x)
        real, next_real = _push_rows(old.real, real)
        ahead = query_age + right - key_age  # by how many frames a key is ahead
        attended = attend(
            query,
            key.transpose(1, 0, 2),
            value.transpose(1, 0, 2),
            mask=(ahead >= -left) & (ahead <= right) & key_real[None, :],
            deterministic=True,
            dtype=layer.dtype,
            precision=layer.precision,
        )
        x = _complete(block, x, attended)
        layers.append(
            LayerState(key, value, key_real, next_query, next_inputs, next_real)
        )
    frame = state.frame + chunk
    # Past 2³² the count would begin anew; it goes on from −2³¹, see `_turn`.
    again = (state.frame < 0) & (frame >= 0)
    frame = jnp.where(again, frame - 2**30 - 2**30, frame)
    after = StreamState(tuple(layers), (slot + chunk) % size, frame, chunk)
    return after, _checks.zero_masked(_last_norm(encoder)(x), real), real


def stream(
    encoder: Encoder,
    frames: jax.Array,
    real: jax.Array | None = None,
    *,
    chunk: int = 1,
    positions: Positions | None = None,
) -> jax.Array:
    """A whole sequence chunk by chunk: `lax.scan` of `stream_step`, end included.

    Equal to the encoder on the whole sequence, `encoder(frames[None])[0]`. It shows
    what streaming is equal to, and measures it. For a batch, `jax.vmap` it over the
    frames.

    Args:
      encoder: an `attn_jax.nn.Encoder` of `truncated` attention.
      frames: [T, D].
      real: bool [T], True = a frame that exists, or None for all.
      chunk: c, frames in a chunk; T need not be a multiple of it.
      positions: as for `stream_step`.

    Returns:
      [T, D], zeros for frames that do not exist.

    Raises:
      ValueError: if the encoder cannot stream, or on wrong shapes.
      TypeError: if it is no `Encoder`, or on wrong dtypes.

    Reference: Yeh et al., 2019, arXiv:1910.12977, section 3.2.

    >>> near = functools.partial(truncated, left=3, right=1)
    >>> encoder = Encoder(
    ...     2, 8, num_heads=2, mlp_dim=16, attention=near, rngs=nnx.Rngs(0))
    >>> by_two = functools.partial(stream, chunk=2)
    >>> jax.eval_shape(by_two, encoder, jnp.ones((5, 8))).shape
    (5, 8)
    """
    state = stream_init(encoder, chunk=chunk, dtype=frames.dtype)
    _checks.check_shape(
        "frames", frames, ("T", "D"), {"D": _last_norm(encoder).num_features}
    )
    length, dim = frames.shape
    if real is None:
        real = jnp.ones(length, bool)
    _checks.check_bool("real", real)
    _checks.check_shape("real", real, ("T",), {"T": length})
    delay = look_ahead(encoder)
    steps = -(-(length + delay) // chunk)
    more = steps * chunk - length

    def step(
        state: StreamState, now: tuple[jax.Array, jax.Array]
    ) -> tuple[StreamState, jax.Array]:
        state, outputs, _ = stream_step(encoder, state, *now, positions=positions)
        return state, outputs

    chunks = (
        jnp.pad(frames, ((0, more), (0, 0))).reshape(steps, chunk, dim),
        jnp.pad(real, (0, more)).reshape(steps, chunk),
    )
    state = _checks.varying(state, chunks, jax.tree.leaves(nnx.state(encoder)))
    _, outputs = jax.lax.scan(step, state, chunks)
    return outputs.reshape(steps * chunk, dim)[delay : delay + length]


@functools.partial(
    jax.jit, static_argnames=("structure", "positions"), donate_argnums=2
)
def _step(
    structure: Any,
    leaves: list[jax.Array],
    state: StreamState,
    frames: jax.Array,
    real: jax.Array,
    positions: Positions | None,
) -> tuple[StreamState, jax.Array]:
    """`stream_step` that updates the state in place, compiled once per chunk size."""
    encoder = jax.tree.unflatten(structure, leaves)
    return stream_step(encoder, state, frames, real, positions=positions)[:2]


class Streamer:
    """Takes frames as they come and gives the outputs that are known by then.

    The step is compiled once for each chunk size, shared by all streamers of encoders
    of one structure. All frames of one stream but the last chunk are computed in
    chunks of exactly `chunk` frames: a larger chunk costs less per frame, and holds
    frames back until it is full.

    Args:
      encoder: an `attn_jax.nn.Encoder` of `truncated` attention. Its parameters
        are taken as they are now.
      chunk: c, frames in a chunk.
      positions: as for `stream_step`; hashable.
      dtype: dtype of the frames.

    Attributes:
      look_ahead: by how many frames the outputs come after the frames.

    Raises:
      ValueError: if the encoder cannot stream, or `chunk` is below 1.
      TypeError: if it is no `Encoder`, or `chunk` is no int.

    Reference: Yeh et al., 2019, arXiv:1910.12977, section 3.2.

    >>> near = functools.partial(truncated, left=3, right=1)
    >>> encoder = Encoder(
    ...     2, 8, num_heads=2, mlp_dim=16, attention=near, rngs=nnx.Rngs(0))
    >>> streamer = Streamer(encoder, chunk=4)
    >>> streamer.look_ahead, streamer.push(np.ones((3, 8), np.float32)).shape
    (2, (0, 8))
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        chunk: int = 1,
        positions: Positions | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.look_ahead = look_ahead(encoder)
        self._encoder = encoder
        self._chunk = _checks.check_int("chunk", chunk, 1)
        self._positions = positions
        self._dtype = np.dtype(dtype)
        self._leaves, self._structure = jax.tree.flatten(encoder)
        self._dim = _last_norm(encoder).num_features
        self._empty = np.zeros((0, self._dim), _shapes(encoder, dtype)[1].dtype)
        self._all = jnp.ones(self._chunk, bool)
        self._reset()

    def _reset(self) -> None:
        """Forgets all frames."""
        self._state = stream_init(self._encoder, chunk=self._chunk, dtype=self._dtype)
        self._rest = np.zeros((0, self._dim), self._dtype)
        self._warm = self.look_ahead  # outputs of the warm-up that are still to come

    def _run(self, frames: np.ndarray, real: jax.Array | np.ndarray) -> jax.Array:
        """One step, on exactly one chunk."""
        self._state, outputs = _step(
            self._structure, self._leaves, self._state, frames, real, self._positions
        )
        return outputs

    def _known(self, outputs: list[jax.Array]) -> np.ndarray:
        """The rows of the steps' outputs that are not of the warm-up."""
        if not outputs:
            return self._empty
        rows = np.concatenate([np.asarray(rows) for rows in outputs])
        skip = min(len(rows), self._warm)
        self._warm -= skip
        return rows[skip:]

    def push(self, frames: jax.typing.ArrayLike) -> np.ndarray:
        """Takes the next frames.

        Args:
          frames: [n, D], any number of them.

        Returns:
          [m, D], the outputs that have become known, in the order of the frames.

        Raises:
          ValueError: on a wrong shape.
          TypeError: on another dtype than that of the stream.
        """
        frames = np.asarray(frames)
        if frames.ndim != 2 or frames.shape[1] != self._dim:
            raise ValueError(
                f"`frames` must have shape [n, D] with D={self._dim}, but has shape "
                f"{frames.shape}."
            )
        if frames.dtype != self._dtype:
            raise TypeError(
                f"`frames` must have dtype {self._dtype}, as the Streamer was told, "
                f"but has {frames.dtype}."
            )
        frames = np.concatenate([self._rest, frames])
        whole = len(frames) - len(frames) % self._chunk
        self._rest = frames[whole:]
        begins = range(0, whole, self._chunk)
        return self._known(
            [self._run(frames[b : b + self._chunk], self._all) for b in begins]
        )

    def finish(self) -> np.ndarray:
        """Ends the stream: nothing comes after the frames so far.

        Returns:
          [m, D], the outputs that were not known yet. The next `push` begins a new
          stream.
        """
        outputs = []
        wanted = len(self._rest) + self.look_ahead - self._warm
        steps = range(0, wanted and len(self._rest) + self.look_ahead, self._chunk)
        for begin in steps:
            rows = self._rest[begin : begin + self._chunk]
            real = np.arange(self._chunk) < len(rows)
            rows = np.pad(rows, ((0, self._chunk - len(rows)), (0, 0)))
            outputs.append(self._run(rows, real))
        known = self._known(outputs)[:wanted]
        self._reset()
        return known
