"""Takes a factor of the scores and does not read it."""

import jax


def attend(query, key, value, *, scale=None):
    return jax.nn.softmax(query @ key.T * query.shape[1] ** -0.5, axis=1) @ value
