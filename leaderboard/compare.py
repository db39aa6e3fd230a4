"""Two records side by side: who is faster, by how much, and whether the data can tell."""

from collections.abc import Callable, Sequence

import numpy as np

from leaderboard import stats
from leaderboard.changes import changes
from leaderboard.records import Record
from leaderboard.tracks import Track, find_track

ALPHA = 0.05  # below this p a difference is said to be one


def equal_steps(a: Record, b: Record) -> tuple[int, list[float], list[float]] | None:
    """The last step after the first at which every run of both has a validation, with the losses of both; None without
    one."""
    curves = [[{v.step: v.loss for v in run.validations} for run in record.runs] for record in (a, b)]
    common = set.intersection(*(set(curve) for curve in (*curves[0], *curves[1]))) - {0}
    if not common:
        return None
    losses_a, losses_b = ([curve[max(common)] for curve in of_record] for of_record in curves)
    return max(common), losses_a, losses_b


def time_sentence(a: str, b: str, times_a: Sequence[float], times_b: Sequence[float]) -> str:
    """Who is faster, by the share of the other's time that it saves, and the evidence in a second line."""
    if stats.compare_times(times_a, times_b).estimate < 0:  # say it of the faster one
        a, b, times_a, times_b = b, a, times_b, times_a
    found, sizes = stats.compare_times(times_a, times_b), f"n={len(times_a)}/{len(times_b)}"

    def claim(verb: str, by: str) -> str:
        return f"{a} {verb} {by} faster than {b}"

    return _sentence(found, sizes, claim, "Welch's t of the logarithms", 100, 1, "%")


def loss_sentence(
    a: str, b: str, losses_a: Sequence[float], losses_b: Sequence[float], by_seed: bool = False
) -> str:  # fmt: skip
    """Whose loss is lower, and the evidence in a second line. by_seed: losses of the same seeds, in their order."""
    if np.mean(losses_a) > np.mean(losses_b):
        a, b, losses_a, losses_b = b, a, losses_b, losses_a
    paired = by_seed and bool(np.ptp(np.subtract(losses_a, losses_b)))
    found, sizes = stats.compare_losses(losses_b, losses_a, paired=paired), f"n={len(losses_a)}/{len(losses_b)}"

    def claim(verb: str, by: str) -> str:
        return f"{a}'s loss {verb} lower than {b}'s by {by}"

    return _sentence(found, sizes, claim, "Paired t of losses by seed" if paired else "Welch's t of the losses", 1, 4)


def _sentence(
    found: stats.Comparison, sizes: str, claim: Callable[[str, str], str], what: str, scale: float, digits: int,
    unit: str = "",
) -> str:  # fmt: skip
    """`claim`, of a verb and of a difference in digits, as strongly as the data allow; the test in a second line."""

    def interval(low: float, high: float) -> str:
        return f"95% CI {scale * low:.{digits}f} to {scale * high:.{digits}f}"

    p = f"p={found.p:.2g}" if found.p < 0.1 else f"p={found.p:.2f}"
    by, evidence = f"{scale * found.estimate:.{digits}f}{unit}", f"({interval(*found.interval)}, {sizes}); {p}"
    if found.p < ALPHA:
        sentence = f"{claim('is', by)} {evidence}."
    else:
        least = f"{scale * found.detectable:.{digits}f}{unit}"
        seen = f"as many runs would show a difference of {least} in 4 of 5 attempts"
        sentence = f"The data cannot tell: {claim('comes out', by)} {evidence}; {seen}."
    bootstrap = f"; bootstrap: {interval(*found.bootstrap)}" if found.bootstrap else ""
    effect = f"effect (Hedges' g) {abs(found.effect):.1f} standard deviations"
    return f"{sentence}\n  {what}{bootstrap}; {effect}"


def compare(a: Record, b: Record) -> str:
    """Several lines for the terminal. Raises ValueError for records of two tracks or with a single seed."""
    if a.path.parent.name != b.path.parent.name:
        raise ValueError(f"{a.name} and {b.name} are of two tracks; only records of one track compare")
    track, name_a, name_b = find_track(a.path.parent.name), a.path.name, b.path.name
    lines = [f"A = {a.name}: {len(a.runs)} seeds, {a.steps} steps, {a.hardware}"]
    lines += [f"B = {b.name}: {len(b.runs)} seeds, {b.steps} steps, {b.hardware}", ""]
    if a.hardware != b.hardware:
        lines += [f"Time: {a.hardware} and {b.hardware} are two clocks; a duel compares times.", ""]
    else:
        lines += ["Time to target: " + time_sentence(name_a, name_b, a.times, b.times), ""]
    if same := equal_steps(a, b):
        step, losses_a, losses_b = same
        starts = [[(run.seed, run.config.get("data_start")) for run in record.runs] for record in (a, b)]
        by_seed = starts[0] == starts[1] and all(start == "seed" for _, start in starts[0])  # the same text for both
        lines += [f"Loss at step {step}: " + loss_sentence(name_a, name_b, losses_a, losses_b, by_seed), ""]
    else:
        lines += ["Loss: there is no step at which all runs of both were validated.", ""]
    lines += [_steps(a, b, track), ""]
    changed = changes(a, b)
    if a.runs[0].config and b.runs[0].config:
        told = ", ".join(f"{key} {one} / {other}" for key, (one, other) in changed.settings.items())
        lines += [f"Settings that differ: {told or 'none'}"]
    lines += ["Source files that differ: " + (", ".join(file.path for file in changed.files) or "none")]
    return "\n".join(lines) + "\n"


def _steps(a: Record, b: Record, track: Track) -> str:
    """Where steps rank, who has fewer; the optimization track's rule, where the track has one."""
    threshold = track.step_threshold
    if not threshold:
        rule = "fewer rank first" if track.ranked_by == "steps" else "the track has no rule for steps"
        return f"Steps: {a.steps} / {b.steps}; {rule}."
    beats = stats.step_rule_between(a.losses, a.steps, b.losses, b.steps, track.nats_per_100_steps)
    better, other = (a, b) if beats >= 0 else (b, a)
    verdict = "beats" if abs(beats) >= threshold else "does not beat"
    return (
        f"Steps: {a.steps} / {b.steps}; {better.path.name} {verdict} {other.path.name} by the track's rule: "
        f"{abs(beats):.4f}, {threshold:g} or more is asked for."
    )
