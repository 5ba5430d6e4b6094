"""Attention variants as pure JAX functions, and the layers made of them.

An attention variant is one pure function on one head of one example; `multi_head`
maps it over heads and batch, and `as_attention_fn` puts it into Flax's layers:

>>> import jax.numpy as jnp
>>> import attn_jax
>>> x = jnp.ones((2, 5, 4, 8))  # [B, T, N, H]
>>> attn_jax.multi_head(attn_jax.attention.linear)(x, x, x, is_causal=True).shape
(2, 5, 4, 8)

The rest stands in namespaces: functions of one head in `attn_jax.attention`, layers in
`attn_jax.nn`, and `generation`, `inputs`, `masks`, `models`, `positions`, `testing`.
What needs Flax is imported when it is first used, so that `import attn_jax` costs
little more than `import jax`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attn_jax import attention, generation, masks
from attn_jax.attention import dot_product
from attn_jax.exact import dot_product_attention
from attn_jax.generation import (
    beam_search,
    generate,
    generate_uncached,
    sample_symbols,
)
from attn_jax.multihead import (
    multi_head,
    multi_head_init,
    multi_head_state,
    multi_head_step,
    multi_head_update,
)
from attn_jax.variant import CAPABILITIES, Variant, require, resolve, variants_with
from attn_jax.zoo import VARIANTS

if TYPE_CHECKING:
    from attn_jax import inputs, models, nn, positions, testing
    from attn_jax.nn import as_attention_fn, as_linen_attention_fn

__version__ = "0.1.0"

# Where each name is that is imported when it is first used.
_LAZY = {
    **dict.fromkeys(("inputs", "models", "nn", "positions", "testing"), ""),
    **dict.fromkeys(("as_attention_fn", "as_linen_attention_fn"), "nn"),
}

__all__ = [
    "CAPABILITIES",
    "VARIANTS",
    "Variant",
    "__version__",
    "as_attention_fn",
    "as_linen_attention_fn",
    "attention",
    "beam_search",
    "dot_product",
    "dot_product_attention",
    "generate",
    "generate_uncached",
    "generation",
    "inputs",
    "masks",
    "models",
    "multi_head",
    "multi_head_init",
    "multi_head_state",
    "multi_head_step",
    "multi_head_update",
    "nn",
    "positions",
    "require",
    "resolve",
    "sample_symbols",
    "testing",
    "variants_with",
]


def __getattr__(name: str) -> Any:
    """Import what needs Flax when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _LAZY[name]
    if home:
        return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    """All public names, also those not imported yet."""
    return sorted({*globals(), *__all__})
