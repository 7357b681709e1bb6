"""Intervals, the signed-rank test and Holm's rule: numbers by hand, SciPy and full enumeration as oracles."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from ssl4mis import statistics

RNG = np.random.default_rng(7)
SAMPLES = [RNG.normal(0.02, 0.05, n).tolist() for n in (3, 5, 20, 100)] + [[0.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.7]]


@pytest.mark.parametrize("values", SAMPLES)
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_of_a_mean_is_scipys_bca(values, level):
    wanted = stats.bootstrap((values,), np.mean, confidence_level=level, n_resamples=9999, method="BCa",
                             rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
    found = statistics.mean_interval(values, level)
    assert found == (wanted.low, wanted.high) and found.low < np.mean(values) < found.high
    assert statistics.mean_interval(values, level) == found


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = [low <= 0 <= high for low, high in (statistics.mean_interval(rng.normal(0, 1, 30), 0.8) for _ in range(200))]
    assert 0.70 < np.mean(hits) < 0.88


def test_an_interval_moves_and_grows_with_its_values():
    values = np.array(SAMPLES[2])
    low, high = statistics.mean_interval(values)
    assert statistics.mean_interval(values + 3) == pytest.approx((low + 3, high + 3), abs=1e-12)
    assert statistics.mean_interval(values * 100) == pytest.approx((low * 100, high * 100), abs=1e-10)
    assert statistics.mean_interval(-values) == pytest.approx((-high, -low), abs=1e-12)


def test_intervals_of_constant_and_of_few_values():
    with np.errstate(all="ignore"), pytest.warns(stats.DegenerateDataWarning):
        assert math.isnan(stats.bootstrap(([0.7] * 5,), np.mean, method="BCa").confidence_interval.low)
    assert statistics.mean_interval([0.7] * 5) == (0.7, 0.7)
    # 0.8 - 0.7 and 0.9 - 0.8 differ by their last bit only
    assert statistics.mean_interval([0.8 - 0.7, 0.9 - 0.8, 0.1]) == pytest.approx((0.1, 0.1), abs=1e-15)
    assert all(map(math.isnan, statistics.mean_interval([0.1, 0.9])))
    assert all(map(math.isnan, statistics.mean_interval([])))


def test_the_t_interval_by_hand():
    # mean 0.85, standard error 0.05, and 12.7062 is the quantile of one degree of freedom
    assert statistics.t_interval([0.8, 0.9]) == pytest.approx((0.85 - 0.635310, 0.85 + 0.635310), abs=1e-6)
    assert statistics.t_interval([0.8, 0.8]) == (0.8, 0.8)
    assert all(map(math.isnan, statistics.t_interval([0.8])))
    values = SAMPLES[1]
    wanted = stats.t.interval(0.9, 4, np.mean(values), stats.sem(values))
    assert statistics.t_interval(values, 0.9) == pytest.approx(wanted, rel=1e-12)


def by_enumeration(differences):
    """Exact two-sided p-value over all signs, with mid-ranks, zeros dropped."""
    kept = [value for value in differences if value]
    ranks = stats.rankdata(np.abs(kept))
    seen = ranks[np.array(kept) > 0].sum()
    sums = np.array([np.dot(signs, ranks) for signs in product((0, 1), repeat=len(kept))])
    return min(1, 2 * min((sums >= seen).mean(), (sums <= seen).mean()))


def test_the_signed_rank_test_by_hand():
    assert statistics.wilcoxon([1, 2, 3, 4, 5, 6]) == 2 / 64
    assert statistics.wilcoxon([-1, -2, -3, -4, -5]) == 2 / 32
    # W- = 1: of the 32 signs {} and {1}, twice
    assert statistics.wilcoxon([-1, 2, 3, 4, 5]) == 4 / 32


@pytest.mark.parametrize("n", [6, 9, 13])
@pytest.mark.parametrize("kind", ["plain", "ties", "zeros"])
def test_small_samples_are_exact(n, kind):
    rng = np.random.default_rng(n)
    values = rng.normal(0.3, 1, n)
    if kind != "plain":
        values = np.round(values * 2) / 2 + 0.25  # never 0, many ties
    values = [*values[1:], 0.0] if kind == "zeros" else list(values)
    assert statistics.wilcoxon(values) == pytest.approx(by_enumeration(values), rel=1e-12)
    assert statistics.wilcoxon(values) == pytest.approx(stats.wilcoxon(values).pvalue, rel=1e-12)
    if kind == "plain":
        assert statistics.wilcoxon(values) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "method"),
    [(RNG.normal(0.1, 1, 40), "exact"), (np.round(RNG.normal(0.3, 1, 40), 1), "asymptotic"),
     (np.r_[np.zeros(3), RNG.normal(0.1, 1, 30)], "asymptotic"), (RNG.normal(0.1, 1, 80), "asymptotic")],
)  # fmt: skip
def test_the_distribution_is_the_one_scipy_takes_by_itself(values, method):
    assert statistics.wilcoxon(values) == stats.wilcoxon(values, method=method).pvalue
    assert statistics.wilcoxon(values) == pytest.approx(statistics.wilcoxon(-values), rel=1e-9)


@pytest.mark.parametrize("values", [[], [1, 2, 3, 4], [0] * 20, [0, 0, 0, 1, 2, 3, 4]])
def test_fewer_than_five_differences_are_no_test(values):
    assert math.isnan(statistics.wilcoxon(values))


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0]
    assert statistics.holm([0.03]) == [0.03] and statistics.holm([]) == []
    found = statistics.holm([0.02, float("nan"), 0.03])  # a family of two
    assert found[0] == 0.04 and math.isnan(found[1]) and found[2] == 0.04


def test_holm_is_monotone_at_least_the_raw_value_and_at_most_bonferroni():
    rng = np.random.default_rng(3)
    for size in range(1, 12):
        ps = (rng.random(size) ** 3).tolist()
        found = statistics.holm(ps)
        order = np.argsort(ps)
        assert all(np.diff(np.array(found)[order]) >= 0)
        assert all(p <= q <= min(1, size * p) for p, q in zip(ps, found, strict=True))
        shuffled = rng.permutation(size)
        assert statistics.holm([ps[place] for place in shuffled]) == [found[place] for place in shuffled]


@pytest.mark.parametrize("p", [-0.1, 1.01])
def test_what_is_no_probability_is_refused(p):
    with pytest.raises(ValueError, match=f"p-value {p}, expected a number from 0 to 1"):
        statistics.holm([0.5, p])


def test_wins_ties_and_losses():
    assert statistics.win_rate([0.1, 0, -0.2, 3, 0.0]) == (2, 2, 1)
    assert statistics.win_rate([]) == (0, 0, 0)


def test_the_area_is_a_mean_height():
    assert statistics.area([4, 8, 16], [0.6, 0.8, 0.9], log2=True) == pytest.approx((0.7 + 0.85) / 2)
    assert statistics.area([4, 8, 16], [0.6, 0.8, 0.9]) == pytest.approx((4 * 0.7 + 8 * 0.85) / 12)
    assert statistics.area([16, 4, 8], [0.9, 0.6, 0.8], log2=True) == pytest.approx(0.775)
    assert statistics.area([4, 5, 32], [0.7] * 3, log2=True) == pytest.approx(0.7)
    assert statistics.area([0, 10], [0.5, 0.7]) == pytest.approx(0.6)
    assert math.isnan(statistics.area([4], [0.6], log2=True))


@pytest.mark.parametrize(("xs", "log2"), [([4, 4], False), ([0, 4], True), ([-2, 4], True)])
def test_an_axis_that_is_none_is_refused(xs, log2):
    with pytest.raises(ValueError, match="expected different numbers"):
        statistics.area(xs, [0.5, 0.6], log2)


def test_what_the_best_choice_gains():
    rows = np.array([[0.5, 0.9, 0.4], [0.6, 0.6, 0.9], [0.4, 0.8, 0.6]])  # means 0.6, 0.7, 0.6
    assert statistics.gain(*rows) == pytest.approx(0.1) and statistics.gain(*rows[:2]) == 0
    assert statistics.choice_interval(np.array([[0.6, 0.7, 0.8], [0.5, 0.6, 0.7]])) == pytest.approx((0.1, 0.1))
    assert statistics.choice_interval(np.array([[0.5, 0.6, 0.7], [0.6, 0.7, 0.8]])) == (0, 0)
    assert all(map(math.isnan, statistics.choice_interval(rows[:, :2])))


def test_the_choice_is_made_again_in_each_resample():
    rng = np.random.default_rng(5)
    rows = rng.normal(0.8, 0.05, (4, 12))
    gains = []
    for _ in range(20000):
        means = rows[:, rng.integers(0, 12, 12)].mean(1)
        gains.append(means.max() - means[-1])
    assert statistics.choice_interval(rows) == pytest.approx(np.quantile(gains, [0.025, 0.975]), abs=0.002)
    assert statistics.choice_interval(rows) == statistics.choice_interval(rows)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named(wrong):
    for function in (statistics.mean_interval, statistics.t_interval, statistics.wilcoxon, statistics.win_rate):
        with pytest.raises(ValueError, match=rf"\[1\] is {wrong}, expected a finite number"):
            function([0.1, wrong, 0.3, 0.4, 0.5, 0.6])
    with pytest.raises(ValueError, match=rf"y\[1\] is {wrong}"):
        statistics.area([1, 2], [0.5, wrong])
    with pytest.raises(ValueError, match=rf"row\[1\] is {wrong}"):
        statistics.choice_interval(np.array([[0.1, 0.2, 0.3], [0.1, wrong, 0.3]]))
