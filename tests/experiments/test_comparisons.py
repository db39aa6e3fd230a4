"""Differences from a baseline and Holm's correction: by scipy, by hand, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.comparisons import against, holm, paired


def test_differences_are_those_of_a_paired_t_test() -> None:
    losses, baseline = [1.2, 1.25, 1.22, 1.19], [1.21, 1.28, 1.21, 1.24]
    found, right = paired(losses, baseline), stats.ttest_rel(losses, baseline)
    interval = right.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, right.pvalue))
    assert found.mean == pytest.approx(np.mean(losses) - np.mean(baseline))
    assert paired([1.0], [2.0]) == (-1.0, -math.inf, math.inf, 1.0)
    assert paired([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 0.0, 1.0)
    assert paired([1.0, 2.0], [0.5, 1.5]) == (0.5, 0.5, 0.5, 0.0)


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0}


def test_arms_that_diverged_are_no_comparison() -> None:
    losses = {"plain": [1.0, 1.1, 1.2], "a": [1.1, 1.21, 1.29], "b": [None, 1.0, 1.0], "c": [1.3, 1.2, 1.25]}
    found, adjusted = against(losses, "plain")
    assert list(found) == ["a", "c"]
    assert adjusted == {"a": pytest.approx(2 * found["a"].p), "c": pytest.approx(found["c"].p)}
    assert against(losses, "b") == ({}, {})


def test_one_of_ten_equal_arms_is_called_different_in_5_of_100() -> None:
    """Against one baseline with the same seeds, 1,000 times: 5 of 100 at most; without correction in far more."""
    draws = np.random.default_rng(5).normal(0, 1, (1000, 11, 5))
    p = stats.ttest_rel(draws[:, 1:], draws[:, :1], axis=2).pvalue
    corrected = sum(min(holm(dict(enumerate(of_one))).values()) < 0.05 for of_one in p.tolist())
    assert corrected <= 50 + 5 * math.sqrt(1000 * 0.05 * 0.95)
    assert (p.min(1) < 0.05).sum() > 150
