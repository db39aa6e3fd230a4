"""Steps to an event that may not have come by the end of a run: medians, ratios with their intervals, and a test.

All runs of a comparison end at the same step at the latest, so that a run without the event is known to be later than
every run with it. With as few runs as here nothing is taken from a normal approximation (n = 3 against 3 apart comes
out at p = 0.02 by the usual log-rank test, and cannot be below 0.1): intervals are order statistics, and p-values are
over all divisions of the runs into two groups.
"""

import math
import statistics
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import stats

Times = Sequence[float | None]  # steps; None: not seen


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


def ratio(times: Times, baseline: Times, last: float, confidence: float = 0.95) -> Ratio:
    """Hodges and Lehmann's estimate of a factor between two groups: the median of all ratios of a run's steps to a
    run's of the baseline, with the interval between the k-th lowest and the k-th highest of them, which inverts the
    exact Mann-Whitney test; of few runs, that is lowest to highest, whatever that covers.

    A run without the event has taken `last` steps or more: each ratio lies between two bounds, the lower end of the
    interval is of the lower ones and the upper end of the upper ones.
    """
    lower, upper = [], []
    for mine in times:
        for other in baseline:
            lower.append(0.0 if other is None else (last if mine is None else mine) / other)
            upper.append(math.inf if mine is None else mine / (last if other is None else other))
    lower.sort()
    upper.sort()
    n, m = len(times), len(baseline)
    tails = [2 * sum(num_splits(n, m, u) for u in range(k)) / math.comb(n + m, n) for k in range(1, n * m // 2 + 1)]
    k = max((k for k, tail in enumerate(tails, start=1) if tail <= 1 - confidence + 1e-12), default=1)
    covered = 1 - (tails[k - 1] if tails else 1.0)
    return Ratio(statistics.median(lower), statistics.median(upper), lower[k - 1], upper[-k], covered)


@cache
def num_splits(n: int, m: int, u: int) -> int:
    """In how many orders of n runs and m others, u of the pairs have the one before the other."""
    if u < 0 or not (n and m):
        return int(u == 0)
    return num_splits(n - 1, m, u - m) + num_splits(n, m - 1, u)


def logrank(times: Times, baseline: Times) -> float | None:
    """Two-sided p-value of the log-rank test over all permutations, or 9999 of them; None: nothing was seen."""
    scores = logrank_scores(times, baseline)
    if not scores.any():
        return None
    groups = scores[: len(times)], scores[len(times) :]
    found = stats.permutation_test(groups, lambda x, y, axis: x.sum(axis) - y.sum(axis), vectorized=True, rng=0)
    return float(found.pvalue)


def logrank_scores(times: Times, baseline: Times) -> np.ndarray:
    """A score for each run, `times` first: 1 for its event less the pooled cumulative hazard up to its end.

    Their sum over a group is the events observed there minus those expected; their sum over both is 0.
    """
    pooled = np.array([math.inf if time is None else time for time in (*times, *baseline)])
    seen = np.unique(pooled[np.isfinite(pooled)])
    hazard = np.array([(pooled == step).sum() / (pooled >= step).sum() for step in seen])
    return np.isfinite(pooled) - np.array([np.sum(hazard, where=seen <= time) for time in pooled])


def stratified_logrank(strata: Sequence[tuple[Times, Times]], draws: int = 9999) -> float:
    """Two-sided p-value of one question asked in several settings, each a (times, baseline).

    The settings' observed minus expected events are added up; runs change groups within their setting alone, in
    `draws` random permutations, so that p is 1 / (draws + 1) at least.
    """
    rng, observed, drawn = np.random.default_rng(0), 0.0, np.zeros(draws)
    for times, baseline in strata:
        scores = logrank_scores(times, baseline)
        observed += scores[: len(times)].sum()
        drawn += rng.permuted(np.tile(scores, (draws, 1)), axis=1)[:, : len(times)].sum(1)
    return float(((np.abs(drawn) >= abs(observed) - 1e-9).sum() + 1) / (draws + 1))
