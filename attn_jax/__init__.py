"""Attention variants as pure JAX functions, and the layers made of them.

An attention variant is one pure function on one head of one example; `multi_head`
maps it over heads and batch, and `as_attention_fn` puts it into Flax's layers:

>>> import jax.numpy as jnp
>>> import attn_jax
>>> x = jnp.ones((2, 5, 4, 8))  # [B, T, N, H]
>>> attn_jax.multi_head(attn_jax.dot_product)(x, x, x, is_causal=True).shape
(2, 5, 4, 8)

What needs Flax (`layers`, `positions`) is imported when it is first used, so that
`import attn_jax` costs little more than `import jax`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attn_jax import masks
from attn_jax.attention.blockwise import blockwise
from attn_jax.attention.local import truncated
from attn_jax.attention.softmax import (
    NORMALIZERS,
    additive,
    additive_concat,
    additive_concat_params,
    additive_concat_weights,
    additive_init,
    additive_weights,
    dot_product,
    dot_product_weights,
    relu_attention,
    sigmoid_attention,
)
from attn_jax.multihead import dot_product_attention, multi_head, multi_head_init
from attn_jax.variants import (
    CAPABILITIES,
    VARIANTS,
    Variant,
    require,
    resolve,
    variants_with,
)

__version__ = "0.1.0"

__all__ = [
    "CAPABILITIES",
    "NORMALIZERS",
    "VARIANTS",
    "AttentionFn",
    "LearnedPositions",
    "LinenAttentionFn",
    "ModuleAttentionFn",
    "Variant",
    "__version__",
    "additive",
    "additive_concat",
    "additive_concat_params",
    "additive_concat_weights",
    "additive_init",
    "additive_weights",
    "as_attention_fn",
    "as_linen_attention_fn",
    "blockwise",
    "dot_product",
    "dot_product_attention",
    "dot_product_weights",
    "layers",
    "learned_init",
    "masks",
    "multi_head",
    "multi_head_init",
    "positions",
    "relu_attention",
    "require",
    "resolve",
    "sigmoid_attention",
    "sinusoidal",
    "sinusoidal_1d",
    "sinusoidal_2d",
    "truncated",
    "variants_with",
]

# The same names twice: here for type checkers and editors, below for Python, which
# imports the module that has the name when it is asked for. A test compares them.
if TYPE_CHECKING:
    from attn_jax import layers, positions
    from attn_jax.layers import (
        AttentionFn,
        LinenAttentionFn,
        ModuleAttentionFn,
        as_attention_fn,
        as_linen_attention_fn,
    )
    from attn_jax.positions import (
        LearnedPositions,
        learned_init,
        sinusoidal,
        sinusoidal_1d,
        sinusoidal_2d,
    )
else:
    _LAZY = {
        "layers": (
            "AttentionFn",
            "LinenAttentionFn",
            "ModuleAttentionFn",
            "as_attention_fn",
            "as_linen_attention_fn",
        ),
        "positions": (
            "LearnedPositions",
            "learned_init",
            "sinusoidal",
            "sinusoidal_1d",
            "sinusoidal_2d",
        ),
    }

    def __getattr__(name: str) -> Any:
        """Import what needs Flax when it is first used."""
        for module, names in _LAZY.items():
            if name == module or name in names:
                home = importlib.import_module(f"{__name__}.{module}")
                found = home if name == module else getattr(home, name)
                globals()[name] = found
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """All public names, also those not imported yet."""
    return sorted({*globals(), *__all__})
