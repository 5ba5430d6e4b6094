from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.common import stats

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
    assert gap.low == pytest.approx(0.020) and gap.high == pytest.approx(0.022)
    # Student's interval of (.020, .021, .022): 4.303 standard errors.
    assert gap.t_high - gap.mean == pytest.approx(4.3027 * 0.001 / math.sqrt(3), 1e-3)
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
    assert (gap.t_low, gap.t_high) == pytest.approx((low, high))
    assert gap.seeds == (5, 4)


def test_the_bootstrap_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(150):
        one, two = rng.normal(0.6, 0.03, 25), rng.normal(0.5, 0.03, 25)
        found = stats.gap(dict(enumerate(one)), dict(enumerate(two)), resamples=400)
        hits += found.low <= 0.1 <= found.high
    assert 0.86 <= hits / 150 <= 0.99


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


def test_the_same_call_gives_the_same_interval():
    one, two = {0: 0.5, 1: 0.6, 2: 0.9}, {0: 0.4, 1: 0.6, 3: 0.8}
    assert stats.gap(one, two) == stats.gap(one, two)
    with pytest.raises(ValueError, match="level: expected a number between 0 and 1"):
        stats.gap(one, two, level=95)


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


def test_the_crossing_of_known_curves_is_found():
    grid = np.geomspace(100, 1e5, 400_000)
    truth = grid[np.argmax(slow(grid) > quick(grid))]
    found = stats.crossing(scores(slow), scores(quick), resamples=50)
    assert found.n == pytest.approx(truth, rel=0.01)
    assert found.inside and found.falls_behind is None
    assert found.start < 0 < found.end < found.limit + 0.01
    assert found.limit == pytest.approx(0.02, abs=1e-3)


def test_the_interval_of_the_crossing_holds_it_and_widens_with_noise():
    truth = stats.crossing(scores(slow), scores(quick), resamples=2).n
    widths = []
    for noise in (0.002, 0.008):
        one, two = scores(slow, noise, seed=1), scores(quick, noise, seed=2)
        found = stats.crossing(one, two, resamples=300)
        assert found == stats.crossing(one, two, resamples=300)
        assert found.low <= found.n <= found.high
        widths.append(found.high / found.low)
        if noise < 0.005:
            assert found.low < truth < found.high and found.share > 0.99
    assert widths[1] > widths[0]


def test_a_crossing_beyond_the_data_is_not_inside():
    sizes = SIZES[:5]
    first = scores(lambda n: 0.96 - 3.0 * n**-0.3, sizes=sizes)
    second = scores(lambda n: 0.92 - 2.0 * n**-0.3, sizes=sizes)
    found = stats.crossing(first, second, resamples=20)
    assert found.n == pytest.approx(25 ** (1 / 0.3), rel=0.05)  # 45,700
    assert not found.inside and found.n_max == 10_000


def test_curves_that_do_not_cross_say_so():
    below = scores(lambda n: 0.90 - 1.5 * n**-0.4, 0.001)
    found = stats.crossing(below, scores(quick, 0.001), resamples=100)
    assert found.n is None and not found.inside
    assert found.low == found.high == math.inf and found.share == 0
    assert found.limit == pytest.approx(-0.03, abs=0.01)
    ahead = stats.crossing(scores(quick, 0.001), below, resamples=100)
    assert ahead.n is None and ahead.low == ahead.high == 0 and ahead.start > 0


def test_falling_behind_is_not_overtaking():
    found = stats.crossing(scores(quick), scores(slow), resamples=20)
    assert found.n is None
    assert found.falls_behind == pytest.approx(
        stats.crossing(scores(slow), scores(quick), resamples=20).n
    )


def test_the_measured_crossing_asks_for_no_law():
    first = {100: {0: 0.2}, 1_000: {0: 0.2}, 10_000: {0: 0.9}, 100_000: {0: 0.95}}
    second = {100: {0: 0.3}, 1_000: {0: 0.4}, 10_000: {0: 0.5}, 7: {0: 0.1}}
    found = stats.overtaking(first, second)
    assert (found.after, found.until) == (1_000, 10_000)
    assert found.n == pytest.approx(10 ** (3 + 0.2 / 0.6))
    assert found.low == pytest.approx(found.n) == pytest.approx(found.high)


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


def test_an_unsure_measured_crossing_has_an_open_end():
    first = {10: {0: 0.1, 1: 0.2, 2: 0.1}, 100: {0: 0.30, 1: 0.70, 2: 0.60}}
    second = {10: {0: 0.3, 1: 0.3, 2: 0.3}, 100: {0: 0.5, 1: 0.5, 2: 0.5}}
    found = stats.overtaking(first, second)
    assert 10 < found.low < found.n < 100
    assert found.high == math.inf
