"""Cells of image models that are all attention: models, training, scores, maps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax import models
from attn_jax.tools import cost
from experiments.attention_as_conv.model import AttentionImage
from experiments.core.cell import Count
from experiments.core.loop import Program
from experiments.tasks.images import (
    Augment,
    ImageCell,
    ImageTask,
    image_program,
    normalize,
)

# Test images that attention maps are averaged over.
MAP_IMAGES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvCell(ImageCell):
    """One (model, start, N, seed, hyper-parameters).

    Attributes:
      model: an encoding of `PositionalAttention`, or "resnet".
      start, patch, dim, depth, mlp_dim, num_heads: of `AttentionImage`, else None.
      alpha: of ``start="convolution"``, else None.
      key_dim: of "relative_content", else None.
      widths, stem_stride: of the "resnet", else None.
    """

    batch_size: Count = 32
    flip: bool = True
    start: str | None = None
    patch: int | None = None
    dim: int | None = None
    depth: int | None = None
    mlp_dim: int | None = None
    num_heads: int | None = None
    alpha: float | None = None
    key_dim: int | None = None
    widths: tuple[int, ...] | None = None
    stem_stride: int | None = None

    def traits(self) -> Iterator[Any]:
        if self.start:
            yield self.start
        yield f"n={self.n}"


def build_model(
    cell: ConvCell,
    image_shape: tuple[int, int, int],
    num_classes: int,
    seed: int | None = None,
    **more: Any,
) -> nnx.Module:
    """The model of a cell with its initial parameters."""
    dtype = jnp.dtype(cell.dtype) if cell.dtype != "float32" else None
    rngs = nnx.Rngs(cell.seed if seed is None else seed)
    if cell.model == "resnet":
        assert cell.widths is not None
        return models.build(
            "resnet",
            "mu",
            image_shape=image_shape,
            num_classes=num_classes,
            overrides=dict(
                widths=cell.widths,
                depths=(1,) * len(cell.widths),
                stem_stride=cell.stem_stride,
            ),
            dtype=dtype,
            rngs=rngs,
        )
    names = "patch dim depth mlp_dim num_heads start".split()
    options: dict[str, Any] = {name: getattr(cell, name) for name in names}
    if cell.start == "convolution":
        options["alpha"] = cell.alpha
    if cell.key_dim is not None:
        options["key_dim"] = cell.key_dim
    return AttentionImage(
        image_shape,
        num_classes,
        encoding=cell.model,  # type: ignore[arg-type]
        dtype=dtype,
        rngs=rngs,
        **options,
        **more,
    )


def split(model: nnx.Module) -> tuple[Callable[..., Any], Any]:
    """``apply(params, images)`` and parameters; ``apply.merge`` gives the module."""
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    variables, rest = states
    treedef = jax.tree.structure(variables)

    def merge(params: Any) -> Any:
        params = jax.tree.unflatten(treedef, jax.tree.leaves(params))
        return nnx.merge(graphdef, params, rest)

    def apply(params: Any, images: Any, rng: None = None) -> Any:
        return merge(params)(images)

    apply.merge = merge  # type: ignore[attr-defined]
    return apply, nnx.to_pure_dict(variables)


# What shapes a program: cells that agree in it share the compiled one. Where heads
# start is not in it.
_SHAPE = (
    "model patch dim depth mlp_dim num_heads key_dim widths stem_stride flip crop dtype"
).split()


def _example(shape: tuple[Any, ...]) -> ConvCell:
    """A cell whose model has a shape."""
    traits = dict(zip(_SHAPE, shape, strict=True))
    start = None if traits["model"] == "resnet" else "random"
    return ConvCell(task="", n=1, seed=0, updates=1, start=start, **traits)


@functools.lru_cache(maxsize=32)
def program_of(
    shape: tuple[Any, ...], image_shape: tuple[int, int, int], num_classes: int
) -> Program:
    """What cells of a shape compute."""
    cell = _example(shape)

    def build(seed: int) -> nnx.Module:
        return build_model(cell, image_shape, num_classes, seed)

    choice = Augment(flip=cell.flip, crop=cell.crop, alone=True)
    return image_program(build, split, num_classes, choice)


@functools.lru_cache(maxsize=16)
def model_cost(
    shape: tuple[Any, ...], image_shape: tuple[int, int, int], num_classes: int
) -> cost.Cost:
    """Parameters and FLOPs of a model's shape, see `attn_jax.tools.cost.model_cost`."""
    cell = dataclasses.replace(_example(shape), dtype="float32")
    model = nnx.eval_shape(lambda: build_model(cell, image_shape, num_classes))
    return cost.model_cost(model, image_shape)


def flops_of(
    config: Mapping[str, Any], image_shape: tuple[int, int, int], num_classes: int
) -> float:
    """FLOPs of one image in the model of a stored config."""
    values = (config[name] for name in _SHAPE)
    shape = tuple(tuple(v) if isinstance(v, list) else v for v in values)
    return model_cost(shape, image_shape, num_classes).flops


class ConvTask(ImageTask):
    """Classifies images, and tells where heads look."""

    eval_batch = 500
    train_eval = 1_000

    def validation_size(self, cell: ConvCell) -> tuple[float, int]:
        return 0.2, 2_000

    def _shape(self, cell: ConvCell) -> tuple[Any, ...]:
        return tuple(getattr(cell, name) for name in _SHAPE)

    def program(self, cell: ConvCell) -> Program:
        dataset = self.dataset
        return program_of(self._shape(cell), dataset.image_shape, dataset.num_classes)

    def initial_params(self, cell: ConvCell) -> Any:
        dataset = self.dataset
        return split(build_model(cell, dataset.image_shape, dataset.num_classes))[1]

    def costs(self, cell: ConvCell) -> dict[str, Any]:
        """Parameters, and FLOPs of an image's forward pass."""
        dataset = self.dataset
        cost = model_cost(self._shape(cell), dataset.image_shape, dataset.num_classes)
        return dict(params=cost.params, flops=cost.flops, data_sha256=dataset.sha256)

    def observe(self, cell: ConvCell, params: Any) -> dict[str, Any]:
        """Where the heads look and how widely, of encodings that have centres."""
        if cell.model not in ("quadratic", "gaussian"):
            return {}
        model = self.program(cell).more["apply"].merge(params)
        return dict(
            centres=_rounded(model.centres()), precisions=_rounded(model.precisions())
        )

    def score(self, cell: Any, params: Any) -> dict[str, Any]:
        """Accuracy and loss; for seed 0 also attention maps of the middle token."""
        found = super().score(cell, params)
        if cell.phase == "final" and cell.seed == 0 and cell.model != "resnet":
            found |= self._maps(cell, params)
        return found

    def _maps(self, cell: ConvCell, params: Any) -> dict[str, Any]:
        """Attention of the middle token, [layers][heads][rows][columns].

        With content it is the mean over images, and "content_share" tells how far an
        image's own map is from it: half the summed difference, in [0, 1], averaged.
        """
        model = self.program(cell).more["apply"].merge(params)
        rows, columns = model.grid
        query = rows // 2, columns // 2
        if cell.model != "relative_content":
            return dict(maps=_rounded(model.attention_maps(query), 4))
        images = normalize(self.dataset.test_images[:MAP_IMAGES], self.hyper(cell))
        maps = np.asarray(model.attention_maps(query, images))
        mean = maps.mean(axis=0)
        apart = 0.5 * np.abs(maps - mean).sum(axis=(-2, -1))
        return dict(maps=_rounded(mean, 4), content_share=float(apart.mean()))


def _rounded(values: Any, digits: int = 3) -> list[Any]:
    """Nested lists of numbers that stay short as text."""
    return np.round(np.asarray(values, np.float64), digits).tolist()
