"""Computes its weights in numpy, outside of the compiled program."""

import jax
import numpy as np


def attend(query, key, value):
    @jax.custom_vjp
    def scores(q, k):
        shape = jax.ShapeDtypeStruct((q.shape[0], k.shape[0]), q.dtype)
        return jax.pure_callback(
            lambda q, k: np.asarray(q) @ np.asarray(k).T,
            shape,
            q,
            k,
            vmap_method="sequential",
        )

    scores.defvjp(
        lambda q, k: (scores(q, k), (q, k)),
        lambda kept, g: (g @ kept[1], g.T @ kept[0]),
    )
    return jax.nn.softmax(scores(query, key) * query.shape[1] ** -0.5, axis=1) @ value
