"""Imports the library as a whole, before pytest imports its files one by one."""

import attn_jax  # noqa: F401
