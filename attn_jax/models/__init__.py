"""Models that two or more experiments use, by name and size.

`build("vit", "mu", ...)` makes a model; `attn_jax.tools.cost.model_cost` counts what it
costs, so that sizes of different families can be compared by a count and not by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from attn_jax.models.encoder_decoder import EncoderDecoder, encoder_decoder_functions
from attn_jax.models.hybrid import Hybrid
from attn_jax.models.labeller import BODIES, Labeller
from attn_jax.models.masked_lm import MaskedLM, choose_hidden, hide
from attn_jax.models.mlp import Mlp
from attn_jax.models.resnet import GroupNorm, ResidualBlock, ResNet, StdConv
from attn_jax.models.vit import ViT, default_patch, patchify
from attn_jax.variant import Variant

__all__ = [
    "BODIES",
    "MODELS",
    "SIZES",
    "EncoderDecoder",
    "GroupNorm",
    "Hybrid",
    "Labeller",
    "MaskedLM",
    "Mlp",
    "ResNet",
    "ResidualBlock",
    "StdConv",
    "ViT",
    "build",
    "choose_hidden",
    "default_patch",
    "encoder_decoder_functions",
    "hide",
    "patchify",
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
# 1.34 times those of the cheapest for `mu`, 1.15 times for the others: `sizes_table` of
# `attn_jax.tools.cost`.
# `ti`, `s` and `b` of ViT are the published ones; `s` of the ResNet is ResNet-50, `b`
# is ResNet-50 of double width. `mu_item` and `mu_grid` have the FLOPs and parameters of
# the ViT `mu` with patch 10 at 30 x 30 pixels; the convolutions of the one see 11
# pixels, those of the other all. `mu_cell` is `mu_item` without the group norms,
# through which an output depends on the whole image: it sees its 11 pixels, no more.
# Only `mu` of the MLP is near: it uses each parameter once, so it would need as many as
# it has multiplications.
SIZES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "vit": {size: dict(patch=4, **kw) for size, kw in _ENCODER.items()}
    | {"mu": dict(patch=7, positions="learned", **_ENCODER["mu"])},
    "resnet": {
        "mu": dict(widths=(20, 40, 80), depths=(1, 1, 1), stem_stride=2),
        "mu_item": dict(
            widths=(128,), depths=(5,), kernel=1, stem_kernel=11, stem_stride=10
        ),
        "mu_cell": dict(
            widths=(128,),
            depths=(5,),
            kernel=1,
            norm="channel",
            stem_kernel=11,
            stem_stride=10,
        ),
        "mu_grid": dict(
            widths=(28, 56, 96), depths=(1, 1, 1), stem_kernel=5, stem_stride=5
        ),
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

    Returns:
      A module that maps images [B, height, width, C] to logits [B, classes].

    Raises:
      ValueError: for an unknown family or size, or for an attention variant,
        dropout or override that the family cannot honour.

    >>> model = build("vit", "mu", image_shape=(28, 28, 1), num_classes=10,
    ...               rngs=nnx.Rngs(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    204938
    """
    if model not in MODELS:
        raise ValueError(
            f"`model` must be one of {', '.join(MODELS)}, but is {model!r}."
        )
    if size not in SIZES[model]:
        raise ValueError(
            f"`size` must be one of {', '.join(SIZES[model])} for model {model!r}, "
            f"but is {size!r}."
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
