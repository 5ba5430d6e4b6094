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
from attn_jax.attention.axial_attention import (
    axial,
)
from attn_jax.attention.blockwise_attention import (
    blockwise,
)
from attn_jax.attention.clustered_attention import (
    clustered,
    clusterformer,
    clusterformer_init,
    clusterformer_update,
    improved_clustered,
    kmeans,
)
from attn_jax.attention.convolution import (
    attention_convolution,
    convolution_as_attention,
    quadratic,
)
from attn_jax.attention.graph import (
    gat,
    gat_init,
    gatv2,
    gatv2_init,
    graph_attention,
    unique_edges,
)
from attn_jax.attention.latent import (
    isab,
    isab_init,
    luna,
    luna_init,
    perceiver,
    perceiver_init,
)
from attn_jax.attention.linear_attention import (
    FEATURE_MAPS,
    LinearState,
    causal_product,
    cosformer,
    linear,
    linear_parallel,
    linear_recurrent,
    linear_state,
    linear_step,
)
from attn_jax.attention.local import (
    block_local,
    truncated,
)
from attn_jax.attention.long_short_attention import (
    long_short,
    long_short_init,
)
from attn_jax.attention.low_rank import (
    linformer,
    linformer_init,
    memory_compressed,
    memory_compressed_init,
    nystromformer,
    nystromformer_init,
)
from attn_jax.attention.random_features import (
    orthogonal_features,
    performer,
    performer_relu,
    rfa,
    rfa_exact,
    rfa_gate,
    rfa_gate_init,
)
from attn_jax.attention.reformer_attention import (
    bucketed,
    lsh_buckets,
    reformer,
    reformer_exact,
)
from attn_jax.attention.relative import (
    relative_shift,
    shaw,
    shaw_init,
    transformer_xl,
    transformer_xl_init,
)
from attn_jax.attention.routing_attention import (
    routing,
    routing_exact,
    routing_init,
    routing_update,
)
from attn_jax.attention.sinkhorn_attention import (
    sinkhorn,
    sinkhorn_init,
    sinkhorn_normalize,
)
from attn_jax.attention.softmax import (
    NORMALIZERS,
    additive,
    additive_init,
    additive_weights,
    dot_product,
    dot_product_weights,
    relu_attention,
    sigmoid_attention,
)
from attn_jax.attention.sparse import (
    bigbird,
    etc,
    etc_init,
    longformer,
    sparse_fixed,
    sparse_strided,
)
from attn_jax.attention.synthesizer import (
    synthesizer_dense,
    synthesizer_dense_factorized,
    synthesizer_dense_factorized_init,
    synthesizer_dense_init,
    synthesizer_mixture,
    synthesizer_mixture_init,
    synthesizer_random,
    synthesizer_random_factorized,
    synthesizer_random_factorized_init,
    synthesizer_random_init,
)
from attn_jax.exact import (
    dot_product_attention,
)
from attn_jax.multihead import (
    multi_head,
    multi_head_init,
    multi_head_update,
)
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
    "AttentionFn",
    "AttentionState",
    "CAPABILITIES",
    "FEATURE_MAPS",
    "KeyValueCache",
    "LearnedPositions",
    "LinearState",
    "LinenAttentionFn",
    "ModuleAttentionFn",
    "NORMALIZERS",
    "StreamState",
    "Streamer",
    "VARIANTS",
    "Variant",
    "__version__",
    "additive",
    "additive_init",
    "additive_weights",
    "alibi",
    "alibi_slopes",
    "as_attention_fn",
    "as_linen_attention_fn",
    "attention_convolution",
    "axial",
    "bigbird",
    "block_local",
    "blockwise",
    "bucketed",
    "cache_state",
    "cache_step",
    "causal_product",
    "clustered",
    "clusterformer",
    "clusterformer_init",
    "clusterformer_update",
    "convolution_as_attention",
    "cosformer",
    "dot_product",
    "dot_product_attention",
    "dot_product_weights",
    "embed",
    "etc",
    "etc_init",
    "floater",
    "floater_init",
    "frames",
    "gat",
    "gat_init",
    "gatv2",
    "gatv2_init",
    "gaussian_2d",
    "generate",
    "generate_uncached",
    "generation",
    "graph_attention",
    "graph_nodes",
    "improved_clustered",
    "inputs",
    "isab",
    "isab_init",
    "kmeans",
    "learned_init",
    "linear",
    "linear_parallel",
    "linear_recurrent",
    "linear_state",
    "linear_step",
    "linformer",
    "linformer_init",
    "long_short",
    "long_short_init",
    "longformer",
    "lsh_buckets",
    "luna",
    "luna_init",
    "masks",
    "memory_compressed",
    "memory_compressed_init",
    "multi_head",
    "multi_head_init",
    "multi_head_update",
    "nystromformer",
    "nystromformer_init",
    "one_hot",
    "orthogonal_features",
    "perceiver",
    "perceiver_init",
    "performer",
    "performer_relu",
    "positions",
    "quadratic",
    "quadratic_2d",
    "reformer",
    "reformer_exact",
    "relative_2d",
    "relative_shift",
    "relu_attention",
    "require",
    "resolve",
    "rfa",
    "rfa_exact",
    "rfa_gate",
    "rfa_gate_init",
    "rotary",
    "routing",
    "routing_exact",
    "routing_init",
    "routing_update",
    "sample_symbols",
    "shaw",
    "shaw_init",
    "sigmoid_attention",
    "sinkhorn",
    "sinkhorn_init",
    "sinkhorn_normalize",
    "sinusoidal",
    "sinusoidal_1d",
    "sinusoidal_2d",
    "sparse_fixed",
    "sparse_strided",
    "stream",
    "stream_init",
    "stream_step",
    "synthesizer_dense",
    "synthesizer_dense_factorized",
    "synthesizer_dense_factorized_init",
    "synthesizer_dense_init",
    "synthesizer_mixture",
    "synthesizer_mixture_init",
    "synthesizer_random",
    "synthesizer_random_factorized",
    "synthesizer_random_factorized_init",
    "synthesizer_random_init",
    "t5_bias",
    "t5_buckets",
    "training",
    "transformer_xl",
    "transformer_xl_init",
    "truncated",
    "unique_edges",
    "variants_with",
]

# The same names twice: here for type checkers and editors, below for Python, which
# imports the module that has the name when it is asked for. A test compares them.
if TYPE_CHECKING:
    from attn_jax import generation, inputs, positions
    from attn_jax.generation import (
        KeyValueCache,
        cache_state,
        cache_step,
        generate,
        generate_uncached,
        sample_symbols,
    )
    from attn_jax.inputs import (
        embed,
        frames,
        graph_nodes,
        one_hot,
    )
    from attn_jax.nn.attention_fn import (
        AttentionFn,
        AttentionState,
        LinenAttentionFn,
        ModuleAttentionFn,
        as_attention_fn,
        as_linen_attention_fn,
        training,
    )
    from attn_jax.nn.positional import (
        LearnedPositions,
    )
    from attn_jax.nn.streaming import (
        Streamer,
        StreamState,
        stream,
        stream_init,
        stream_step,
    )
    from attn_jax.positions import (
        alibi,
        alibi_slopes,
        floater,
        floater_init,
        gaussian_2d,
        learned_init,
        quadratic_2d,
        relative_2d,
        rotary,
        sinusoidal,
        sinusoidal_1d,
        sinusoidal_2d,
        t5_bias,
        t5_buckets,
    )
else:
    _LAZY = {
        "generation": (
            "KeyValueCache",
            "cache_state",
            "cache_step",
            "generate",
            "generate_uncached",
            "sample_symbols",
        ),
        "inputs": (
            "embed",
            "frames",
            "graph_nodes",
            "one_hot",
        ),
        "nn.attention_fn": (
            "AttentionFn",
            "AttentionState",
            "LinenAttentionFn",
            "ModuleAttentionFn",
            "as_attention_fn",
            "as_linen_attention_fn",
            "training",
        ),
        "positions": (
            "alibi",
            "alibi_slopes",
            "floater",
            "floater_init",
            "gaussian_2d",
            "learned_init",
            "quadratic_2d",
            "relative_2d",
            "rotary",
            "sinusoidal",
            "sinusoidal_1d",
            "sinusoidal_2d",
            "t5_bias",
            "t5_buckets",
        ),
        "nn.positional": ("LearnedPositions",),
        "nn.streaming": (
            "Streamer",
            "StreamState",
            "stream",
            "stream_init",
            "stream_step",
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
