"""Steps to an event that may not have come by the end of a run: medians, their intervals, and a test.

All runs of a comparison end at the same step at the latest, so that a run without the event is known to be later than
every run with it. The Kaplan-Meier curve is then the share of runs without the event, its median an order statistic
(infinite if more than half of the runs are without), and order statistics also give an interval for it that holds for
any distribution: between the k-th smallest and the k-th largest of n lies the median with probability 1 - 2 P(B < k), B
binomial(n, 1/2). For five runs that is lowest to highest, with 93.75%. With so few runs the log-rank test's usual
normal approximation says too much (n = 3 against 3 apart comes out at 0.02, and cannot be below 0.1), so its p-value
is taken over all divisions of the runs into two groups.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

Times = Sequence[float | None]  # steps; None: not seen


class Median(NamedTuple):
    value: float  # inf: more than half of the runs are without the event
    low: float
    high: float
    coverage: float  # of the interval from low to high


def median(times: Times, confidence: float = 0.95) -> Median:
    """Time at which the Kaplan-Meier curve reaches one half, with the narrowest interval of `confidence` or more.

    Of fewer than six times that is lowest to highest, whatever that covers. Raises ValueError for no times.
    """
    if not times:
        raise ValueError("a median needs at least one time")
    ordered, n = sorted(math.inf if time is None else float(time) for time in times), len(times)
    coverages = [1 - 2 * float(stats.binom.cdf(k - 1, n, 0.5)) for k in range(1, n // 2 + n % 2 + 1)]
    k = max((k for k, coverage in enumerate(coverages, start=1) if coverage >= confidence), default=1)
    return Median(ordered[(n - 1) // 2], ordered[k - 1], ordered[n - k], coverages[k - 1])


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
