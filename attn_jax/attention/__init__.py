"""Attention functions on one head of one example, one family a file.

Import from the family (`from attn_jax.attention.softmax import dot_product`) or from
`attn_jax`, which names them all; nothing is re-exported here, so that a family and a
function may share a name.
"""
