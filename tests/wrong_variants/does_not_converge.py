"""Random features that more features do not bring nearer: their scale is wrong."""

import jax

from attn_jax import Variant, dot_product


def _attend(query, key, value, *, rng, num_features=64):
    draw = jax.random.normal(rng, (query.shape[1], num_features), query.dtype)
    features = lambda x: jax.nn.softmax(3.0 * x @ draw, axis=1)  # noqa: E731
    weights = features(query) @ features(key).T
    return weights @ value / weights.sum(axis=1, keepdims=True)


attend = Variant(
    name="does_not_converge",
    fn=_attend,
    stochastic=True,
    cross=True,
    value_dim=True,
    approximates=dot_product,
    knob=({"num_features": 16}, {"num_features": 64}, {"num_features": 256}),
)
