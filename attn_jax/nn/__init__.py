"""Flax layers and the parts of models: what of attn_jax needs Flax."""

from attn_jax.nn.attention_fn import *
from attn_jax.nn.decoder import *
from attn_jax.nn.encoder import *
from attn_jax.nn.positional import *
from attn_jax.nn.streaming import *
