"""Claims to be exact, and scales by 1/H instead of 1/sqrt(H)."""

import jax


def attend(query, key, value):
    return jax.nn.softmax(query @ key.T / query.shape[1], axis=1) @ value
