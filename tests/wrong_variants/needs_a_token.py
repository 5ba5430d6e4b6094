"""Cuts its rows into blocks by a shape that no rows have."""

import jax


def attend(query, key, value):
    blocks = query.reshape(1, query.shape[0], -1)
    weights = jax.nn.softmax(blocks @ key.T * query.shape[1] ** -0.5, axis=2)
    return (weights @ value).reshape(query.shape[0], -1)
