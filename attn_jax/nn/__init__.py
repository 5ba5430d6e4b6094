"""Flax layers and the parts of models: what of attn_jax needs Flax."""
