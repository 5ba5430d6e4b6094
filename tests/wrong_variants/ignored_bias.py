"""Takes a bias and does not add it."""

import jax


def attend(query, key, value, bias=None):
    return jax.nn.softmax(query @ key.T * query.shape[1] ** -0.5, axis=1) @ value
