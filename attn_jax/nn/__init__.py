"""Flax layers and the parts of models: what of attn_jax needs Flax.

Arguments of every layer and model, where nothing else is said:
  dropout_rate: probability of dropping what is said, while training.
  dtype: dtype of the computation; parameters stay float32.
  rngs: source of initialisation randomness; at a call, the stream `dropout`.
  deterministic: whether dropout is off.
"""

from attn_jax.nn.attention_fn import *
from attn_jax.nn.causal_attention import *
from attn_jax.nn.cross_attention import *
from attn_jax.nn.decoder import *
from attn_jax.nn.encoder import *
from attn_jax.nn.funnel import *
from attn_jax.nn.positional import *
from attn_jax.nn.recurrent import *
from attn_jax.nn.state_space import *
from attn_jax.nn.streaming import *
