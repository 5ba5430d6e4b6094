"""Models that two or more experiments use, by name and size.

`build("vit", "mu", ...)` makes a model; `cost(model, ...)` counts its parameters and
the floating-point operations of its forward pass, so that sizes of different families
can be compared by a count and not by name.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.models.hybrid import Hybrid
from attn_jax.models.labeller import BODIES, Labeller, labeller_cost
from attn_jax.models.mlp import Mlp
from attn_jax.models.resnet import GroupNorm, ResidualBlock, ResNet, StdConv
from attn_jax.models.vit import ViT, default_patch, patchify
from attn_jax.tools.cost import count_flops
from attn_jax.variants import Variant

__all__ = [
    "BODIES",
    "MODELS",
    "SIZES",
    "Cost",
    "GroupNorm",
    "Hybrid",
    "Labeller",
    "Mlp",
    "ResNet",
    "ResidualBlock",
    "StdConv",
    "ViT",
    "build",
    "cost",
    "default_patch",
    "labeller_cost",
    "patchify",
    "sizes_table",
]

MODELS: Mapping[str, Callable[..., nnx.Module]] = {
    "vit": ViT,
    "resnet": ResNet,
    "hybrid": Hybrid,
    "mlp": Mlp,
}

_ENCODER = {
    "mu": dict(dim=64, depth=4, num_heads=4, mlp_dim=256),
    "ti": dict(dim=192, depth=12, num_heads=3, mlp_dim=768),
    "s": dict(dim=384, depth=12, num_heads=6, mlp_dim=1536),
    "b": dict(dim=768, depth=12, num_heads=12, mlp_dim=3072),
}

# Within a size, the families' forward FLOPs are near one another: at 28 x 28 pixels
# with patch 7 for `mu`, at 32 x 32 with patch 4 for the others. The dearest has at most
# 1.34 times those of the cheapest for `mu`, 1.15 times for the others (`sizes_table`).
# `ti`, `s` and `b` of ViT are the published ones; `s` of the ResNet is ResNet-50, `b`
# is ResNet-50 of double width. `mu_local` costs what `mu` of the ResNet does, but sees
# 11 pixels where `mu` sees 47. Only `mu` of the MLP is near: it uses each parameter
# once, so it would need as many as it has multiplications.
SIZES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "vit": {size: dict(patch=4, **kw) for size, kw in _ENCODER.items()}
    | {"mu": dict(patch=7, positions="learned", **_ENCODER["mu"])},
    "resnet": {
        "mu": dict(widths=(20, 40, 80), depths=(1, 1, 1), stem_stride=2),
        "mu_local": dict(widths=(34,), depths=(1,), stem_stride=2),
        "ti": dict(widths=(52, 104, 208, 416), depths=(2, 2, 2, 2)),
        "s": dict(widths=(64, 128, 256, 512), depths=(3, 4, 6, 3), bottleneck=True),
        "b": dict(widths=(128, 256, 512, 1024), depths=(3, 4, 6, 3), bottleneck=True),
    },
    "hybrid": {
        "mu": dict(stem_widths=(16, 32, 64), **(_ENCODER["mu"] | dict(depth=3))),
        "ti": dict(stem_widths=(48, 96), **(_ENCODER["ti"] | dict(depth=11))),
        "s": dict(stem_widths=(96, 192), **(_ENCODER["s"] | dict(depth=11))),
        "b": dict(stem_widths=(192, 384), **(_ENCODER["b"] | dict(depth=11))),
    },
    "mlp": {
        "mu": dict(hidden_dims=(1536, 1024, 512)),
        "ti": dict(hidden_dims=(4096,) * 4),
        "s": dict(hidden_dims=(8192,) * 4),
        "b": dict(hidden_dims=(16384,) * 4),
    },
}


def build(
    model: str,
    size: str,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    attention: str | Callable | Variant | None = None,
    overrides: Mapping[str, Any] | None = None,
    dropout_rate: float = 0.0,
    dtype: jax.typing.DTypeLike | None = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Makes a model of a named family and size.

    Args:
      model: a key of `MODELS`.
      size: a key of ``SIZES[model]``.
      image_shape: (height, width, channels).
      num_classes: number of labels.
      attention: an attention variant, for the families that have attention
        ("vit", "hybrid"); None is plain dot-product attention.
      overrides: constructor arguments that replace those of the size, such as
        ``{"patch": 4}``.
      dropout_rate: for the families that have dropout (all but "resnet").
      dtype: dtype of the computation; parameters stay float32.
      rngs: source of initialisation randomness.

    Returns:
      A module that maps images [B, height, width, C] to logits [B, classes].

    Raises:
      ValueError: for an unknown family or size, or for an attention variant,
        dropout or override that the family cannot honour.

    >>> from flax import nnx
    >>> model = build("vit", "mu", image_shape=(28, 28, 1), num_classes=10,
    ...               rngs=nnx.Rngs(0))
    >>> cost(model, (28, 28, 1)).params
    204938
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}.")
    if size not in SIZES[model]:
        raise ValueError(
            f"size must be one of {', '.join(SIZES[model])} for model {model!r}, got "
            f"{size!r}."
        )
    kwargs = dict(SIZES[model][size])
    if attention is not None:
        if model not in ("vit", "hybrid"):
            raise ValueError(
                f"attention={attention!r} was given, but model {model!r} has no "
                "attention: use 'vit' or 'hybrid', or leave it out."
            )
        kwargs["attention"] = attention
    if dropout_rate:
        if model == "resnet":
            raise ValueError(
                f"dropout_rate={dropout_rate} was given, but 'resnet' has no dropout: "
                "use 0."
            )
        kwargs["dropout_rate"] = dropout_rate
    make = MODELS[model]
    # Of the class itself: that of its metaclass is (*args, **kwargs).
    names = inspect.signature(vars(make)["__init__"]).parameters
    for name, value in (overrides or {}).items():
        if name not in names or name in ("rngs", "dtype", "image_shape"):
            raise ValueError(
                f"overrides: model {model!r} has no argument {name!r}; it has "
                f"{', '.join(sorted(SIZES[model][size]))}."
            )
        kwargs[name] = value
    return make(image_shape, num_classes, dtype=dtype, rngs=rngs, **kwargs)


def sizes_table() -> list[dict[str, Any]]:
    """What every named size costs, at the image size that sizes were chosen for.

    Returns:
      One dictionary a size: family, size, image_shape, params, flops.
    """
    rows = []
    for model, sizes in SIZES.items():
        for size in sizes:
            shape = (28, 28, 1) if size.startswith("mu") else (32, 32, 3)
            make = functools.partial(
                build, model, size, image_shape=shape, num_classes=10
            )
            abstract = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
            row = dict(model=model, size=size, image_shape=shape)
            rows.append(row | cost(abstract, shape)._asdict())
    return rows


class Cost(NamedTuple):
    """What a model costs: parameters, and forward FLOPs of one image."""

    params: int
    flops: int


def cost(model: nnx.Module, image_shape: tuple[int, int, int]) -> Cost:
    """Counts parameters, and the FLOPs of the forward pass of one image.

    FLOPs are those of `attn_jax.tools.cost.count_flops`: a multiply-add is two, the
    body of a loop counts as often as it runs, and normalisation, softmax and the
    padding of convolutions are included.

    Args:
      model: maps images [B, height, width, C] to logits; its arrays may be abstract
        (`nnx.eval_shape`), nothing is computed.
      image_shape: (height, width, channels).

    Returns:
      `Cost(params, flops)`.
    """
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, rest = states

    def forward(params: Any, rest: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest)(images)

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    flops = count_flops(forward, params, rest, images).total
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    return Cost(count, flops)
