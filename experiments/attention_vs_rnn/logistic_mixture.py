"""A discretised mixture of logistics: the distribution of a pixel's value.

A value v of 0 … m is the interval [v − ½, v + ½], scaled to [−1, 1]; the intervals of
the first and of the last value reach to −∞ and ∞. So the probabilities of all values
sum to one, and near values have something to do with one another.

Letters: K logistics in a mixture, m the largest value (255).

Reference: Salimans et al., PixelCNN++, arXiv:1701.05517, section 2.1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.attention import _checks
from attn_jax.attention._scores import score_dtype

__all__ = [
    "logistic_mixture_init",
    "logistic_mixture_log_prob",
    "logistic_mixture_mode",
    "logistic_mixture_sample",
]

# A logistic narrower than that is all in one value: it cannot become more certain.
LEAST_LOG_SCALE = -7.0


class _Mixture(NamedTuple):
    """Logarithms of the weights, means and logarithms of the scales, each [..., K]."""

    log_weight: jax.Array
    mean: jax.Array
    log_scale: jax.Array


def _split(outputs: jax.Array) -> _Mixture:
    if outputs.ndim < 1 or outputs.shape[-1] % 3 or not outputs.shape[-1]:
        raise ValueError(
            "`outputs` must be [..., 3K], weights, means and scales of K logistics, "
            f"but has shape {tuple(outputs.shape)}."
        )
    outputs = outputs.astype(score_dtype(outputs.dtype))
    logits, mean, log_scale = jnp.split(outputs, 3, axis=-1)
    return _Mixture(
        jax.nn.log_softmax(logits, axis=-1),
        mean,
        jnp.maximum(log_scale, LEAST_LOG_SCALE),
    )


def logistic_mixture_init(num_components: int) -> np.ndarray:
    """Outputs [3K] of an even mixture that covers all values: a bias to begin with.

    Args:
      num_components: K.

    >>> logistic_mixture_init(1).tolist()
    [0.0, 0.0, 0.0]
    """
    if num_components < 1:
        raise ValueError(
            f"`num_components` must be at least 1, but is {num_components}."
        )
    means = np.linspace(-1.0, 1.0, num_components) if num_components > 1 else [0.0]
    scales = np.full(num_components, 0.0 - math.log(num_components))
    return np.concatenate([np.zeros(num_components), means, scales]).astype(np.float32)


def logistic_mixture_log_prob(
    outputs: jax.Array, value: jax.Array, *, largest: int = 255
) -> jax.Array:
    """Logarithm of the probability of values.

    log p(v) = log Σ_i π_i [σ((x + 1/m − μ_i)/s_i) − σ((x − 1/m − μ_i)/s_i)],
    x = 2v/m − 1, where the first σ is 1 for v = m and the second 0 for v = 0.

    With a and b the arguments of the two, σ(a) − σ(b) = σ(a) σ(−b) (1 − e^(b − a)) is
    computed by its logarithm, so that neither far values nor narrow logistics lose
    their digits or their gradient.

    Args:
      outputs: [..., 3K]: K logits of the weights π, K means μ, K logarithms of the
        scales s (no less than −7 counts), where values are scaled to [−1, 1].
      value: integers [...] of any width, 0 … `largest`.
      largest: m.

    Returns:
      [...], in nats (divided by −log 2 they are bits), in float32 or wider.

    Raises:
      ValueError: if the shapes do not belong together, or a known value is out of
        range; a traced one gives NaN.
      TypeError: if values are no integers.

    Reference: Salimans et al., 2017, arXiv:1701.05517, equation 2.

    >>> values = jnp.arange(256)
    >>> outputs = jnp.broadcast_to(logistic_mixture_init(5), (256, 15))
    >>> round(float(jnp.exp(logistic_mixture_log_prob(outputs, values)).sum()), 4)
    1.0
    """
    mixture = _split(outputs)
    if value.shape != outputs.shape[:-1]:
        raise ValueError(
            f"`value` must have the shape [...] = {tuple(outputs.shape[:-1])} of "
            f"`outputs` without its last axis, but has shape {tuple(value.shape)}."
        )
    value = _checks.check_ids("value", value, largest + 1)[..., None]
    x = 2.0 * value.astype(mixture.mean.dtype) / largest - 1.0
    precision = jnp.exp(-mixture.log_scale)
    centred = x - mixture.mean
    upper = (centred + 1.0 / largest) * precision
    lower = (centred - 1.0 / largest) * precision
    width = (2.0 / largest) * precision
    log_upper = jnp.where(value == largest, 0.0, jax.nn.log_sigmoid(upper))
    log_lower = jnp.where(value == 0, 0.0, jax.nn.log_sigmoid(-lower))
    ends = (value == 0) | (value == largest)
    log_width = jnp.where(ends, 0.0, jnp.log(-jnp.expm1(-width)))
    each = mixture.log_weight + log_upper + log_lower + log_width
    return jnp.where(value[..., 0] < 0, jnp.nan, jax.nn.logsumexp(each, axis=-1))


def logistic_mixture_sample(
    rng: jax.Array, outputs: jax.Array, *, largest: int = 255
) -> jax.Array:
    """Draws values: a logistic of the mixture, and a value of it.

    Args:
      rng: a JAX random key.
      outputs: [..., 3K]; see `logistic_mixture_log_prob`.
      largest: m.

    Returns:
      int32 [...], 0 … m, or −1 where `outputs` hold NaN.

    Raises:
      ValueError: if `outputs` is not [..., 3K].

    >>> outputs = jnp.array([0.0, 2.0, -9.0])  # all at the largest value
    >>> int(logistic_mixture_sample(jax.random.key(0), outputs))
    255
    """
    mixture = _split(outputs)
    which_rng, where_rng = jax.random.split(rng)
    which = jax.random.categorical(which_rng, mixture.log_weight, axis=-1)[..., None]
    mean = jnp.take_along_axis(mixture.mean, which, axis=-1)[..., 0]
    log_scale = jnp.take_along_axis(mixture.log_scale, which, axis=-1)[..., 0]
    x = mean + jnp.exp(log_scale) * jax.random.logistic(
        where_rng, mean.shape, mean.dtype
    )
    value = jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * (largest / 2))
    lost = jnp.isnan(value) | jnp.isnan(mixture.log_weight).any(axis=-1)
    return jnp.where(lost, -1, value.astype(jnp.int32))


def logistic_mixture_mode(
    rng: jax.Array, outputs: jax.Array, *, largest: int = 255
) -> jax.Array:
    """The likeliest value, by trying all of them: what is greedy for pixels.

    Args:
      rng: not read; it makes this a `sample` of `attn_jax.generate`.
      outputs: [..., 3K]; see `logistic_mixture_log_prob`.
      largest: m.

    Returns:
      int32 [...], 0 … m, or −1 where `outputs` hold NaN.

    >>> outputs = jnp.array([0.0, 0.0, -9.0])
    >>> int(logistic_mixture_mode(jax.random.key(0), outputs, largest=254))
    127
    """
    del rng
    values = jnp.arange(largest + 1, dtype=jnp.int32)
    wide = jnp.broadcast_to(
        outputs[..., None, :],
        (*outputs.shape[:-1], largest + 1, outputs.shape[-1]),
    )
    tried = jnp.broadcast_to(
        values.reshape((1,) * (outputs.ndim - 1) + (-1,)), wide.shape[:-1]
    )
    log_probs = logistic_mixture_log_prob(wide, tried, largest=largest)
    lost = jnp.isnan(log_probs).any(axis=-1)
    return jnp.where(lost, -1, jnp.argmax(log_probs, axis=-1).astype(jnp.int32))
