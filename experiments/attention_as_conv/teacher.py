"""A convolution to imitate: do heads that start anywhere come to stand on its places?

The teacher is a random k × k convolution of white noise, its border repeated; the
student is one layer of attention by quadratic encoding, `PositionalAttention`, whose
heads start anywhere. The layer can be the teacher exactly (Cordonnier et al.,
arXiv:1911.03584, theorem 1), one head on each place of the kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax.attention.convolution import convolution_as_attention
from experiments.attention_as_conv.cells import split
from experiments.attention_as_conv.grid import grid_measures, offsets_found
from experiments.attention_as_conv.model import PositionalAttention
from experiments.core.cell import Cell, Count
from experiments.core.loop import Program, Task

# Pictures of noise that a cell is scored on, and the keys that they are drawn by.
_SCORED = 256
_KEYS = {"tune": 10_001, "final": 10_002}

# Sharpness of the heads of the theorem.
_ALPHA = 25.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherCell(Cell):
    """One (kernel, heads, decay, seed, learning rate).

    Attributes:
      kernel: side of the kernel.
      num_heads: heads of the student.
      channels: of the noise, and width of the student.
      side: rows and columns of the noise.
      batch_size: pictures a step.
    """

    kernel: Count
    num_heads: Count
    channels: Count
    side: Count
    batch_size: Count

    def traits(self) -> Iterator[str]:
        yield f"{self.num_heads} heads decay={self.weight_decay:g}"


def kernel_of(side: int, channels: int, seed: int) -> jax.Array:
    """The teacher's kernel [side, side, channels, channels], of variance one out.

    >>> kernel_of(3, 4, seed=0).shape
    (3, 3, 4, 4)
    """
    rng = jax.random.key(10_000 + seed)
    shape = (side, side, channels, channels)
    return jax.random.normal(rng, shape) / float(np.sqrt(side * side * channels))


def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves [B, h, w, C] with [k, k, C, C], the border repeated; [B, h, w, C].

    >>> convolve(jnp.ones((1, 2, 2, 1)), jnp.ones((3, 3, 1, 1)))[0, :, :, 0].tolist()
    [[9.0, 9.0], [9.0, 9.0]]
    """
    reach = kernel.shape[0] // 2
    pad = ((0, 0), (reach, reach), (reach, reach), (0, 0))
    return jax.lax.conv_general_dilated(
        jnp.pad(images, pad, mode="edge"),
        kernel,
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )


def student(side: int, channels: int, num_heads: int, seed: int) -> PositionalAttention:
    """The layer that learns, its heads anywhere."""
    return PositionalAttention(
        (side, side), channels, num_heads=num_heads, rngs=nnx.Rngs(seed)
    )


@functools.lru_cache(maxsize=8)
def _program(side: int, channels: int, num_heads: int, batch_size: int) -> Program:
    def build(seed: int) -> PositionalAttention:
        return student(side, channels, num_heads, seed)

    apply, _ = split(build(0))

    def share(params: Any, kernel: jax.Array, rng: jax.Array, count: int) -> jax.Array:
        """Squared error as a share of what predicting the mean, 0, would leave."""
        images = jax.random.normal(rng, (count, side, side, channels))
        right = convolve(images, kernel).reshape(count, side * side, channels)
        found = apply(params, images.reshape(right.shape))
        return jnp.mean(jnp.square(found - right)) / jnp.mean(jnp.square(right))

    def loss(
        params: Any, kernel: jax.Array, rng: jax.Array, hyper: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return share(params, kernel, rng, batch_size), {}

    score = jax.jit(lambda params, kernel, rng: share(params, kernel, rng, _SCORED))
    return Program(
        lambda seed: split(build(seed))[1], loss, {"apply": apply, "score": score}
    )


class _Same:
    """The same batch at every step."""

    def __init__(self, batch: Any):
        self._batch = batch

    def __getitem__(self, step: int) -> Any:
        return self._batch


class TeacherTask(Task):
    """Imitates a convolution; the batch is its kernel, noise comes from the key."""

    splits = False

    def program(self, cell: TeacherCell) -> Program:
        return _program(cell.side, cell.channels, cell.num_heads, cell.batch_size)

    def _kernel(self, cell: TeacherCell) -> np.ndarray:
        return np.asarray(kernel_of(cell.kernel, cell.channels, cell.seed))

    def batches(self, cell: TeacherCell) -> _Same:
        """The kernel, at every step."""
        return _Same(self._kernel(cell))

    def costs(self, cell: TeacherCell) -> dict[str, Any]:
        """Number of parameters."""
        params = jax.eval_shape(lambda: self.program(cell).initial_params(0))
        return {"params": sum(leaf.size for leaf in jax.tree.leaves(params))}

    def observe(self, cell: TeacherCell, params: Any) -> dict[str, Any]:
        """How many places are found; of the final cell of seed 0 also where heads are.

        A head looks as a Gaussian of precision spread² in both directions.
        """
        layer = self.program(cell).more["apply"].merge(params)
        centres, precisions = layer.centres(), np.asarray(layer.precisions())
        found: dict[str, Any] = {
            "found": offsets_found(centres, precisions, cell.kernel),
            "distance": float(
                grid_measures(centres[None], precisions[None])["distance"][0]
            ),
        }
        if cell.phase == "final" and cell.seed == 0:
            spreads = np.sqrt(precisions[:, 0, 0])
            found["centres"] = np.round(np.asarray(centres, float), 2).tolist()
            found["spreads"] = np.round(spreads.astype(float), 2).tolist()
        return found

    def score(self, cell: TeacherCell, params: Any) -> dict[str, Any]:
        """The error on noise never seen, and where heads look."""
        program = self.program(cell)
        rng = jax.random.fold_in(jax.random.key(_KEYS[cell.phase]), cell.seed)
        error = float(program.more["score"](params, self._kernel(cell), rng))
        if cell.phase == "tune":
            return {"val_loss": error}
        layer = program.more["apply"].merge(params)
        centres, precisions = layer.centres(), np.asarray(layer.precisions())
        where = grid_measures(centres[None], precisions[None])
        return {
            "test_loss": error,
            "offsets": offsets_found(centres, precisions, cell.kernel)
            / float(cell.kernel**2),
            "distance": float(where["distance"][0]),
            "one_token": float(where["one_token"][0]),
            "in_kernel": float(
                np.mean(
                    np.abs(np.round(np.asarray(centres))).max(-1) <= cell.kernel // 2
                )
            ),
        }


# --- Floors ------------------------------------------------------------------------


def floors(cell: TeacherCell, seeds: int) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """What needs no training, for every seed of a cell, by name.

    "frozen": heads stay where they start, and their value maps are the best there are.
    "theorem": heads on the places of the kernel, with its matrices.
    """
    methods = {"frozen": _frozen}
    if cell.num_heads == cell.kernel**2:
        methods["theorem"] = _theorem
    made_of = f"heads={cell.num_heads} channels={cell.channels} side={cell.side}"
    return {
        f"{name} {made_of} seed={seed}": functools.partial(
            _named, name, method, dataclasses.replace(cell, seed=seed)
        )
        for name, method in methods.items()
        for seed in range(seeds)
    }


def _named(
    name: str, method: Callable[[TeacherCell], float], cell: TeacherCell
) -> dict[str, Any]:
    return {
        "baseline": name,
        "heads": cell.num_heads,
        "of_seed": cell.seed,
        "test_loss": method(cell),
    }


def _frozen(cell: TeacherCell) -> float:
    """Share of the kernel outside of what the heads' weights span, far from borders.

    Of white noise the expected error is Σ_δ ‖Σ_h w_h(δ) W_h − K(δ)‖², least squares.
    """
    reach = 12
    layer = student(2 * reach + 1, cell.channels, cell.num_heads, cell.seed)
    middle = (2 * reach + 1) ** 2 // 2
    weights = np.asarray(layer.weights()[:, middle], np.float64).T
    kernel = np.asarray(kernel_of(cell.kernel, cell.channels, cell.seed), np.float64)
    pad = reach - cell.kernel // 2
    wanted = np.pad(kernel, ((pad, pad), (pad, pad), (0, 0), (0, 0)))
    wanted = wanted.reshape(len(weights), -1)
    best = np.linalg.lstsq(weights, wanted, rcond=None)[0]
    return float(np.sum((weights @ best - wanted) ** 2) / np.sum(wanted**2))


def _theorem(cell: TeacherCell) -> float:
    """The error of the layer that the theorem makes of the kernel."""
    kernel = kernel_of(cell.kernel, cell.channels, cell.seed)
    made = convolution_as_attention(kernel, alpha=_ALPHA)
    layer = student(cell.side, cell.channels, cell.num_heads, cell.seed)
    layer.value[...] = kernel.reshape(layer.value.shape)
    layer.centre[...] = made["centre"].reshape(-1)
    layer.spread[...] = jnp.sqrt(2.0 * made["alpha"].reshape(-1))
    return TeacherTask().score(
        dataclasses.replace(cell, phase="final"), split(layer)[1]
    )["test_loss"]
