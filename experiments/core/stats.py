"""Statistics over seeds: spread, gaps with intervals, learning-curve fits.

Everything here works on plain numbers, is deterministic for a given seed, and
says in its result how much data it rests on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special  # scipy.stats and .optimize take .8 s to import

MIN_SEEDS = 3
MIN_SIZES = 4

Scores = Mapping[int, Mapping[int, float]]  # N -> seed -> accuracy

_RATES = np.geomspace(0.02, 3.0, 160)


class FitError(ValueError):
    """A curve cannot be fitted to these points; the message says why."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (ddof = 1; None for one value)."""

    count: int
    mean: float
    std: float | None

    @property
    def enough(self) -> bool:
        """Whether there are at least three seeds."""
        return self.count >= MIN_SEEDS


def summarize(values: Sequence[float]) -> Summary:
    """Return count, mean and sample standard deviation of the values.

    >>> summarize([0.5, 0.7]).mean
    0.6

    Raises:
        ValueError: There is no value, or one is not finite.
    """
    array = _finite(values, "values")
    std = float(np.std(array, ddof=1)) if array.size > 1 else None
    return Summary(array.size, float(np.mean(array)), std)


@dataclasses.dataclass(frozen=True)
class Gap:
    """Difference of two means with its interval over seeds."""

    mean: float
    low: float | None  # end of Student's interval; None with fewer than 2 seeds
    high: float | None
    seeds: tuple[int, int]  # of the first and of the second
    paired: bool  # whether both have the same seeds, whose differences then count

    @property
    def enough(self) -> bool:
        """Whether both sides have at least three seeds."""
        return min(self.seeds) >= MIN_SEEDS

    @property
    def clear(self) -> bool:
        """Whether there are enough seeds and Student's interval leaves zero out."""
        if not self.enough or self.low is None or self.high is None:
            return False
        return self.low > 0 or self.high < 0


def gap(first: Mapping[int, float], second: Mapping[int, float]) -> Gap:
    """Return mean(first) − mean(second) with Student's interval of 95 % over seeds.

    Where both sides have the same seeds (a seed also draws the training subset),
    their differences count, else the interval is Welch's. (A bootstrap of k values
    cannot leave their range, so it would be too narrow for few seeds.)

    Args are seed -> score.

    Raises:
        ValueError: A side is empty, or a score is not finite.
    """
    one = _finite([first[s] for s in sorted(first)], "first")
    two = _finite([second[s] for s in sorted(second)], "second")
    mean = float(one.mean() - two.mean())
    paired = set(first) == set(second)
    seeds = (one.size, two.size)
    if min(seeds) < 2:
        return Gap(mean, None, None, seeds, paired)
    if paired:
        difference = one - two
        error = difference.std(ddof=1) / math.sqrt(difference.size)
        freedom = difference.size - 1.0
    else:
        parts = np.array([one.var(ddof=1) / one.size, two.var(ddof=1) / two.size])
        error = math.sqrt(parts.sum())
        weights = parts**2 / np.array([one.size - 1, two.size - 1])
        freedom = float(parts.sum() ** 2 / weights.sum()) if error else 1.0
    reach = float(special.stdtrit(freedom, 0.975) * error)
    return Gap(mean, mean - reach, mean + reach, seeds, paired)


def sampling_error(accuracy: float, size: int) -> float:
    """Standard error of an accuracy on so many test items, √(p (1 − p) / m).

    Of independent items; where one depends on another, as words of a text do, the
    error is larger.

    >>> round(sampling_error(0.9, 10_000), 4)
    0.003
    """
    return math.sqrt(accuracy * (1 - accuracy) / size)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """The saturating power law acc(N) = a − b·N^(−c), fitted to measured points."""

    a: float  # accuracy that it tends to, 0 <= a <= 1
    b: float  # scale, >= 0
    c: float  # rate, between 0.02 and 3
    n_min: int
    n_max: int
    sizes: int  # number of different N
    worst: float  # largest distance of a mean accuracy (at one N) from the curve
    at_bound: tuple[str, ...]  # which of a, b, c the bounds hold

    def __call__(self, n: float | np.ndarray) -> np.ndarray:
        """Evaluate the law at N."""
        return self.a - self.b * np.power(np.asarray(n, float), -self.c)


def fit_power_law(scores: Scores) -> PowerLaw:
    """Fit acc(N) = a − b·N^(−c) by least squares with 0 <= a <= 1, b >= 0.

    For a given c the problem is linear in (a, b) and solved exactly; c is searched
    on a grid over [0.02, 3], then refined, so that there is no start to choose and
    no local minimum to be caught in.

    Args:
        scores: N -> seed -> accuracy in [0, 1]. Each N counts once, by its mean.

    Raises:
        FitError: Fewer than four different N (three parameters need a fourth point
            to be tested at all).
        ValueError: A score or a size is not finite, or a size is not positive.
    """
    sizes = np.asarray(sorted(scores), float)
    if sizes.size and sizes.min() <= 0:
        raise ValueError(f"scores: N must be positive, got {sizes.min():g}")
    if sizes.size < MIN_SIZES:
        raise FitError(
            f"a power law has 3 parameters and needs at least {MIN_SIZES} different "
            f"N, got {sizes.size}"
        )
    means = np.asarray(
        [_finite(list(scores[int(n)].values()), f"N={n:g}").mean() for n in sizes]
    )
    from scipy import optimize

    # In units of the geometric mean the fit is well conditioned.
    scale = float(np.exp(np.log(sizes).mean()))
    unit = sizes / scale

    def loss(log_rate: float) -> float:
        return _fit_linear(unit ** -math.exp(log_rate), means)[2]

    grid = np.log(_RATES)
    losses = [loss(x) for x in grid]
    start, step = grid[np.argmin(losses)], grid[1] - grid[0]
    bounds = max(start - step, grid[0]), min(start + step, grid[-1])
    found = optimize.minimize_scalar(
        loss, bounds=bounds, method="bounded", options={"xatol": 1e-10}
    )
    rate = math.exp(found.x if found.fun < min(losses) else start)
    a, b, _ = _fit_linear(unit**-rate, means)
    low, high = _RATES[0] * 1.001, _RATES[-1] / 1.001
    held = dict(a=a > 1 - 1e-9 or a < 1e-9, b=b < 1e-12, c=not low <= rate <= high)
    return PowerLaw(
        a=a,
        b=b * scale**rate,
        c=rate,
        n_min=int(sizes.min()),
        n_max=int(sizes.max()),
        sizes=sizes.size,
        worst=float(np.abs(a - b * unit**-rate - means).max()),
        at_bound=tuple(name for name, holds in held.items() if holds),
    )


def _fit_linear(x: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """Fit values ≈ a − b·x with 0 <= a <= 1 and b >= 0, exactly; a, b and the loss."""
    centred = x - x.mean()
    spread = float(centred @ centred)
    b = max(-float((values - values.mean()) @ centred) / spread, 0.0) if spread else 0.0
    a = float(values.mean() + b * x.mean())
    if not 0 <= a <= 1:  # on that edge of the box, b has its own optimum
        a = min(max(a, 0.0), 1.0)
        b = max(float((a - values) @ x) / float(x @ x), 0.0)
    return a, b, float(((values - (a - b * x)) ** 2).sum())


@dataclasses.dataclass(frozen=True)
class Overtaking:
    """Where the first model overtakes the second, to within the grid of N."""

    after: int  # largest measured N at which its mean is not ahead
    until: int  # the next measured N; from there on its mean stays ahead
    behind: int | None  # largest measured N, if any, at which it is clearly behind
    ahead: int | None  # smallest measured N from which on it is clearly ahead


def overtaking(first: Scores, second: Scores) -> Overtaking | None:
    """Find between which measured N the first model gets ahead for good.

    The seeds of both sides share their data, so that `gap` of each common N, paired
    by seed, says what is clear there.

    Returns:
        None where the first model is ahead at every common N, or is not at the
        largest.

    >>> overtaking({100: {0: .3}, 1000: {0: .7}}, {100: {0: .4}, 1000: {0: .6}})
    Overtaking(after=100, until=1000, behind=None, ahead=None)
    """
    common = sorted(set(first) & set(second))
    gaps = [gap(first[n], second[n]) for n in common]
    not_ahead = [i for i, found in enumerate(gaps) if found.mean <= 0]
    if not not_ahead or not_ahead[-1] == len(gaps) - 1:
        return None
    last = not_ahead[-1]
    behind = [n for n, g in zip(common, gaps, strict=True) if g.clear and g.mean < 0]
    unsure = [i for i, g in enumerate(gaps) if not (g.clear and g.mean > 0)][-1]
    return Overtaking(
        after=common[last],
        until=common[last + 1],
        behind=behind[-1] if behind else None,
        ahead=common[unsure + 1] if unsure + 1 < len(common) else None,
    )


def _finite(values: Sequence[float], name: str) -> np.ndarray:
    array = np.asarray(list(values), float)
    if array.size == 0:
        raise ValueError(f"{name}: expected at least one number, got none")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got {array.tolist()}")
    return array
