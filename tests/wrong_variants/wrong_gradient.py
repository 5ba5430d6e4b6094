"""A rule for the gradient that forgets how the softmax is normalised."""

import jax


@jax.custom_vjp
def attend(query, key, value):
    return _forward(query, key, value)[0]


def _forward(query, key, value):
    weights = jax.nn.softmax(query @ key.T * query.shape[1] ** -0.5, axis=1)
    return weights @ value, (query, key, value, weights)


def _backward(kept, grad):
    query, key, value, weights = kept
    grad_logits = weights * (grad @ value.T) * query.shape[1] ** -0.5
    return grad_logits @ key, grad_logits.T @ query, weights.T @ grad


attend.defvjp(_forward, _backward)
