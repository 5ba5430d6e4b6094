"""A softmax in the dtype of the inputs, however narrow."""

import jax


def attend(query, key, value):
    return jax.nn.softmax(query @ key.T * query.shape[1] ** -0.5, axis=1) @ value
