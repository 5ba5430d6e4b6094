"""Says on which devices its scores shall lie, whoever calls it with another mesh."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH = Mesh(np.array(jax.devices()[:1]), ("alone",))


def attend(query, key, value):
    scores = query @ key.T * query.shape[1] ** -0.5
    whole = NamedSharding(MESH, PartitionSpec())
    scores = jax.lax.with_sharding_constraint(scores, whole)
    return jax.nn.softmax(scores) @ value
