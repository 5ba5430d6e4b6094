"""Has a mask in its signature that nothing reads and nobody claims."""

import jax


def attend(query, key, value, bias=None, mask=None):
    logits = query @ key.T * query.shape[1] ** -0.5
    if bias is not None:
        logits = logits + bias
    return jax.nn.softmax(logits, axis=1) @ value
