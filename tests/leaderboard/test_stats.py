"""The leaderboard's statistics: published data with a known answer, plain formulas, and coverage by simulation."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats as scipy_stats

from leaderboard import stats
from leaderboard.compare import loss_sentence, time_sentence
from leaderboard.stats import Interval
from leaderboard.tracks import SIGNIFICANCE

# A published record's 20 final losses at step 3175; its README says p = 0.188, without the square root of n.
PUBLISHED = [
    3.27786, 3.28008, 3.27844, 3.27927, 3.28024, 3.27936, 3.27928, 3.27934, 3.27777, 3.27911,
    3.27863, 3.27701, 3.27670, 3.27741, 3.27959, 3.27911, 3.27828, 3.27938, 3.28119, 3.27888,
]  # fmt: skip
A, B = [61.0, 63.5, 60.2, 64.1, 62.0], [70.1, 69.0, 72.5, 71.3, 68.8]


def test_the_published_losses_are_below_their_target() -> None:
    """z = 3.96 and p = 3.8e-5, from the mean in five decimals as its author printed it; 3.968 from all digits."""
    z, p = stats.z_below([round(float(np.mean(PUBLISHED)), 5)] * 20, 3.28, 0.0013)
    assert z == pytest.approx(3.96, abs=0.005)
    assert p == pytest.approx(3.8e-5, rel=0.01)
    z, p = stats.z_below(PUBLISHED, 3.28, 0.0013)
    assert z == pytest.approx(3.9682, abs=1e-4)
    assert p == pytest.approx(3.62e-5, rel=0.002)
    assert stats.step_rule(PUBLISHED, 3.28) == pytest.approx(z * 0.0013)
    one = (3.28 - np.mean(PUBLISHED)) / 0.0013
    assert scipy_stats.norm.sf(one) == pytest.approx(0.188, abs=0.001)  # what was printed: n forgotten


def test_p_below_is_a_one_sided_t_test() -> None:
    n, mean, sd = len(PUBLISHED), np.mean(PUBLISHED), np.std(PUBLISHED, ddof=1)
    assert stats.p_below(PUBLISHED, 3.28) == pytest.approx(
        scipy_stats.t.cdf((mean - 3.28) / (sd / math.sqrt(n)), n - 1)
    )
    assert stats.p_below([3.1, 3.2], 3.0) > 0.5
    assert stats.p_below([3.1], 3.28) == stats.p_below([3.1, 3.1], 3.28) == 1.0


def test_mean_interval_by_the_table() -> None:
    """t of 4 degrees of freedom at 97.5% is 2.776."""
    half = 2.7764451 * np.std(A, ddof=1) / math.sqrt(5)
    assert stats.mean_interval(A) == pytest.approx((np.mean(A) - half, np.mean(A) + half))
    assert stats.mean_interval([1.0]) == (-math.inf, math.inf)


def test_compare_losses_by_the_formulas() -> None:
    found = stats.compare_losses(A, B)
    variances = np.var(A, ddof=1) / 5, np.var(B, ddof=1) / 5
    error = math.sqrt(sum(variances))
    degrees = sum(variances) ** 2 / sum(variance**2 / 4 for variance in variances)
    t = (np.mean(A) - np.mean(B)) / error
    assert found.p == pytest.approx(2 * scipy_stats.t.sf(abs(t), degrees))
    half = scipy_stats.t.ppf(0.975, degrees) * error
    assert found.interval == pytest.approx((np.mean(A) - np.mean(B) - half, np.mean(A) - np.mean(B) + half))
    pooled = math.sqrt((np.var(A, ddof=1) + np.var(B, ddof=1)) / 2)
    assert found.effect == pytest.approx((np.mean(A) - np.mean(B)) / pooled * (1 - 3 / 31))


def test_times_compare_as_ratios_whatever_their_unit() -> None:
    found = stats.compare_times(A, B)
    ratio = math.exp(np.mean(np.log(A)) - np.mean(np.log(B)))
    assert found.estimate == pytest.approx(1 - ratio)
    assert found.interval.low < found.estimate < found.interval.high
    in_ms = stats.compare_times([1000 * a for a in A], [1000 * b for b in B])
    for one, same in zip(in_ms, found, strict=True):
        assert one == pytest.approx(same)
    other = stats.compare_times(B, A)
    assert 1 - other.estimate == pytest.approx(1 / ratio)
    assert other.p == pytest.approx(found.p)


def test_two_singles_or_no_spread_do_not_compare() -> None:
    with pytest.raises(ValueError, match="two of each are the least"):
        stats.compare_losses([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="spread"):
        stats.compare_losses([1.0, 1.0], [2.0, 2.0])
    with pytest.raises(ValueError, match="not finite"):
        stats.compare_losses([1.0, float("nan")], [2.0, 2.0])
    assert stats.compare_losses([1.0, 1.1], [2.0, 2.1]).bootstrap is None


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 394), (0.5, 64), (0.8, 26), (1.0, 17), (3.0, 4)])
def test_detectable_by_the_tables_of_power(effect: float, seeds: int) -> None:
    """Cohen (1988): two-sided t-test at 5%, power 80%."""
    enough, too_few = (stats.detectable(2 * math.sqrt(2 / n), 2 * n - 2) for n in (seeds, seeds - 1))
    assert enough <= 2 * effect < too_few


@pytest.mark.parametrize("sizes", [(2, 2), (5, 5), (3, 10)], ids=str)
def test_a_detectable_difference_is_seen_in_80_of_100(sizes: tuple[int, int]) -> None:
    """20,000 pairs of samples that far apart: within 5 standard deviations of the binomial, 1.4%."""
    error = 0.4 * math.sqrt(1 / sizes[0] + 1 / sizes[1])
    rng, difference = np.random.default_rng(3), stats.detectable(error, sum(sizes) - 2)
    a, b = rng.normal(1 + difference, 0.4, (20_000, sizes[0])), rng.normal(1, 0.4, (20_000, sizes[1]))
    seen = scipy_stats.ttest_ind(a, b, axis=1).pvalue < 0.05
    assert float(seen.mean()) == pytest.approx(0.8, abs=5 * math.sqrt(0.8 * 0.2 / 20_000))


def test_what_can_be_detected_is_not_what_was_observed() -> None:
    """The same spread and sizes, another difference: the same answer; of times as a share of the slower one's."""
    far = [b + 100 for b in B]
    assert stats.compare_losses(A, far).detectable == pytest.approx(stats.compare_losses(A, B).detectable)
    pooled = math.sqrt((np.var(np.log(A), ddof=1) + np.var(np.log(B), ddof=1)) / 2)
    assert stats.compare_times(A, B).detectable == pytest.approx(
        1 - math.exp(-stats.detectable(pooled * math.sqrt(2 / 5), 8))
    )


def test_losses_of_the_same_seeds_compare_one_by_one() -> None:
    """What a seed does to both of a pair is no noise: 0.01 shows beside a spread of 0.04, unpaired it does not."""
    a, b = [1.25, 1.31, 1.23, 1.27, 1.28], [1.261, 1.321, 1.239, 1.279, 1.291]
    found, right = stats.compare_losses(a, b, paired=True), scipy_stats.ttest_rel(a, b)
    assert (found.p, *found.interval) == pytest.approx((right.pvalue, *right.confidence_interval(0.95)))
    assert found.bootstrap is None
    error = np.std(np.subtract(a, b), ddof=1) / math.sqrt(5)
    assert found.detectable == pytest.approx(stats.detectable(error, 4))
    assert loss_sentence("a", "b", b, a, by_seed=True).startswith("b's loss is lower than a's by 0.0102 (95% CI 0.00")
    assert loss_sentence("a", "b", b, a).startswith("The data cannot tell: b's loss comes out lower")
    assert loss_sentence("a", "b", a, a, by_seed=True).startswith("The data cannot tell")  # one source, another speed


# The rule of a record: p < 0.01 for the number of runs declared beforehand


def false_records(least: int, most: int, draws: int = 40_000) -> float:
    """Share of recipes whose mean loss is exactly the target that show it below, with runs added one by one to p."""
    losses = np.random.default_rng(4).normal(1.3, 0.003, (draws, most))
    shown = np.zeros(draws, dtype=bool)
    for n in range(least, most + 1):
        shown |= scipy_stats.ttest_1samp(losses[:, :n], 1.3, axis=1, alternative="less").pvalue < SIGNIFICANCE
    for row in losses[:20, :most].tolist():
        assert stats.p_below(row, 1.3) == pytest.approx(scipy_stats.ttest_1samp(row, 1.3, alternative="less").pvalue)
    return float(shown.mean())


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_a_record_at_the_target_is_accepted_in_1_of_100(n: int) -> None:
    """Within 5 standard deviations of the binomial: 0.25%."""
    assert false_records(n, n) == pytest.approx(0.01, abs=5 * math.sqrt(0.01 * 0.99 / 40_000))


@pytest.mark.parametrize(("runs", "share"), [((5, 10), 0.028), ((3, 20), 0.054)], ids=str)
def test_runs_added_until_p_is_small_accept_more(runs: tuple[int, int], share: float) -> None:
    """Why n is declared. The share that docs/leaderboard.md gives, within 5 standard deviations of the binomial."""
    assert false_records(*runs) == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 40_000))


def test_the_step_rule_between_two_records() -> None:
    """0.001 lower and 50 steps fewer, 0.0045 nats a hundred, with 4 runs each: 0.00325 * sqrt(2)."""
    a, b = [3.278] * 4, [3.279] * 4
    assert stats.step_rule_between(a, 3200, b, 3250, 0.0045) == pytest.approx(0.00325 * math.sqrt(2))
    assert stats.step_rule_between(b, 3250, a, 3200, 0.0045) == pytest.approx(-0.00325 * math.sqrt(2))


Draw = Callable[[np.random.Generator, int], np.ndarray]
POPULATIONS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, n: rng.normal(60, 5, n), 60.0),
    "skewed": (lambda rng, n: rng.lognormal(4, 0.1, n), math.exp(4 + 0.005)),
}


def coverage(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


@pytest.mark.parametrize("n", [3, 5, 20])
@pytest.mark.parametrize("population", POPULATIONS)
def test_mean_interval_holds_the_mean_in_95_of_100(population: str, n: int) -> None:
    draw, truth = POPULATIONS[population]
    rng = np.random.default_rng(1)
    assert 0.93 <= coverage([stats.mean_interval(draw(rng, n)) for _ in range(3000)], truth) <= 0.97


@pytest.mark.parametrize("sizes", [(5, 5), (5, 10), (10, 10)], ids=str)
def test_welch_and_bootstrap_hold_the_ratio_in_95_of_100(sizes: tuple[int, int]) -> None:
    """Noisy times, the slower machine noisier: the ratio of geometric means is exp(0.2)."""
    rng, truth = np.random.default_rng(2), 1 - math.exp(0.2)
    found = []
    for _ in range(1000):
        slow, fast = rng.lognormal(4.2, 0.08, sizes[0]), rng.lognormal(4.0, 0.05, sizes[1])
        found.append(stats.compare_times(slow.tolist(), fast.tolist(), resamples=499))
    assert 0.93 <= coverage([one.interval for one in found], truth) <= 0.97
    assert 0.93 <= coverage([one.bootstrap for one in found if one.bootstrap], truth) <= 0.97


# What people read


def test_a_difference_is_said_in_one_sentence() -> None:
    found = stats.compare_times(A, B)
    low, high = (f"{100 * end:.1f}" for end in found.interval)
    expected = f"a is {100 * found.estimate:.1f}% faster than b (95% CI {low} to {high}, n=5/5); p={found.p:.2g}."
    assert time_sentence("a", "b", A, B).splitlines()[0] == expected
    assert time_sentence("b", "a", B, A).splitlines()[0] == expected  # of the faster one, whichever comes first
    assert loss_sentence("a", "b", A, B).startswith(
        f"a's loss is lower than b's by {np.mean(B) - np.mean(A):.4f} (95% CI "
    )


def test_what_the_data_cannot_tell_is_said() -> None:
    close = [61.3, 63.2, 60.9, 64.4, 61.7]
    sentence = time_sentence("a", "b", A, close)
    assert sentence.startswith("The data cannot tell: a comes out 0.")
    least = f"{100 * stats.compare_times(A, close).detectable:.1f}%"
    assert sentence.splitlines()[0].endswith(f"; as many runs would show a difference of {least} in 4 of 5 attempts.")
    assert loss_sentence("a", "b", A, close).startswith("The data cannot tell: a's loss comes out lower than b's by 0.")
