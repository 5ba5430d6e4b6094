from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.core import stats

SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000, 60_000)


def scores(law, noise=0.0, seeds=3, sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    return {
        n: {s: float(law(n) + noise * rng.normal()) for s in range(seeds)}
        for n in sizes
    }


def slow(n):
    return 0.95 - 2.0 * n**-0.45


def quick(n):
    return 0.93 - 1.2 * n**-0.40


# --- summaries ---------------------------------------------------------------------


def test_the_spread_is_the_sample_standard_deviation():
    found = stats.summarize([0.1, 0.2, 0.4])
    assert found.count == 3 and found.enough
    assert found.mean == pytest.approx(7 / 30)
    assert found.std == pytest.approx(np.std([0.1, 0.2, 0.4], ddof=1))


def test_one_seed_has_no_spread_and_is_not_enough():
    found = stats.summarize([0.7])
    assert (found.std, found.enough) == (None, False)
    assert not stats.summarize([0.7, 0.8]).enough


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf]])
def test_values_must_be_there_and_finite(values):
    with pytest.raises(ValueError, match="values: expected"):
        stats.summarize(values)


# --- gaps --------------------------------------------------------------------------


def test_a_paired_gap_sees_through_what_the_seeds_share():
    shared = {0: 0.10, 1: 0.30, 2: 0.60}
    first = {s: v + 0.02 + 0.001 * s for s, v in shared.items()}
    gap = stats.gap(first, shared)
    assert gap.paired and gap.mean == pytest.approx(0.021)
    # Student's interval of (.020, .021, .022): 4.303 standard errors.
    assert gap.high - gap.mean == pytest.approx(4.3027 * 0.001 / math.sqrt(3), 1e-3)
    assert gap.mean - gap.low == pytest.approx(gap.high - gap.mean)
    assert gap.clear
    apart = stats.gap({10 + s: v for s, v in first.items()}, shared)
    assert not apart.paired and not apart.clear
    assert apart.high - apart.low > 0.2


def test_the_unpaired_interval_is_welchs():
    rng = np.random.default_rng(1)
    one, two = rng.normal(0.5, 0.02, 5), rng.normal(0.45, 0.05, 4)
    gap = stats.gap(dict(enumerate(one)), dict(enumerate(two)))
    from scipy.stats import ttest_ind

    low, high = ttest_ind(one, two, equal_var=False).confidence_interval(0.95)
    assert (gap.low, gap.high) == pytest.approx((low, high))
    assert gap.seeds == (5, 4)


@pytest.mark.parametrize("seeds", [3, 25])
def test_the_interval_covers_as_often_as_it_says(seeds):
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        shared = rng.normal(0, 0.1, seeds)  # what a subset does to both
        one, two = (shared + rng.normal(mean, 0.03, seeds) for mean in (0.6, 0.5))
        found = stats.gap(dict(enumerate(one)), dict(enumerate(two)))
        hits += found.low <= 0.1 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_too_few_seeds_are_never_a_clear_gap():
    one = stats.gap({0: 0.9}, {0: 0.1})
    assert (one.low, one.high, one.clear, one.enough) == (None, None, False, False)
    two = stats.gap({0: 0.9, 1: 0.9}, {0: 0.1, 1: 0.1})
    assert two.low == pytest.approx(0.8) and not two.clear


def test_equal_scores_are_no_difference():
    same = {s: 0.5 for s in range(3)}
    found = stats.gap(same, same)
    assert (found.mean, found.low, found.high, found.clear) == (0, 0, 0, False)
    assert not stats.gap(same, {s + 5: 0.5 for s in range(3)}).clear


# --- power laws --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "c"), [(0.95, 2.0, 0.45), (0.8, 0.6, 0.1), (1.0, 30.0, 1.2)]
)
def test_the_fit_finds_the_law_that_made_the_points(a, b, c):
    law = stats.fit_power_law(scores(lambda n: a - b * n**-c))
    assert (law.a, law.c) == pytest.approx((a, c), rel=1e-3)
    assert law.b == pytest.approx(b, rel=1e-2)
    assert law.worst < 1e-5
    assert law(1_000.0) == pytest.approx(a - b * 1_000**-c, abs=1e-5)
    assert (law.n_min, law.n_max, law.sizes) == (100, 60_000, 7)


def test_the_fit_is_the_least_squares_optimum():
    data = scores(slow, noise=0.01)
    means = np.array([np.mean(list(v.values())) for v in data.values()])
    law = stats.fit_power_law(data)
    best = np.sum((law(np.array(SIZES)) - means) ** 2)
    rng = np.random.default_rng(0)
    for _ in range(3_000):
        a, b, c = np.array([law.a, law.b, law.c]) * np.exp(0.05 * rng.normal(size=3))
        other = min(a, 1.0) - b * np.array(SIZES, float) ** -c
        assert np.sum((other - means) ** 2) >= best - 1e-12


def test_the_limit_stays_at_or_below_one_and_says_so():
    law = stats.fit_power_law(scores(lambda n: 0.1 * math.log10(n)))
    assert law.a == 1 and "a" in law.at_bound


def test_falling_accuracy_gives_a_flat_law_not_a_negative_b():
    law = stats.fit_power_law(scores(lambda n: 0.9 - 0.05 * math.log10(n)))
    assert law.b == 0 and "b" in law.at_bound
    assert law.worst > 0.02


def test_three_sizes_are_not_enough_for_three_parameters():
    with pytest.raises(stats.FitError, match="at least 4 different N, got 3"):
        stats.fit_power_law(scores(slow, sizes=SIZES[:3]))


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="N must be positive, got 0"):
        stats.fit_power_law({0: {0: 0.1}, 1: {0: 0.2}, 2: {0: 0.2}, 3: {0: 0.3}})


# --- crossings ---------------------------------------------------------------------


def test_the_measured_crossing_asks_for_no_law():
    first = {100: {0: 0.2}, 1_000: {0: 0.2}, 10_000: {0: 0.9}, 100_000: {0: 0.95}}
    second = {100: {0: 0.3}, 1_000: {0: 0.4}, 10_000: {0: 0.5}, 7: {0: 0.1}}
    found = stats.overtaking(first, second)
    assert (found.after, found.until) == (1_000, 10_000)
    assert (found.behind, found.ahead) == (None, None)  # of one seed


def test_the_measured_crossing_is_the_one_after_which_the_lead_stays():
    second = {n: {0: 0.5} for n in (1, 2, 3, 4, 5)}

    def ahead(*signs):
        return {n + 1: {0: 0.5 + 0.1 * s} for n, s in enumerate(signs)}

    found = stats.overtaking(ahead(-1, 1, -1, 1, 1), second)
    assert (found.after, found.until) == (3, 4)
    assert stats.overtaking(ahead(-1, 1, 1, 1, -1), second) is None
    assert stats.overtaking(ahead(1, 1, 1, 1, 1), second) is None
    assert stats.overtaking(ahead(0, 0, 0, 0, 0), second) is None
    assert stats.overtaking({9: {0: 0.1}}, second) is None


def test_a_crossing_is_as_sure_as_the_paired_differences():
    shared = {0: -0.2, 1: 0.0, 2: 0.2}  # a subset is as hard for both
    second = {n: {s: 0.5 + v for s, v in shared.items()} for n in (10, 100, 1_000)}

    def first(*gaps):
        return {
            n: {s: 0.5 + v + gap + 0.001 * s for s, v in shared.items()}
            for n, gap in zip(second, gaps, strict=True)
        }

    found = stats.overtaking(first(-0.1, 0.1, 0.1), second)
    assert (found.after, found.until) == (found.behind, found.ahead) == (10, 100)
    # The seeds of either side alone would hide it.
    apart = {n: {s + 9: v for s, v in seeds.items()} for n, seeds in second.items()}
    found = stats.overtaking(first(-0.1, 0.1, 0.1), apart)
    assert (found.after, found.until) == (10, 100)
    assert (found.behind, found.ahead) == (None, None)
    # Between two N a mean may lead and not clearly so.
    found = stats.overtaking(first(-0.1, 0.0, 0.1), second)
    assert (found.behind, found.ahead) == (10, 1_000)


def test_the_sampling_error_is_the_binomials():
    rng = np.random.default_rng(0)
    drawn = rng.binomial(1_000, 0.8, size=4_000) / 1_000
    assert stats.sampling_error(0.8, 1_000) == pytest.approx(drawn.std(), rel=0.05)
