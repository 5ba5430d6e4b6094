"""The distribution of a pixel's value."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logsumexp

from experiments.attention_vs_rnn.logistic_mixture import (
    logistic_mixture_init,
    logistic_mixture_log_prob,
    logistic_mixture_mode,
    logistic_mixture_sample,
)


def _outputs(scale, count=20, components=5, seed=0):
    rng = np.random.default_rng(seed)
    logits, means = rng.standard_normal((2, count, components))
    scales = scale + 0.5 * rng.standard_normal((count, components))
    return np.concatenate([logits, means, scales], -1).astype(np.float32)


def _all_values(outputs, largest=255):
    count = largest + 1
    wide = jnp.broadcast_to(outputs[:, None], (len(outputs), count, outputs.shape[-1]))
    values = jnp.broadcast_to(jnp.arange(count)[None], wide.shape[:2])
    return logistic_mixture_log_prob(wide, values, largest=largest)


def _reference(outputs, value, largest=255):
    """The definition, in float64."""
    logits, means, scales = np.split(np.asarray(outputs, np.float64), 3, axis=-1)
    weights = logits - logsumexp(logits, axis=-1, keepdims=True)
    scales = np.exp(np.maximum(scales, -7.0))
    x = (2.0 * value / largest - 1.0)[..., None]
    ends = np.asarray(value)[..., None]
    upper = np.where(ends == largest, 1.0, expit((x + 1 / largest - means) / scales))
    lower = np.where(ends == 0, 0.0, expit((x - 1 / largest - means) / scales))
    return np.log((np.exp(weights) * (upper - lower)).sum(axis=-1))


@pytest.mark.parametrize("scale", [-9.0, -4.0, -1.0, 2.0])
@pytest.mark.parametrize("largest", [255, 15])
def test_probabilities_of_all_values_sum_to_one(scale, largest):
    outputs = jnp.asarray(_outputs(scale))
    total = jnp.exp(_all_values(outputs, largest)).sum(axis=1)
    np.testing.assert_allclose(total, 1.0, atol=2e-5)


@pytest.mark.parametrize("scale", [-3.0, -1.0, 1.0])
def test_it_is_the_definition_in_float64(scale):
    outputs = _outputs(scale)
    value = np.random.default_rng(1).integers(0, 256, len(outputs))
    value[:2] = 0, 255
    found = logistic_mixture_log_prob(jnp.asarray(outputs), jnp.asarray(value))
    np.testing.assert_allclose(found, _reference(outputs, value), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("log_scale", [-30.0, -7.0, 0.0, 8.0])
@pytest.mark.parametrize("mean", [-50.0, -1.0, 0.3, 1.0, 50.0])
def test_extremes_have_finite_values_and_gradients(mean, log_scale):
    outputs = jnp.array([0.0, 40.0, mean, 0.0, log_scale, log_scale])
    for value in (0, 1, 128, 254, 255):
        at = jnp.int32(value)
        found, slope = jax.value_and_grad(logistic_mixture_log_prob)(outputs, at)
        assert bool(jnp.isfinite(found)), value
        assert found <= 1e-6
        assert bool(jnp.isfinite(slope).all()), value


def test_a_far_mean_is_pulled_nearer():
    outputs = jnp.array([0.0, 30.0, -2.0])
    slope = jax.grad(logistic_mixture_log_prob)(outputs, jnp.int32(3))
    assert slope[1] < -1.0


def test_samples_have_the_probabilities():
    outputs = jnp.asarray(_outputs(-3.0, count=1, components=3))
    expected = np.exp(np.asarray(_all_values(outputs, 15))[0])
    many = jnp.broadcast_to(outputs, (40_000, 9))
    drawn = logistic_mixture_sample(jax.random.key(0), many, largest=15)
    assert drawn.dtype == jnp.int32
    counts = np.bincount(np.asarray(drawn), minlength=16) / 40_000
    assert len(counts) == 16
    assert np.abs(counts - expected).sum() / 2 < 0.012


def test_mode_is_the_likeliest_value():
    outputs = jnp.asarray(_outputs(-2.0, count=6))
    found = logistic_mixture_mode(jax.random.key(0), outputs)
    np.testing.assert_array_equal(found, jnp.argmax(_all_values(outputs), axis=1))


def test_the_first_mixture_covers_all_values():
    outputs = jnp.asarray(logistic_mixture_init(10))[None]
    assert float(_all_values(outputs).min()) > np.log(1 / 256 / 4)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"`outputs` must be \[..., 3K\]"):
        logistic_mixture_log_prob(jnp.zeros((2, 4)), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="`value` must have the shape"):
        logistic_mixture_log_prob(jnp.zeros((2, 6)), jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="`num_components`"):
        logistic_mixture_init(0)
