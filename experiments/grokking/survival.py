"""Steps to an event that may not have come by the end of a run: medians, ratios with their intervals, and a test.

All runs of a comparison end at the same step at the latest, so that a run without the event is later than every run
with it, and ranks are known. With as few runs as here nothing is taken from a normal approximation: intervals are order
statistics, and p-values are over divisions of the runs into two groups. Both take the groups for independent. Here runs
of both share their seeds, so split, batches and weights at the start: where that makes them alike, intervals are wider
and p-values larger than they need be.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import stats

Times = Sequence[float | None]  # steps; None: not seen
DRAWS = 9999
LEAST_P = 2 / (DRAWS + 1)


class Ratio(NamedTuple):
    """Of the steps of one group to those of another, with an interval for it."""

    least: float  # the estimate lies between these two, which are equal where no run that it depends on was cut off
    most: float
    low: float
    high: float
    coverage: float  # of the interval from low to high


def median(times: Times) -> float:
    """The lower median, inf if more than half of the runs are without the event. Raises StatisticsError for none."""
    return statistics.median_low(math.inf if time is None else time for time in times)


def ratio(times: Times, baseline: Times, last: float, resolution: float = 0.0, confidence: float = 0.95) -> Ratio:
    """Hodges and Lehmann's estimate of a factor between two groups: the median of all ratios of a run's steps to a
    run's of the baseline, with the interval between the k-th lowest and the k-th highest of them, which inverts the
    Mann-Whitney test; of few runs, that is lowest to highest, whatever that covers.

    A run without the event has taken `last` steps or more, and one with it up to `resolution` fewer than it was seen
    after. Each ratio lies between two bounds: the interval's ends are of the lower and of the upper ones. The estimate
    is of the steps as they were seen.
    """
    bounds = [(_bounds(mine, last, 0), _bounds(other, last, 0)) for mine in times for other in baseline]
    wide = [(_bounds(mine, last, resolution), _bounds(other, last, resolution)) for mine in times for other in baseline]
    n, m = len(times), len(baseline)
    tails = [2 * sum(num_splits(n, m, u) for u in range(k)) / math.comb(n + m, n) for k in range(1, n * m // 2 + 1)]
    k = max((k for k, tail in enumerate(tails, start=1) if tail <= 1 - confidence + 1e-12), default=1)
    low = sorted(mine[0] / other[1] for mine, other in wide)[k - 1]
    high = sorted(mine[1] / other[0] for mine, other in wide)[-k]
    least, most = (statistics.median(mine[end] / other[1 - end] for mine, other in bounds) for end in (0, 1))
    return Ratio(least, most, low, high, 1 - tails[k - 1] if tails else 0.0)


def _bounds(time: float | None, last: float, resolution: float) -> tuple[float, float]:
    """The steps that a run has taken, at least and at most. The least is not 0, to be divided by."""
    return (last, math.inf) if time is None else (max(time - resolution, 1e-9), time)


@cache
def num_splits(n: int, m: int, u: int) -> int:
    """In how many orders of n runs and m others, u of the pairs have the one before the other."""
    if u < 0 or not (n and m):
        return int(u == 0)
    return num_splits(n - 1, m, u - m) + num_splits(n, m - 1, u)


def rank_test(times: Times, baseline: Times) -> float | None:
    """Two-sided p-value of the Mann-Whitney test over all permutations, or DRAWS of them; None without any event."""
    if not any(time is not None for time in (*times, *baseline)):
        return None
    scores = rank_scores(times, baseline)
    groups = scores[: len(times)], scores[len(times) :]
    result = stats.permutation_test(groups, _difference_of_sums, vectorized=True, n_resamples=DRAWS, rng=0)
    return float(result.pvalue)


def _difference_of_sums(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(x.sum(axis) - y.sum(axis))


def rank_scores(times: Times, baseline: Times) -> np.ndarray:
    """The rank of each run, `times` first, less their mean; runs without the event are last and alike."""
    ranks = stats.rankdata([math.inf if time is None else time for time in (*times, *baseline)])
    return np.asarray(ranks - ranks.mean())


def stratified_rank_test(strata: Sequence[tuple[Times, Times]]) -> float:
    """Two-sided p-value of one question asked in several settings, each a (times, baseline).

    The settings' sums of ranks are added up; runs change groups within their setting alone, in DRAWS random
    permutations, so that p is LEAST_P at least.
    """
    return min(1.0, 2 * min(stratified_tails(strata)))


def stratified_tails(strata: Sequence[tuple[Times, Times]]) -> tuple[float, float]:
    """The one-sided p-values of the same test: of ranks as low as these, and as high."""
    rng, observed, drawn = np.random.default_rng(0), 0.0, np.zeros(DRAWS)
    for times, baseline in strata:
        scores = rank_scores(times, baseline)
        observed += scores[: len(times)].sum()
        drawn += rng.permuted(np.tile(scores, (DRAWS, 1)), axis=1)[:, : len(times)].sum(1)
    low, high = (float((1 + (sign * drawn <= sign * observed + 1e-9).sum()) / (DRAWS + 1)) for sign in (1, -1))
    return low, high


def common_ratio(
    strata: Sequence[tuple[Times, Times]], last: float, resolution: float = 0.0, confidence: float = 0.95
) -> tuple[float, float, float]:
    """The factor by which one group's steps have to be divided in all settings for the stratified rank test to see no
    difference, and the lowest and highest factor that it does not reject; 0 and inf where it rejects none.

    A run that is cut off at `last` is cut off at `last / factor` after the division: what is later than either is
    taken as not seen. `resolution` as in `ratio`.
    """

    def tails(factor: float, *shifts: float) -> tuple[float, float]:
        latest = min(last, last / factor)
        divided = []
        for groups in strata:
            steps = [[None if time is None else max(time - shift, 1.0) / divisor for time in group]
                     for group, shift, divisor in zip(groups, shifts, (factor, 1.0), strict=True)]  # fmt: skip
            mine, other = ([None if time is None or time > latest else time for time in group] for group in steps)
            divided.append((mine, other))
        return stratified_tails(divided)

    def lean(factor: float) -> float:
        is_low, is_high = tails(factor, 0.0, 0.0)
        return is_low - is_high

    half = (1 - confidence) / 2
    low = _bisected(lambda factor: tails(factor, resolution, 0.0)[1] > half)
    high = _bisected(lambda factor: tails(factor, 0.0, resolution)[0] <= half)
    ends = _bisected(lambda factor: lean(factor) <= 0), _bisected(lambda factor: lean(factor) < 0)
    return math.sqrt(ends[0] * ends[1]), low, high  # the middle of all factors at which neither is before the other


def _bisected(is_above: Callable[[float], bool]) -> float:
    """The factor above which this is so, to a thousandth; 0 or inf beyond a factor of 1,000."""
    low, high = 1e-3, 1e3
    if is_above(low):
        return 0.0
    if not is_above(high):
        return math.inf
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return math.sqrt(low * high)
