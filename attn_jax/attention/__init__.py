"""Attention functions on one head of one example, one family a file.

Every function of a family is an attribute here: `attn_jax.attention.linformer`. A file
is named after its family (`low_rank`), and never as a function is: where a family has
the name of its function, the file ends in `_attention` (`attn_jax.attention.linear` is
the function, `attn_jax/attention/linear_attention.py` its file). What begins with an
underscore is the engine that families share.
"""

from attn_jax.attention.axial_attention import *
from attn_jax.attention.blockwise_attention import *
from attn_jax.attention.clustered_attention import *
from attn_jax.attention.convolution import *
from attn_jax.attention.graph import *
from attn_jax.attention.latent import *
from attn_jax.attention.linear_attention import *
from attn_jax.attention.local import *
from attn_jax.attention.long_short_attention import *
from attn_jax.attention.low_rank import *
from attn_jax.attention.random_features import *
from attn_jax.attention.reformer_attention import *
from attn_jax.attention.relative import *
from attn_jax.attention.routing_attention import *
from attn_jax.attention.sinkhorn_attention import *
from attn_jax.attention.softmax import *
from attn_jax.attention.sparse import *
from attn_jax.attention.synthesizer import *
