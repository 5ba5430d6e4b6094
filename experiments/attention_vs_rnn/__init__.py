"""Attention against recurrent networks: what they learn, and how fast they generate."""
