"""The order of a track's records by their duels: times relative to the fastest, on one reference machine.

Every duel says log(time of A / time of B) with an error. All duels of one machine between records of a track are put
together by least squares, so that records which never met compare through those that both met. All duels weigh alike:
an error of six sittings is too uncertain to weigh by (ten duels of one pair, weighed by it, cover the truth in 90 of
100). Each adds its own error to the interval, which is Student's with the degrees of freedom of Welch and Satterthwaite
(1946). Where several ways between two records disagree by more than their errors say, all errors grow by that factor
(Birge 1932).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from leaderboard.duel import SITTINGS, Ratio

DEGREES = SITTINGS - 1  # of freedom, of a duel's error
T = float(stats.t.ppf(0.975, DEGREES))


class Standings(NamedTuple):
    hardware: str  # the reference machine; empty without duels
    relative: dict[str, Ratio]  # record's name -> its time over the fastest's; the fastest first
    gain: dict[str, Ratio]  # record's name -> its time over that of the next slower one


def standings(duels: Sequence[dict[str, Any]], names: Iterable[str]) -> Standings:
    """Of the records in `names`, those that duels connect: most of them on one machine, among equals the machine of the
    latest duel."""
    known, by_machine = set(names), defaultdict[str, list[dict[str, Any]]](list)
    for duel in duels:
        if {duel["a"]["name"], duel["b"]["name"]} <= known:
            by_machine[duel["hardware"]].append(duel)
    found = [(len(group), max(duel["start_utc"] for duel in of_group), hardware, group, of_group)
             for hardware, its_duels in by_machine.items() for group, of_group in connected(its_duels)]  # fmt: skip
    if not found:
        return Standings("", {}, {})
    *_, hardware, group, its_duels = max(found, key=lambda each: each[:3])
    return Standings(hardware, *solve(its_duels, sorted(group)))


def connected(duels: Sequence[dict[str, Any]]) -> list[tuple[set[str], list[dict[str, Any]]]]:
    """Groups of records that duels connect, each with its duels."""
    groups: list[tuple[set[str], list[dict[str, Any]]]] = []
    for duel in duels:
        names, its_duels = {duel["a"]["name"], duel["b"]["name"]}, [duel]
        for group in [group for group in groups if group[0] & names]:
            names, its_duels = names | group[0], group[1] + its_duels
            groups.remove(group)
        groups.append((names, its_duels))
    return groups


def solve(duels: Sequence[dict[str, Any]], names: Sequence[str]) -> tuple[dict[str, Ratio], dict[str, Ratio]]:
    """Times relative to the fastest, and to the next slower one."""
    place = {name: i for i, name in enumerate(names)}
    differences, values, errors = np.zeros((len(duels), len(names))), np.zeros(len(duels)), np.zeros(len(duels))
    for i, duel in enumerate(duels):
        result = duel["results"][duel["decides"]]
        differences[i, [place[duel["a"]["name"]], place[duel["b"]["name"]]]] = 1, -1
        values[i] = math.log(result["estimate"])
        errors[i] = max(1e-6, math.log(result["high"] / result["low"]) / 2 / T)
    shares, variances = np.linalg.pinv(differences), errors**2  # shares: [names, duels], of each duel in each log time
    logs = shares @ values
    misfit = values - differences @ logs
    inflation = 1.0
    if len(duels) >= len(names):  # several ways between two records
        expected = float((1 - np.diag(differences @ shares)) @ variances)
        inflation = math.sqrt(max(1.0, float(misfit @ misfit) / expected))

    def between(i: int, j: int) -> Ratio:
        parts = (shares[i] - shares[j]) ** 2 * variances
        variance = float(parts.sum())
        degrees = DEGREES * variance**2 / float(parts @ parts) if variance else math.inf
        half = inflation * float(stats.t.ppf(0.975, degrees)) * math.sqrt(variance)
        return Ratio(*(math.exp(logs[i] - logs[j] + shift) for shift in (0, -half, half)))

    ordered = sorted(range(len(names)), key=lambda i: logs[i])
    relative = {names[i]: between(i, ordered[0]) for i in ordered}
    return relative, {names[i]: between(i, slower) for i, slower in pairwise(ordered)}
