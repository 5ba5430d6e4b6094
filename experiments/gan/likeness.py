"""How like the real ones drawn pictures are, in the features of a classifier.

Letters: n pictures, D features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist

NEIGHBOURS = 3  # to whose distance a picture's surroundings reach


class Moments(NamedTuple):
    """Mean [D] and covariance [D, D] of features."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Of features [n, D]."""
        wide = np.asarray(features, np.float64)
        return cls(wide.mean(axis=0), np.cov(wide, rowvar=False))


def frechet_distance(one: Moments, two: Moments) -> float:
    """|m₁ − m₂|² + tr(C₁ + C₂ − 2 (C₁ C₂)^½), between normal distributions.

    The trace of the root is the sum of the roots of the eigenvalues of C₁^½ C₂ C₁^½,
    which is symmetric, so that no complex root can come of rounding.

    Reference: Heusel et al., 2017, arXiv:1706.08500, equation 6.

    >>> one = Moments(np.zeros(2), np.diag([1.0, 4.0]))
    >>> round(frechet_distance(one, Moments(np.array([3.0, 0.0]), np.eye(2))), 6)
    10.0
    """
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(0.0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ two.covariance @ root)
    shared = np.sqrt(inner.clip(0.0)).sum()
    away = float(np.square(one.mean - two.mean).sum())
    both = float(np.trace(one.covariance) + np.trace(two.covariance))
    return max(0.0, away + both - 2.0 * float(shared))


def _covered(of: np.ndarray, by: np.ndarray) -> float:
    """Share of points that lie within the surroundings of some point of another set."""
    among = np.partition(cdist(by, by), NEIGHBOURS, axis=1)
    radius = among[:, NEIGHBOURS]  # the nearest of all is the point itself
    return float((cdist(of, by) <= radius[None]).any(axis=1).mean())


def precision_recall(real: np.ndarray, drawn: np.ndarray) -> tuple[float, float]:
    """Share of drawn pictures amid real ones, and of real ones amid drawn ones.

    A picture is amid others if it is as near to one of these as that one's third
    nearest.

    Args:
      real, drawn: features [n, D], four pictures or more of each.

    Reference: Kynkäänniemi et al., 2019, arXiv:1904.06991, with k = 3.

    >>> real = np.arange(10.0)[:, None]
    >>> precision_recall(real, real[:4])  # 0 to 3 reach to 6
    (1.0, 0.7)
    """
    real, drawn = np.asarray(real, np.float64), np.asarray(drawn, np.float64)
    return _covered(drawn, real), _covered(real, drawn)


def spread(features: np.ndarray, labels: np.ndarray) -> float:
    """Root of the mean square distance to the class's mean; 0 where classes collapsed.

    Args:
      features: [n, D].
      labels: int [n], the class of each.

    >>> spread(np.array([[0.0], [2.0], [5.0], [7.0]]), np.array([0, 0, 1, 1]))
    1.0
    """
    total, wide = 0.0, np.asarray(features, np.float64)
    for label in np.unique(labels):
        mine = wide[labels == label]
        total += float(np.square(mine - mine.mean(axis=0)).sum())
    return float(np.sqrt(total / len(labels)))
