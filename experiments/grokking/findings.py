"""Table, remarks and figure of the experiment, from result.json alone."""

import math
from collections import defaultdict
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.comparisons import holm
from experiments.grokking import survival
from experiments.grokking.protocol import BASELINE, BOXES, LATER, PAIR, PARTS, TUNED
from experiments.grokking.survival import Ratio, median
from experiments.grokking.tasks import TASKS
from experiments.grokking.train import COLLAPSED, GENERALISED, Settings
from harness.figures import pyplot, save

Run = dict[str, Any]
Arm = tuple[str, str]  # part, task


def thinned(run: Run) -> Run:
    """The run as it is kept in a file: with every second measurement, and without what the file says of all."""
    curves = {key: [round(value, 3) for value in values[::2]] for key, values in run["curves"].items()}
    return {**{key: value for key, value in run.items() if key not in ("device", "git_commit")}, "curves": curves}


def tuning_row(run: Run) -> Run:
    """What is kept of a run that settings were chosen by."""
    settings = settings_of(run)
    of_settings = {key: getattr(settings, key) for key in ("task", "optimizer", "max_steps", *TUNED)}
    return {**of_settings, **{key: run[key] for key in ("part", "status", "crossed", "held", "best_val_accuracy")}}


def settings_of(run: Run) -> Settings:
    return Settings(**run["settings"])


def arms_of(result: Run) -> dict[Arm, dict[str, list[Run]]]:
    """The runs by part and task, then by optimizer; without those of `later`."""
    found: dict[Arm, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in result["runs"]:
        if run["part"] != LATER:
            settings = settings_of(run)
            found[run["part"], settings.task][settings.optimizer].append(run)
    return found


def arm_name(arm: Arm) -> str:
    """As in tables: add; mul, batch 128."""
    part, task = arm
    return task if part == "main" else f"{task}, {PARTS[part].text}"


def steps_of(runs: Iterable[Run], key: str = "crossed") -> list[float | None]:
    return [run[key] for run in runs]


def in_words(step: float) -> str:
    return f"{step:,.0f}" if math.isfinite(step) else "late"


def compared(arm: Arm, by_optimizer: dict[str, list[Run]], optimizer: str) -> tuple[survival.Times, survival.Times]:
    """Steps of the optimizer and of AdamW to what their part counts to."""
    milestone = PARTS[arm[0]].milestone
    return steps_of(by_optimizer[optimizer], milestone), steps_of(by_optimizer[BASELINE], milestone)


def last_step(arm: Arm, runs: Iterable[Run]) -> int:
    """The last one that a run which is cut off could have been seen at."""
    latest = min(settings_of(run).max_steps for run in runs)
    return latest - Settings.hold_steps if PARTS[arm[0]].milestone == "held" else latest


def ratio_in_words(ratio: Ratio) -> str:
    if ratio.least == ratio.most:
        return f"{ratio.least:.2f}"
    if ratio.least == 0:
        return f"< {ratio.most:.2f}" if math.isfinite(ratio.most) else "?"
    return f"> {ratio.least:.2f}" if math.isinf(ratio.most) else f"{ratio.least:.2f} to {ratio.most:.2f}"


def interval_in_words(ratio: Ratio) -> str:
    """Without ends that the runs do not give."""
    if ratio.low == 0:
        return f"to {ratio.high:.2f}" if math.isfinite(ratio.high) else "?"
    return f"from {ratio.low:.2f}" if math.isinf(ratio.high) else f"{ratio.low:.2f} to {ratio.high:.2f}"


class Verdict(NamedTuple):
    """An optimizer against AdamW in one part and task."""

    ratio: Ratio
    p: float | None  # None: no run of either got there
    adjusted: float | None  # Holm's, over the tasks of the part


def verdicts(result: Run, optimizer: str) -> dict[Arm, Verdict]:
    arms = {arm: each for arm, each in arms_of(result).items() if BASELINE in each and optimizer in each}
    pairs = {arm: compared(arm, each, optimizer) for arm, each in arms.items()}
    p_values = {arm: survival.rank_test(*pair) for arm, pair in pairs.items()}
    adjusted: dict[Arm, float] = {}
    for part in PARTS:
        adjusted |= holm({arm: p for arm, p in p_values.items() if arm[0] == part and p is not None})
    return {
        arm: Verdict(
            survival.ratio(*pair, last_step(arm, arms[arm][optimizer]), Settings.eval_every),
            p_values[arm],
            adjusted.get(arm),
        )
        for arm, pair in pairs.items()
    }


class Overall(NamedTuple):
    """An optimizer against AdamW over tasks of a part in which the median of either came to 95%."""

    tasks: tuple[str, ...]
    before: int  # tasks with a median before AdamW's, and after it
    after: int
    ratio: float  # common to the tasks, with its 95% interval
    low: float
    high: float
    p: float  # stratified rank test


def overall(result: Run, optimizer: str, part: str = "main", tasks: Container[str] = TASKS) -> Overall | None:
    """None without anything to compare."""
    arms = {
        arm: by_optimizer
        for arm, by_optimizer in arms_of(result).items()
        if arm[0] == part and arm[1] in tasks and {BASELINE, optimizer} <= by_optimizer.keys()
    }
    strata = {arm: compared(arm, by_optimizer, optimizer) for arm, by_optimizer in arms.items()}
    strata = {arm: groups for arm, groups in strata.items() if min(map(median, groups)) < math.inf}
    if not strata:
        return None
    medians = [(median(mine), median(other)) for mine, other in strata.values()]
    before, after = sum(a < b for a, b in medians), sum(a > b for a, b in medians)
    last = min(last_step(arm, arms[arm][optimizer]) for arm in strata)
    common = survival.common_ratio(list(strata.values()), last, Settings.eval_every)
    p = survival.stratified_rank_test(list(strata.values()))
    return Overall(tuple(task for _, task in strata), before, after, *common, p)


def overall_in_words(result: Run, optimizer: str, part: str = "main", tasks: Container[str] = TASKS) -> list[str]:
    """One line, or none without anything to compare."""
    if not (total := overall(result, optimizer, part, tasks)):
        return []
    return [
        f"{optimizer}, {PARTS[part].text}, {' '.join(total.tasks)}: before adamw in {total.before}, after it in "
        f"{total.after}; common ratio {total.ratio:.2f} (95% interval {total.low:.2f} to {total.high:.2f}); stratified "
        f"rank test p {'<' if total.p <= survival.LEAST_P else ''}= {total.p:.1g}"
    ]


def rows(result: Run) -> list[dict[str, str]]:
    """A row of the table for each part and task; steps are medians over the seeds.

    Of AdamW and Muon: memorised / first at 95% / held, and how many runs came to 95% if not all; of others the second.
    """
    table, against_adamw = [], verdicts(result, PAIR[1])
    optimizers = [name for name in BOXES if any(settings_of(run).optimizer == name for run in result["runs"])]
    for arm, by_optimizer in arms_of(result).items():
        row = {"task": arm_name(arm)} | dict.fromkeys(optimizers, "")
        for optimizer, runs in by_optimizer.items():
            keys = ("memorised", "crossed", "held") if optimizer in PAIR else ("crossed",)
            row[optimizer] = " / ".join(in_words(median(steps_of(runs, key))) for key in keys)
            reached = sum(run[PARTS[arm[0]].milestone] is not None for run in runs)
            if reached < len(runs):
                row[optimizer] += f" ({reached} of {len(runs)})"
        verdict = against_adamw.get(arm)
        row["muon / adamw"] = ratio_in_words(verdict.ratio) if verdict else ""
        row["interval"] = interval_in_words(verdict.ratio) if verdict else ""
        row["p (Holm)"] = f"{verdict.adjusted:.2g}" if verdict and verdict.adjusted is not None else ""
        table.append(row)
    return table


def later_rows(result: Run) -> list[dict[str, str]]:
    """What became of generalised runs that were trained on: a row for each optimizer and task, frozen or not. One that
    diverged has lost it."""
    alike: dict[tuple[str, str, bool], list[Run]] = defaultdict(list)
    for run in result["runs"]:
        if run["part"] == LATER:
            settings = settings_of(run)
            alike[settings.optimizer, settings.task, settings.is_frozen].append(run)
    table = []
    for (optimizer, task, is_frozen), runs in alike.items():
        generalised = [run for run in runs if run["crossed"] is not None]
        diverged = sum(run["status"] == "diverged" for run in generalised)
        whole = [run for run in generalised if run["status"] != "diverged"]
        lowest, last = ([run["lowest_after"] for run in whole], [run["curves"]["val_accuracy"][-1] for run in whole])
        table.append({
            "optimizer": optimizer, "task": task, "embedding and head": "frozen" if is_frozen else "trained",
            "settings": str(len(runs)), "came to 95%": str(len(generalised)),
            "later below 95%": str(diverged + sum(accuracy < GENERALISED for accuracy in lowest)),
            "later below 80%": str(diverged + sum(accuracy < COLLAPSED for accuracy in lowest)),
            "below 95% at the end": str(diverged + sum(accuracy < GENERALISED for accuracy in last)),
        })  # fmt: skip
    return table


def edges(result: Run) -> list[str]:
    """Chosen values with fewer than two of those tried beyond them: a better one may lie there."""
    at_edge = []
    for part, by_optimizer in result["chosen"].items():
        for optimizer, chosen in by_optimizer.items():
            for key in TUNED:
                tried = {row[key] for row in result["tuning"] if (row["part"], row["optimizer"]) == (part, optimizer)}
                beyond = [sum(value < chosen[key] for value in tried), sum(value > chosen[key] for value in tried)]
                if min(beyond) < 2:
                    at_edge.append(f"{part}, {optimizer}: {key} {chosen[key]:g}")
    return at_edge


def remarks(result: Run) -> list[str]:
    """Lines below the table: what its columns are, the verdicts, and what was chosen at an edge."""
    options = result["options"]
    lines = [
        f"steps: medians over {len(options['seeds'])} seeds; adamw, muon: memorised / first at 95% / held; late: "
        f"more than half of the runs were not there by the end, which is step {options['max_steps']:,} or "
        f"{Settings.hold_steps} steps of 95%",
    ]
    if of_pair := verdicts(result, PAIR[1]):
        coverage = min(each.ratio.coverage for each in of_pair.values())
        lines.append(
            "muon / adamw: ratio of steps to 95%, or to 95% held, for the settings that were chosen; the interval "
            f"covers {coverage:.0%} or more"
        )
        lines.append(
            "p: rank test by permutation, after Holm's correction over the tasks of a part, not over the parts"
        )
    for optimizer in (name for name in BOXES if name != BASELINE):
        lines += overall_in_words(result, optimizer)
    main = PARTS["main"]
    for part, tasks in (("main", main.tuned_on), ("main", {*main.tasks} - {*main.tuned_on}), ("published", TASKS)):
        lines += [line for line in overall_in_words(result, PAIR[1], part, tasks) if line not in lines]
    for row in later_rows(result):
        lines.append(", ".join(f"{key}: {value}" for key, value in row.items()))
    if at_edge := edges(result):
        lines.append(f"chosen near an edge of its box: {'; '.join(at_edge)}")
    return lines


def draw(result: Run, path: Path) -> None:
    """Curves of accuracy for up to four tasks, and the ratio of Muon's steps to AdamW's with its interval for all."""
    found, against_adamw = arms_of(result), verdicts(result, PAIR[1])
    ranked = [("main", "add"), ("main", "mul"), ("main", "div"), ("full_batch", "add"), *found]
    shown = [arm for arm in dict.fromkeys(ranked) if arm in found][:4]
    heights = 3.0, 0.3 * len(against_adamw) + 1.2
    figure = pyplot().figure(figsize=(12, sum(heights)), layout="constrained")
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=heights)).flat
    axes = above.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axis, arm in zip(axes, shown, strict=True):
        _draw_curves(axis, arm_name(arm), {name: found[arm].get(name, []) for name in PAIR})
    axes[0].set_ylabel("accuracy (dotted: training rows)", fontsize=8)
    axes[0].legend(frameon=False, fontsize=8)
    if against_adamw:
        _draw_ratios(below.subplots(), {arm_name(arm): verdict.ratio for arm, verdict in against_adamw.items()})
    figure.suptitle(result["device"], fontsize=9)
    save(figure, path, dpi=100)


def _draw_curves(axis: Any, name: str, runs_of: dict[str, list[Run]]) -> None:
    for index, (optimizer, runs) in enumerate(runs_of.items()):
        for seed, run in enumerate(runs):
            curves, color, label = run["curves"], f"C{index}", None if seed else optimizer
            step = np.arange(len(curves["val_accuracy"])) * 2 * settings_of(run).eval_every
            axis.plot(step, curves["val_accuracy"], color=color, linewidth=1, label=label)
            axis.plot(step, curves["train_accuracy"], ":", color=color, linewidth=0.6, alpha=0.7)
    axis.set_title(name, fontsize=9)
    axis.set_xlabel("step", fontsize=8)
    axis.set_xscale("symlog", linthresh=100)
    axis.grid(alpha=0.3)


def _draw_ratios(axis: Any, ratios: dict[str, Ratio]) -> None:
    """With their intervals. What is not known, of either, reaches to the frame."""
    finite = [x for each in ratios.values() for x in each if 0 < x < math.inf]
    low, high = min([*finite, 0.5]) / 1.3, max([*finite, 2.0]) * 1.3
    for row, each in enumerate(ratios.values()):
        axis.plot([max(low, each.low), min(high, each.high)], [row, row], color="C0", linewidth=1.5)
        if each.least == each.most:
            axis.plot(each.least, row, "o", color="C0")
        elif each.least or each.most < math.inf:  # the estimate lies within
            axis.plot([max(low, each.least), min(high, each.most)], [row, row], color="C0", linewidth=6, alpha=0.4)
    axis.axvline(1, color="gray", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    ticks = [tick for tick in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10) if low < tick < high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(ratios)), ratios, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("Muon's steps to the milestone as a share of AdamW's", fontsize=8)
    axis.grid(alpha=0.3)
