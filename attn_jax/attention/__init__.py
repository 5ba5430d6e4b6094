"""Attention functions on one head of one example, one family a file.

Every function of a family is an attribute here: `attn_jax.attention.linformer`. A file
is named after its family (`low_rank`), and never as a function is: where a family has
the name of its function, the file ends in `_attention` (`attn_jax.attention.linear` is
the function, `attn_jax/attention/linear_attention.py` its file). What begins with an
underscore is the engine that families share.

What stands here holds for all of them; their docstrings tell what is particular.

| letter | size of |
|---|---|
| T, S | queries; keys and values. One sequence has T = S, and what needs one says so |
| H, V | a query and a key; a value |

Arguments of a function:
  query: [T, H].
  key: [S, H].
  value: [S, V].
  bias: [T or 1, S or 1], added to the scaled scores, or None; −∞ masks.
  mask: bool [T or 1, S or 1], True = attend, or None. Where attention has a pattern of
    its own, it narrows that; what of `bias` lies outside is not read.
  params: parameters of one head, as made by `<function>_init`.
  key_mask: bool [S], True = a real token, or None.
  scale: factor of the scores; None means 1/√H.
  is_causal: whether query t attends only to keys s ≤ t, aligned at the top left as in
    `jax.nn`, also where T ≠ S.
  dropout_rate: fraction of the weights to drop, in [0, 1), drawn by `rng`.
It returns [T, V], in the dtype of the inputs, and zeros, with zero gradients, for a
query that may attend to nothing. It raises ValueError on wrong shapes or parameters,
T ≠ S where one sequence is asked for, or an option out of its range; TypeError on
wrong dtypes, such as a float mask, or on an option that is no int where one is needed.

Arguments of a `<function>_init`:
  rng: random key.
  head_dim: H.
  max_length: L, the longest sequence that the parameters are for.
  value_dim: V; None means H.
  dtype: dtype of the parameters.
It raises ValueError on a size that is too small, and TypeError on one that is no int.
"""

from attn_jax.attention.axial_attention import *
from attn_jax.attention.blockwise_attention import *
from attn_jax.attention.cache import *
from attn_jax.attention.clustered_attention import *
from attn_jax.attention.compressive_attention import *
from attn_jax.attention.convolution import *
from attn_jax.attention.gated import *
from attn_jax.attention.graph import *
from attn_jax.attention.latent import *
from attn_jax.attention.linear_attention import *
from attn_jax.attention.local import *
from attn_jax.attention.long_short_attention import *
from attn_jax.attention.low_rank import *
from attn_jax.attention.pooling_attention import *
from attn_jax.attention.random_features import *
from attn_jax.attention.reformer_attention import *
from attn_jax.attention.relative import *
from attn_jax.attention.ring_attention import *
from attn_jax.attention.routing_attention import *
from attn_jax.attention.sinkhorn_attention import *
from attn_jax.attention.softmax import *
from attn_jax.attention.sparse import *
from attn_jax.attention.synthesizer import *
