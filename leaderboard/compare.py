"""Two records side by side: who is faster, by how much, and whether the data can tell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from leaderboard import stats
from leaderboard.records import Record
from leaderboard.tracks import find_track

ALPHA = 0.05  # below this p a difference is said to be one


@dataclass(frozen=True)
class EqualSteps:
    """Losses of both where both were validated last."""

    step: int
    a: list[float]
    b: list[float]


def equal_steps(a: Record, b: Record) -> EqualSteps | None:
    """The last step after the first at which every run of both has a validation; None without one."""
    curves = [{v.step: v.loss for v in run.validations} for record in (a, b) for run in record.runs]
    common = set.intersection(*(set(curve) for curve in curves)) - {0}
    if not common:
        return None
    step = max(common)
    return EqualSteps(step, *([{v.step: v.loss for v in run.validations}[step] for run in record.runs]
                              for record in (a, b)))  # fmt: skip


def _p(p: float) -> str:
    return f"p={p:.2g}" if p < 0.1 else f"p={p:.2f}"


def _needed(seeds: float) -> str:
    if math.isinf(seeds):
        return "no number of seeds that anyone will run would show a difference of this size"
    return f"to see one of this size in four of five attempts takes about {seeds:.0f} seeds each"


def time_sentence(a: str, b: str, times_a: Sequence[float], times_b: Sequence[float]) -> str:
    """Who is faster, by the share of the other's time that it saves, and the evidence in a second line."""
    if stats.compare_times(times_a, times_b).estimate < 0:  # say it of the faster one
        a, b, times_a, times_b = b, a, times_b, times_a
    found = stats.compare_times(times_a, times_b)
    low, high = (100 * end for end in found.interval)
    numbers = f"{100 * found.estimate:.1f}% faster"
    evidence = f"(95% CI {low:.1f} to {high:.1f}, n={len(times_a)}/{len(times_b)}); {_p(found.p)}"
    details = _details(found, "of the logarithms", 100, 1)
    if found.p < ALPHA:
        return f"{a} is {numbers} than {b} {evidence}.\n{details}"
    sentence = f"The data cannot tell: {a} comes out {numbers} than {b} {evidence}; {_needed(found.seeds_needed)}."
    return f"{sentence}\n{details}"


def loss_sentence(a: str, b: str, losses_a: Sequence[float], losses_b: Sequence[float]) -> str:
    """Whose loss is lower, and the evidence in a second line."""
    if stats.compare_losses(losses_a, losses_b).estimate > 0:
        a, b, losses_a, losses_b = b, a, losses_b, losses_a
    found = stats.compare_losses(losses_b, losses_a)  # by how much a is lower
    low, high = found.interval
    evidence = f"(95% CI {low:.4f} to {high:.4f}, n={len(losses_a)}/{len(losses_b)}); {_p(found.p)}"
    details = _details(found, "of the losses", 1, 4)
    if found.p < ALPHA:
        return f"{a}'s loss is lower than {b}'s by {found.estimate:.4f} {evidence}.\n{details}"
    sentence = f"The data cannot tell: {a}'s loss comes out lower by {found.estimate:.4f} than {b}'s {evidence}"
    return f"{sentence}; {_needed(found.seeds_needed)}.\n{details}"


def _details(found: stats.Comparison, what: str, scale: float, digits: int) -> str:
    bootstrap = ""
    if found.bootstrap:
        low, high = (scale * end for end in found.bootstrap)
        bootstrap = f"; the bootstrap's 95% CI is {low:.{digits}f} to {high:.{digits}f}"
    return f"  Welch's t {what}{bootstrap}; effect (Hedges' g) {abs(found.effect):.1f} standard deviations"


def compare(a: Record, b: Record) -> str:
    """Several lines for the terminal. Raises ValueError for records of two tracks or with a single seed."""
    if a.path.parent.name != b.path.parent.name:
        raise ValueError(f"{a.name} and {b.name} are of two tracks; only records of one track compare")
    track, name_a, name_b = find_track(a.path.parent.name), a.path.name, b.path.name
    lines = [f"A = {a.name}: {len(a.runs)} seeds, {a.steps} steps, {a.hardware}"]
    lines += [f"B = {b.name}: {len(b.runs)} seeds, {b.steps} steps, {b.hardware}", ""]
    if a.hardware != b.hardware:
        lines += [f"Time: {a.hardware} and {b.hardware} are two clocks; times on them do not compare.", ""]
    else:
        lines += ["Time to target: " + time_sentence(name_a, name_b, a.times, b.times), ""]
    same = equal_steps(a, b)
    if same is None:
        lines += ["Loss: there is no step at which all runs of both were validated.", ""]
    else:
        lines += [f"Loss at step {same.step}: " + loss_sentence(name_a, name_b, same.a, same.b), ""]
    lines += [_steps(a, b, track.step_threshold, track.nats_per_100_steps), ""]
    config_a, config_b = a.runs[0].config, b.runs[0].config
    changed = [key for key in {**config_a, **config_b} if config_a.get(key) != config_b.get(key)]
    changed = [key for key in changed if key not in ("name", "description", "author", "seed", "run_dir")]
    sources = [run.log.sources for run in (a.runs[0], b.runs[0])]
    files = sorted(path for path in {*sources[0], *sources[1]} if sources[0].get(path) != sources[1].get(path))
    if config_a and config_b:
        lines += ["Settings that differ: " + (", ".join(
            f"{key} {config_a.get(key)!r} / {config_b.get(key)!r}" for key in changed) or "none")]  # fmt: skip
    lines += ["Source files that differ: " + (", ".join(files) or "none")]
    return "\n".join(lines) + "\n"


def _steps(a: Record, b: Record, threshold: float, worth: float) -> str:
    """The optimization track's rule, where the track has one."""
    if not threshold:
        return f"Steps: {a.steps} / {b.steps}; the track has no rule for steps."
    beats = stats.step_rule_between(a.losses, a.steps, b.losses, b.steps, worth)
    better, other = (a, b) if beats >= 0 else (b, a)
    verdict = "beats" if abs(beats) >= threshold else "does not beat"
    return (
        f"Steps: {a.steps} / {b.steps}; {better.path.name} {verdict} {other.path.name} by the track's rule: "
        f"{abs(beats):.4f}, {threshold:g} or more is asked for."
    )
