"""Several arms against one: differences of runs with the same seed, and p-values corrected for how many there are."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np
from scipy import stats

Name = TypeVar("Name")
LEVEL = 0.05  # below this a corrected p-value says that there is a difference


class Paired(NamedTuple):
    """How the losses of an arm differ from those of the baseline at the same seeds, by Student's t, paired."""

    mean: float
    low: float  # 95% interval of this comparison alone
    high: float
    p: float  # two-sided

    @property
    def told(self) -> tuple[str, str]:
        """The mean and its interval, as tables have them."""
        return f"{self.mean:+.4f}", f"{self.low:+.4f} to {self.high:+.4f}"


def paired(losses: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Of a single seed the interval is unbounded and p is 1; p is 1 as well where no seed differs, 0 where all differ
    by the same."""
    differences = np.subtract(losses, baseline)
    mean, n = float(differences.mean()), len(differences)
    if n < 2:
        return Paired(mean, -math.inf, math.inf, 1.0)
    error = float(stats.sem(differences))
    half = float(stats.t.ppf(0.975, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Paired(mean, mean - half, mean + half, p)


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's adjusted p-values: rejecting those below a level keeps the chance of any false rejection below it."""
    ordered = sorted(p_values, key=p_values.__getitem__)
    scaled = (min(1.0, (len(ordered) - rank) * p_values[name]) for rank, name in enumerate(ordered))
    return dict(zip(ordered, accumulate(scaled, max), strict=True))


def against(
    losses: Mapping[Name, Sequence[float | None]], baseline: Name
) -> tuple[dict[Name, Paired], dict[Name, float]]:
    """Of every arm but `baseline`: how it differs from it, and p after Holm's correction for all of them. Without arms
    that diverged (None)."""
    of_all = {name: [x for x in of_arm if x is not None] for name, of_arm in losses.items()}
    whole = {name: found for name, found in of_all.items() if len(found) == len(losses[name])}
    if (others := whole.pop(baseline, None)) is None:
        return {}, {}
    found = {name: paired(of_arm, others) for name, of_arm in whole.items()}
    return found, holm({name: each.p for name, each in found.items()})
