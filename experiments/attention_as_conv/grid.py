"""Where heads look, in numbers: how near they are to being those of a convolution."""

from __future__ import annotations

from typing import Any

import numpy as np

# Mean distance of a place drawn evenly in the plane to the nearest whole place.
CHANCE = 0.3826

# Weight of one token from which a head is said to look at one token.
ONE_TOKEN = 0.5


def peak_weight(centres: np.ndarray, precisions: np.ndarray) -> np.ndarray:
    """Weight of the token that a head attends to most, far from any border.

    Args:
      centres: [..., 2], in tokens.
      precisions: [..., 2, 2], inverse covariances.

    Returns:
      [...], in (0, 1].

    >>> float(peak_weight(np.zeros(2), 100.0 * np.eye(2)))
    1.0
    """
    reach = 15
    side = np.arange(-reach, reach + 1.0)
    grid = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    offset = grid - (centres - np.round(centres))[..., None, :]
    score = -0.5 * np.einsum("...pi,...ij,...pj->...p", offset, precisions, offset)
    weight = np.exp(score - score.max(-1, keepdims=True))
    return (weight / weight.sum(-1, keepdims=True)).max(-1)


def grid_measures(centres: Any, precisions: Any) -> dict[str, np.ndarray]:
    """How near the heads of each layer are to being a convolution's.

    Args:
      centres: [layers, heads, 2], in tokens.
      precisions: [layers, heads, 2, 2], inverse covariances, in tokens⁻².

    Returns:
      By name, one number a layer: "distance" of centres to the nearest whole offset,
      mean; "distinct" such offsets; "in_3x3" and "in_5x5", the share of heads whose
      offset is there; "peak", the mean weight of the most attended token; "one_token",
      the share of heads with half of their weight or more on one.

    >>> found = grid_measures([[[0.0, 1.0], [0.0, 2.5]]], [[[[9.0, 0], [0, 9.0]]] * 2])
    >>> found["distance"].tolist(), found["distinct"].tolist()
    ([0.25], [2])
    """
    places = np.asarray(centres, float)
    near = np.round(places)
    peak = peak_weight(places, np.asarray(precisions, float))
    largest = np.abs(near).max(-1)
    return {
        "distance": np.linalg.norm(places - near, axis=-1).mean(-1),
        "distinct": np.asarray([len(np.unique(layer, axis=0)) for layer in near]),
        "in_3x3": (largest <= 1).mean(-1),
        "in_5x5": (largest <= 2).mean(-1),
        "peak": peak.mean(-1),
        "one_token": (peak >= ONE_TOKEN).mean(-1),
    }


def offsets_found(centres: Any, precisions: Any, side: int) -> int:
    """How many places of a kernel some head looks at.

    Args:
      centres: [heads, 2], in tokens.
      precisions: [heads, 2, 2], in tokens⁻².
      side: of the kernel.

    Returns:
      Number of different whole offsets within the kernel that are the nearest of a
      head that looks at one token.

    >>> sharp = 100.0 * np.eye(2)[None].repeat(3, axis=0)
    >>> offsets_found([[0.0, 0.1], [0.0, -0.1], [2.0, 0.0]], sharp, 3)
    1
    """
    places = np.asarray(centres, float)
    near = np.round(places)
    looks = peak_weight(places, np.asarray(precisions, float)) >= ONE_TOKEN
    inside = np.abs(near).max(-1) <= side // 2
    return len(np.unique(near[looks & inside], axis=0))
