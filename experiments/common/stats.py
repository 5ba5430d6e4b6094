"""Statistics over seeds: spread, gaps with intervals, learning-curve fits.

Everything here works on plain numbers, is deterministic for a given seed, and
says in its result how much data it rests on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import optimize, stats

MIN_SEEDS = 3
MIN_SIZES = 4
HORIZON = 1e9

Scores = Mapping[int, Mapping[int, float]]  # N -> seed -> accuracy

_RATE_BOUNDS = (0.02, 3.0)
_RATES = np.geomspace(*_RATE_BOUNDS, 160)


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
    """Difference of two means with its intervals over seeds.

    Attributes:
        mean: Mean of the first minus mean of the second.
        low: Lower end of the bootstrap interval; None with fewer than 2 seeds.
        high: Upper end.
        t_low: Lower end of Student's interval, which few seeds widen honestly.
        t_high: Upper end.
        seeds: Number of seeds of the first and of the second.
        paired: Whether both have the same seeds, which are then resampled together.
    """

    mean: float
    low: float | None
    high: float | None
    t_low: float | None
    t_high: float | None
    seeds: tuple[int, int]
    paired: bool

    @property
    def enough(self) -> bool:
        """Whether both sides have at least three seeds."""
        return min(self.seeds) >= MIN_SEEDS

    @property
    def clear(self) -> bool:
        """Whether there are enough seeds and Student's interval leaves zero out."""
        if not self.enough or self.t_low is None or self.t_high is None:
            return False
        return self.t_low > 0 or self.t_high < 0


def gap(
    first: Mapping[int, float],
    second: Mapping[int, float],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Gap:
    """Return mean(first) − mean(second) with a percentile bootstrap over seeds.

    Where both sides have the same seeds (a seed also draws the training subset),
    pairs are resampled, else each side by itself. The bootstrap of k values cannot
    leave their range, so it is too narrow for few seeds; Student's interval (paired
    or Welch) stands beside it.

    Args:
        first: Seed -> score.
        second: Seed -> score.
        level: Coverage asked for, between 0 and 1.
        resamples: Number of bootstrap draws.
        seed: Of the draws.

    Raises:
        ValueError: A side is empty, a score is not finite, or level is out of range.
    """
    _check_level(level)
    one = _finite([first[s] for s in sorted(first)], "first")
    two = _finite([second[s] for s in sorted(second)], "second")
    mean = float(one.mean() - two.mean())
    paired = set(first) == set(second)
    seeds = (one.size, two.size)
    if min(seeds) < 2:
        return Gap(mean, None, None, None, None, seeds, paired)
    rng = np.random.default_rng(seed)
    if paired:
        difference = one - two
        draws = rng.integers(difference.size, size=(resamples, difference.size))
        means = difference[draws].mean(axis=1)
        error = difference.std(ddof=1) / math.sqrt(difference.size)
        freedom = difference.size - 1.0
    else:
        means = one[rng.integers(one.size, size=(resamples, one.size))].mean(axis=1)
        means -= two[rng.integers(two.size, size=(resamples, two.size))].mean(axis=1)
        parts = np.array([one.var(ddof=1) / one.size, two.var(ddof=1) / two.size])
        error = math.sqrt(parts.sum())
        weights = parts**2 / np.array([one.size - 1, two.size - 1])
        freedom = float(parts.sum() ** 2 / weights.sum()) if error else 1.0
    tail = (1 - level) / 2
    low, high = (float(x) for x in np.quantile(means, [tail, 1 - tail]))
    reach = float(stats.t.ppf(1 - tail, freedom) * error)
    return Gap(mean, low, high, mean - reach, mean + reach, seeds, paired)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """The saturating power law acc(N) = a − b·N^(−c), fitted to measured points.

    Attributes:
        a: Accuracy that it tends to, 0 <= a <= 1.
        b: Scale, >= 0.
        c: Rate, between 0.02 and 3.
        n_min: Smallest N of the data.
        n_max: Largest N of the data.
        sizes: Number of different N.
        worst: Largest distance of a mean accuracy (at one N) from the curve.
        at_bound: Which of a, b, c the bounds hold, by name.
    """

    a: float
    b: float
    c: float
    n_min: int
    n_max: int
    sizes: int
    worst: float
    at_bound: tuple[str, ...]

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
    sizes, means = _means(scores)
    if sizes.size < MIN_SIZES:
        raise FitError(
            f"a power law has 3 parameters and needs at least {MIN_SIZES} different "
            f"N, got {sizes.size}"
        )
    rate, (a,), (b,) = _fit_rate(sizes, means[None, :], refine=True)
    scale = _scale(sizes)
    law_b = float(b * scale ** rate[0])
    fitted = a - b * (sizes / scale) ** -rate[0]
    at_bound = []
    if a > 1 - 1e-9 or a < 1e-9:
        at_bound.append("a")
    if b < 1e-12:
        at_bound.append("b")
    if rate[0] < _RATE_BOUNDS[0] * 1.001 or rate[0] > _RATE_BOUNDS[1] / 1.001:
        at_bound.append("c")
    return PowerLaw(
        a=float(a),
        b=law_b,
        c=float(rate[0]),
        n_min=int(sizes.min()),
        n_max=int(sizes.max()),
        sizes=sizes.size,
        worst=float(np.abs(fitted - means).max()),
        at_bound=tuple(at_bound),
    )


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Where the first model's fitted curve overtakes the second's.

    Attributes:
        n: The first N at or above `n_min` from which the first model leads, on the
            fitted curves; None where they do not cross so before `horizon`.
        low: Lower end of the bootstrap interval of N*; None: already ahead there.
        high: Upper end; None: no crossing before `horizon`.
        share: Share of the bootstrap resamples that cross at all between `n_min`
            and `horizon`.
        n_min: Smallest N measured for both.
        n_max: Largest N measured for both.
        horizon: How far N was searched.
        start: Fitted gap (first − second) at `n_min`.
        end: Fitted gap at `n_max`.
        limit: Fitted gap as N tends to infinity, a₁ − a₂.
        falls_behind: N at which the second overtakes the first, or None.
    """

    n: float | None
    low: float
    high: float
    share: float
    n_min: int
    n_max: int
    horizon: float
    start: float
    end: float
    limit: float
    falls_behind: float | None

    @property
    def inside(self) -> bool:
        """Whether N* lies within the measured range (else it is extrapolation)."""
        return self.n is not None and self.n <= self.n_max


def crossing(
    first: Scores,
    second: Scores,
    *,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
    horizon: float = HORIZON,
) -> Crossing:
    """Find N* at which the first fitted power law overtakes the second.

    The interval is a percentile bootstrap: seeds are resampled at every N of each
    model, both laws are fitted again and crossed again. A resample in which the
    first never overtakes counts as N* = infinity, one in which it leads from the
    start on as N* = 0.

    Args:
        first: N -> seed -> accuracy of the model that may overtake.
        second: The same of the other.
        level: Coverage asked for.
        resamples: Number of bootstrap draws.
        seed: Of the draws.
        horizon: Largest N to look at.

    Raises:
        FitError: One of the curves cannot be fitted.
    """
    _check_level(level)
    laws = fit_power_law(first), fit_power_law(second)
    n_min = max(law.n_min for law in laws)
    n_max = min(law.n_max for law in laws)
    grid = np.geomspace(n_min, max(horizon, n_max), 2_000)
    difference = laws[0](grid) - laws[1](grid)
    up, down = _sign_change(grid, difference, 1), _sign_change(grid, difference, -1)

    rng = np.random.default_rng(seed)
    curves = []
    for scores in (first, second):
        sizes, _ = _means(scores)
        drawn = np.stack([_resample(scores[int(n)], resamples, rng) for n in sizes], 1)
        rate, a, b = _fit_rate(sizes, drawn, refine=False)
        curves.append((a, b, rate, _scale(sizes)))
    coarse = np.geomspace(n_min, max(horizon, n_max), 400)
    stars = np.empty(resamples)
    crossed = np.zeros(resamples, bool)
    for i in range(resamples):
        values = [a[i] - b[i] * (coarse / s) ** -c[i] for a, b, c, s in curves]
        star = _sign_change(coarse, values[0] - values[1], 1)
        crossed[i] = star is not None
        if star is not None:
            stars[i] = star
        else:
            stars[i] = 0.0 if values[0][0] > values[1][0] else np.inf
    low, high = _ends(stars, level)
    return Crossing(
        n=up,
        low=low,
        high=high,
        share=float(crossed.mean()),
        n_min=n_min,
        n_max=n_max,
        horizon=horizon,
        start=float(difference[0]),
        end=float(laws[0](n_max) - laws[1](n_max)),
        limit=laws[0].a - laws[1].a,
        falls_behind=down,
    )


@dataclasses.dataclass(frozen=True)
class Overtaking:
    """Where the measured means of the first model overtake those of the second.

    Attributes:
        after: Largest measured N at which the first is not ahead.
        until: The next measured N; from there on it stays ahead.
        n: Between the two, where the straight line over log N crosses zero.
        low: Lower end of the bootstrap interval of n; 0: ahead at every N.
        high: Upper end; infinity: not ahead at the largest N.
    """

    after: int
    until: int
    n: float
    low: float
    high: float


def overtaking(
    first: Scores,
    second: Scores,
    *,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Overtaking | None:
    """Find where the first model gets ahead for good, without a model of the curve.

    The means are compared at every common N and joined by straight lines over
    log N. The interval resamples the seeds at every N.

    Args:
        first: N -> seed -> accuracy of the model that may overtake.
        second: The same of the other.
        level: Coverage asked for.
        resamples: Number of bootstrap draws.
        seed: Of the draws.

    Returns:
        None where the first model is ahead at every common N, or is not at the
        largest.

    >>> found = overtaking({100: {0: .3}, 1000: {0: .7}}, {100: {0: .4}, 1000: {0: .6}})
    >>> found.after, found.until, round(found.n)
    (100, 1000, 316)
    """
    _check_level(level)
    common = sorted(set(first) & set(second))
    sizes = np.asarray(common, float)
    means = np.asarray(
        [
            _finite(list(first[n].values()), f"N={n}").mean()
            - _finite(list(second[n].values()), f"N={n}").mean()
            for n in common
        ]
    )
    if not common or not 0 < _last_change(sizes, means) < np.inf:
        return None
    last_behind = int(np.flatnonzero(means <= 0)[-1])
    rng = np.random.default_rng(seed)
    drawn = np.stack(
        [
            _resample(first[n], resamples, rng) - _resample(second[n], resamples, rng)
            for n in common
        ],
        axis=1,
    )
    low, high = _ends(np.asarray([_last_change(sizes, row) for row in drawn]), level)
    return Overtaking(
        after=common[last_behind],
        until=common[last_behind + 1],
        n=_last_change(sizes, means),
        low=low,
        high=high,
    )


def _last_change(sizes: np.ndarray, gaps: np.ndarray) -> float:
    """Return where gaps become positive for good: 0 always, infinity never."""
    behind = np.flatnonzero(gaps <= 0)
    if behind.size == 0:
        return 0.0
    i = int(behind[-1])
    if i == len(gaps) - 1:
        return math.inf
    part = -gaps[i] / (gaps[i + 1] - gaps[i])
    return float(sizes[i] * (sizes[i + 1] / sizes[i]) ** part)


def _ends(values: np.ndarray, level: float) -> tuple[float, float]:
    """Return the percentile interval; quantiles are values, since some are inf."""
    ordered, tail = np.sort(values), (1 - level) / 2
    low = ordered[int(math.floor(tail * (values.size - 1)))]
    high = ordered[int(math.ceil((1 - tail) * (values.size - 1)))]
    return float(low), float(high)


def _finite(values: Sequence[float], name: str) -> np.ndarray:
    array = np.asarray(list(values), float)
    if array.size == 0:
        raise ValueError(f"{name}: expected at least one number, got none")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got {array.tolist()}")
    return array


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")


def _means(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.asarray(sorted(scores), float)
    if sizes.size and sizes.min() <= 0:
        raise ValueError(f"scores: N must be positive, got {sizes.min():g}")
    means = [_finite(list(scores[int(n)].values()), f"N={n:g}").mean() for n in sizes]
    return sizes, np.asarray(means)


def _resample(
    values: Mapping[int, float], count: int, rng: np.random.Generator
) -> np.ndarray:
    array = np.asarray([values[s] for s in sorted(values)], float)
    return array[rng.integers(array.size, size=(count, array.size))].mean(axis=1)


def _scale(sizes: np.ndarray) -> float:
    """Return the geometric mean, in units of which the fit is well conditioned."""
    return float(np.exp(np.log(sizes).mean()))


def _fit_rate(
    sizes: np.ndarray, values: np.ndarray, *, refine: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit rows of values [R, P] over sizes [P]; return c, a, b, each [R]."""
    unit = sizes / _scale(sizes)
    best = np.full(values.shape[0], np.inf)
    chosen = np.full(values.shape[0], _RATES[0])
    for rate in _RATES:
        _, _, loss = _fit_linear(unit**-rate, values)
        better = loss < best
        best = np.where(better, loss, best)
        chosen = np.where(better, rate, chosen)
    if refine:
        for row, start in enumerate(chosen):
            step = _RATES[1] / _RATES[0]
            found = optimize.minimize_scalar(
                lambda log_rate, row=row: float(
                    _fit_linear(unit ** -np.exp(log_rate), values[row : row + 1])[2][0]
                ),
                bounds=(
                    math.log(max(start / step, _RATE_BOUNDS[0])),
                    math.log(min(start * step, _RATE_BOUNDS[1])),
                ),
                method="bounded",
                options={"xatol": 1e-10},
            )
            if found.fun < best[row]:
                chosen[row] = math.exp(found.x)
    a = np.empty(values.shape[0])
    b = np.empty(values.shape[0])
    for rate in np.unique(chosen):
        rows = chosen == rate
        a[rows], b[rows], _ = _fit_linear(unit**-rate, values[rows])
    return chosen, a, b


def _fit_linear(
    x: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit values ≈ a − b·x with 0 <= a <= 1 and b >= 0, exactly; rows [R, P]."""
    x_mean, y_mean = x.mean(), values.mean(axis=1)
    centred = x - x_mean
    spread = float(centred @ centred)
    slope = (values - y_mean[:, None]) @ centred / spread if spread > 0 else 0 * y_mean
    b = np.maximum(-slope, 0.0)
    a = y_mean + b * x_mean
    for limit in (0.0, 1.0):  # on that edge of the box, b has its own optimum
        beyond = a < 0 if limit == 0 else a > 1
        b_edge = np.maximum((limit - values) @ x / float(x @ x), 0.0)
        a, b = np.where(beyond, limit, a), np.where(beyond, b_edge, b)
    residual = values - (a[:, None] - b[:, None] * x)
    return a, b, (residual**2).sum(axis=1)


def _sign_change(grid: np.ndarray, values: np.ndarray, direction: int) -> float | None:
    """Return where values first change to the sign of direction, on a log scale."""
    signed = values * direction
    hits = np.flatnonzero((signed[:-1] <= 0) & (signed[1:] > 0))
    if hits.size == 0:
        return None
    i = int(hits[0])
    part = -signed[i] / (signed[i + 1] - signed[i])
    return float(grid[i] * (grid[i + 1] / grid[i]) ** part)
