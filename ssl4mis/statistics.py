"""Statistics of a few numbers: intervals, a paired test, Holm's correction, the height of a curve."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 9999
SAME = 1e-12  # values closer than this differ by rounding only
NEEDED = 5  # nonzero differences; below, no outcome of the signed-rank test is rarer than 1 in 8


class Interval(NamedTuple):
    """Limits of a confidence interval in the unit of its values; both NaN where too few values tell nothing."""

    low: float
    high: float


UNKNOWN = Interval(float("nan"), float("nan"))


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """BCa bootstrap interval of the mean of independent values, such as the scores of patients.

    The seed is fixed, so that the same values in the same order give the same bytes. NaN below 3 values; the value
    itself where all are the same, for which BCa is undefined. Raises ValueError where a value is not finite.
    Efron (1987), Better bootstrap confidence intervals; computed by scipy.stats.bootstrap.
    """
    from scipy import stats

    values = _finite(values, "values")
    if len(values) < 3:
        return UNKNOWN
    if np.ptp(values) <= SAME:
        return Interval(float(values.min()), float(values.max()))
    found = stats.bootstrap((values,), np.mean, confidence_level=level, n_resamples=RESAMPLES, method="BCa",
                            rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
    return Interval(float(found.low), float(found.high))


def choice_interval(rows: np.ndarray, level: float = 0.95) -> Interval:
    """Percentile bootstrap interval of what the best of several rows has over the last one, by their means.

    `rows` (choices, patients): patients are resampled for all rows at once, and the best row is chosen again in each
    resample. The fixed seed is as in `mean_interval`; BCa is undefined where most resamples give 0. NaN below 3
    patients. Raises ValueError where a number is not finite.
    """
    from scipy import stats

    for row in rows:
        _finite(row, "row")
    if np.shape(rows)[1] < 3:
        return UNKNOWN
    found = stats.bootstrap(tuple(rows), gain, paired=True, vectorized=True, confidence_level=level, batch=500,
                            n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0))  # fmt: skip
    return Interval(float(found.confidence_interval.low), float(found.confidence_interval.high))


def gain(*rows: np.ndarray, axis: int = -1) -> np.ndarray:
    """The best mean of several rows minus the mean of the last one, along an axis; never negative."""
    means = np.stack([np.mean(row, axis) for row in rows])
    return means.max(0) - means[-1]


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean of a few values that are near normal, such as the mean scores of runs.

    NaN below 2 values. Raises ValueError where a value is not finite.
    """
    from scipy import stats

    values = _finite(values, "values")
    if len(values) < 2:
        return UNKNOWN
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(float(values.mean() - half), float(values.mean() + half))


def wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test: are paired differences symmetric about 0?

    Zero differences are dropped. The distribution is the one that SciPy's method "auto" takes: exact up to 50
    differences without ties and zeros and up to 13 with them, else the normal approximation with tie correction.
    NaN where fewer than 5 differences are not 0. Raises ValueError where one is not finite.
    """
    from scipy import stats

    differences = _finite(differences, "differences")
    nonzero = differences[differences != 0]
    if len(nonzero) < NEEDED:
        return float("nan")
    if len(differences) > 13:
        return float(stats.wilcoxon(differences, zero_method="wilcox", method="auto").pvalue)
    # All signs at once, which gives the same number: with ties, stats.wilcoxon takes a second to go through them.
    ranks = stats.rankdata(np.abs(nonzero))
    found = stats.permutation_test((nonzero,), lambda signed, axis: np.sum((signed > 0) * ranks, axis),
                                   permutation_type="samples", vectorized=True)  # fmt: skip
    return float(found.pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's step-down rule, in the given order.

    NaN, a test that was not made, stays and does not count. Raises ValueError for a number outside 0..1.
    Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    for p in ps:
        if p < 0 or p > 1:
            raise ValueError(f"p-value {p}, expected a number from 0 to 1")
    made = sorted((p, place) for place, p in enumerate(ps) if not np.isnan(p))
    adjusted, largest = list(ps), 0.0
    for number, (p, place) in enumerate(made):
        largest = max(largest, min(1.0, (len(made) - number) * p))
        adjusted[place] = largest
    return adjusted


def win_rate(differences: Sequence[float]) -> tuple[int, int, int]:
    """How many differences are above, at and below 0. Raises ValueError where one is not finite."""
    differences = _finite(differences, "differences")
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    return wins, len(differences) - wins - losses, losses


def area(xs: Sequence[float], ys: Sequence[float], log2: bool = False) -> float:
    """Mean height of the curve of straight lines through the points, between its first and last x.

    With `log2` the axis is the base-2 logarithm of x: each doubling counts the same. The unit is that of y; NaN below
    2 points. Raises ValueError for numbers that are not finite, x that occurs twice, or x of 0 and less with `log2`.
    """
    xs, ys = _finite(xs, "x"), _finite(ys, "y")
    if len(set(xs)) < len(xs) or (log2 and (xs <= 0).any()):
        raise ValueError(f"x {xs.tolist()}, expected different numbers{' above 0' * log2}")
    if len(xs) < 2:
        return float("nan")
    order = np.argsort(xs)
    axis = np.log2(xs[order]) if log2 else xs[order]
    return float(np.trapezoid(ys[order], axis) / (axis[-1] - axis[0]))


def _finite(values, name):
    """The values as an array (n,); a mean over NaN must never pass silently."""
    values = np.asarray(values, dtype=float)
    for place, value in enumerate(values):
        if not np.isfinite(value):
            raise ValueError(f"{name}[{place}] is {value}, expected a finite number")
    return values
