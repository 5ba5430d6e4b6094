"""What a check returns or raises."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import numpy as np

from attn_jax.testing.trial import relative_error

__all__ = ["Fault", "Finding", "NotApplicable", "expect_close", "expect_finite"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim that holds, and what shows it.

    Attributes:
      evidence: one line for people.
      measured: figures behind it.
      note: whether nothing was claimed, so that this only tells what was found.
    """

    evidence: str
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: bool = False


class Fault(AssertionError):
    """A claim that does not hold; the message says what was seen."""

    def __init__(self, evidence: str, **measured: Any) -> None:
        super().__init__(evidence)
        self.measured = measured


class NotApplicable(Exception):
    """There is nothing to check, and why."""


def expect_finite(what: str, array: Any) -> None:
    """Raises `Fault` if anything in an array is not finite."""
    array = np.asarray(array, np.float64)
    try:
        chex.assert_tree_all_finite(array)
    except AssertionError:
        bad = ~np.isfinite(array)
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise Fault(
            f"{what} has {int(bad.sum())} of {bad.size} entries that are not finite, "
            f"the first at {list(at)}: {array[at]}"
        ) from None


def expect_close(what: str, got: Any, want: Any, tolerance: float) -> float:
    """Returns the relative error of two arrays, or raises `Fault` if it is too large.

    The error is taken of the whole array, and of each row by itself over the size of a
    mean row, so that one wrong row among many is seen.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise Fault(f"{what}: shapes {got.shape} and {want.shape} differ")
    expect_finite(what, got)
    error = relative_error(got, want)
    if got.ndim >= 2 and got.size:
        away = np.linalg.norm((got - want).reshape(got.shape[0], -1), axis=1)
        size = np.sqrt(np.mean(want**2) * want[0].size) or 1.0
        error = max(error, float(away.max() / size))
    if not error <= tolerance:
        raise Fault(
            f"{what}: relative error {error:.2e}, above {tolerance:.0e}",
            error=error,
            tolerance=tolerance,
        )
    return error
