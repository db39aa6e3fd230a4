"""Table, remarks and figure of the experiment, from result.json alone."""

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.arms import EDGE, at_edge
from experiments.comparisons import holm
from experiments.grokking.survival import logrank, median, stratified_logrank
from experiments.grokking.tasks import TRAIN_SHARES
from experiments.grokking.train import Settings
from harness.figures import pyplot, save

Run = dict[str, Any]
Cell = tuple[str, str]  # setting, optimizer

COLUMNS = {
    "setting": "setting", "optimizer": "optimizer", "lr": "lr", "decay": "decay", "n": "n",
    "memorised": "memorised", "crossed": "first 95%", "sustained": "held 95%", "interval": "interval", "never": "never",
    "delay": "delay", "collapsed": "fell below 80%", "ratio": "of AdamW's steps", "p": "p", "seconds": "s per run",
}  # fmt: skip
BASELINE = "adamw"


def thinned(run: Run, every: int = 2) -> Run:
    """The run with every second measurement of its accuracies, for a file that is kept."""
    kept = ("step", "train_accuracy", "val_accuracy")
    return {**run, "curves": {key: values[::every] for key, values in run["curves"].items() if key in kept}}


def setting_name(run: Run) -> str:
    """A run's setting, without its optimizer and seed: add, 40% of rows, width 64."""
    settings = Settings(**run["settings"])
    share = f"{settings.task}, {100 * (settings.train_share or TRAIN_SHARES[settings.task]):.0f}% of rows"
    batch = f", batch {settings.batch_size}" if settings.batch_size else ""
    is_plain = settings.attention == settings.loss == "softmax"
    weights = "" if is_plain else f", {settings.attention} attention, {settings.loss} loss"
    return f"{share}, width {settings.width}{batch}{weights}"


def cells(runs: list[Run]) -> dict[Cell, list[Run]]:
    found: dict[Cell, list[Run]] = defaultdict(list)
    for run in runs:
        found[setting_name(run), run["settings"]["optimizer"]].append(run)
    return found


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row of the table for each setting and optimizer: steps, as medians over the seeds. COLUMNS has the headings."""
    by_cell = cells(result["runs"])
    return [_row(cell, by_cell, result["tuning"]) for cell in by_cell]


def _row(cell: Cell, by_cell: dict[Cell, list[Run]], tuning: list[Run]) -> dict[str, str]:
    setting, optimizer = cell
    runs, baseline = by_cell[cell], by_cell.get((setting, BASELINE), [])
    held, n, is_compared = median(steps_of(runs)), len(runs), bool(baseline) and optimizer != BASELINE
    ratio = held.value / median(steps_of(baseline)).value if is_compared else math.nan
    p = logrank(steps_of(runs), steps_of(baseline)) if is_compared else None
    delays = [run["delay"] for run in runs if run["delay"] is not None]
    return dict(
        setting=setting, optimizer=optimizer, n=str(n),
        lr=chosen(runs[0], "lr", tuning), decay=chosen(runs[0], "weight_decay", tuning),
        **{key: in_words(median(steps_of(runs, key)).value) for key in ("memorised", "crossed", "sustained")},
        interval=f"{in_words(held.low)} to {in_words(held.high)}",
        never=f"{sum(run['sustained'] is None for run in runs)}/{n}",
        delay=f"{statistics.median(delays):.0f}" if delays else "-",
        collapsed=f"{sum(run['collapsed'] for run in runs)}/{n}",
        ratio=f"{ratio:.2f}" if math.isfinite(ratio) and ratio else "-", p="-" if p is None else f"{p:.2g}",
        seconds=f"{statistics.median(run['seconds'] for run in runs):.0f}",
    )  # fmt: skip


def steps_of(runs: list[Run], key: str = "sustained") -> list[float | None]:
    return [run[key] for run in runs]


def in_words(step: float) -> str:
    return f"{step:.0f}" if math.isfinite(step) else "never"


def chosen(run: Run, key: str, tuning: list[Run]) -> str:
    """The value that the sweep chose; EDGE where it is the lowest or highest of those tried."""
    optimizer, value = run["settings"]["optimizer"], run["settings"][key]
    tried = {one["settings"][key] for one in tuning if one["settings"]["optimizer"] == optimizer}
    return f"{value:g}{EDGE if at_edge(value, tried) else ''}"


def verdicts(result: dict[str, Any]) -> list[dict[str, str]]:
    """Each optimizer against AdamW over all settings together: the comparisons the experiment is made for."""
    by_cell = cells(result["runs"])
    strata: dict[str, list[tuple[list[float | None], list[float | None]]]] = defaultdict(list)
    for (setting, optimizer), runs in by_cell.items():
        if optimizer != BASELINE and (setting, BASELINE) in by_cell:
            strata[optimizer].append((steps_of(runs), steps_of(by_cell[setting, BASELINE])))
    p_values = {optimizer: stratified_logrank(of_it) for optimizer, of_it in strata.items()}
    adjusted, found = holm(p_values), []
    for optimizer, of_it in strata.items():
        medians = [(median(a).value, median(b).value) for a, b in of_it]
        ratios = [a / b for a, b in medians if math.isfinite(a + b) and a and b]
        ratio = f"{math.exp(statistics.fmean(map(math.log, ratios))):.2f} ({len(ratios)})" if ratios else "-"
        before, after = str(sum(a < b for a, b in medians)), str(sum(a > b for a, b in medians))
        row = dict(optimizer=optimizer, settings=str(len(medians)), before=before, after=after, ratio=ratio)
        found.append(row | dict(p=f"{p_values[optimizer]:.2g}", holm=f"{adjusted[optimizer]:.2g}"))
    return found


def summary(result: dict[str, Any]) -> list[dict[str, str]]:
    """The table in brief, a row a setting: each optimizer's `first 95% / held 95%`, and how many runs held it."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows(result):
        steps = " / ".join(dict.fromkeys((row["crossed"], row["sustained"])))
        held = int(row["n"]) - int(row["never"].split("/")[0])
        found[row["setting"]] |= {row["optimizer"]: f"{steps} ({held} of {row['n']})"}
        if row["optimizer"] != BASELINE:
            found[row["setting"]] |= {f"p, {row['optimizer']}": row["p"]}
    return [{"setting": setting, **row} for setting, row in found.items()]


def remarks(result: dict[str, Any]) -> list[str]:
    """Lines below the table: the meaning of its marks, and the verdicts."""
    options = result["options"]
    latest = options["max_steps"] - options["sustain_steps"]
    limits = [
        f"with {n} seeds it covers {median([0] * n).coverage:.0%} and p is {2 / math.comb(2 * n, n):.2g} or more"
        for n in sorted({len(runs) for runs in cells(result["runs"]).values()})
    ]
    lines = [
        f"steps: medians over n seeds; never: not by step {options['max_steps']}, held 95%: not from step {latest} on, "
        f"the last one that could be watched for {options['sustain_steps']}",
        "interval: of the median of held 95%; p: log-rank test of held 95% against adamw, by permutation; "
        + "; ".join(limits),
        "delay: from memorised to held 95%, of runs that held it; fell below 80%: after the first 95%, while watched",
        f"{EDGE}: at an edge of the {options['lrs']} x {options['weight_decays']} grid that each optimizer tried",
    ]
    for row in verdicts(result):
        lines.append(
            f"{row['optimizer']} over all {row['settings']} settings: before adamw in {row['before']}, after it in "
            f"{row['after']}; stratified log-rank p = {row['p']} (Holm over the optimizers: {row['holm']}); geometric "
            f"mean of the ratios of steps, where both got there (in how many): {row['ratio']}"
        )
    return lines


def draw(result: dict[str, Any], path: Path) -> None:
    """Curves of accuracy for up to six settings, and a map of the medians of all: settings x optimizers."""
    by_cell = cells(result["runs"])
    settings, optimizers = (list(dict.fromkeys(cell[i] for cell in by_cell)) for i in (0, 1))
    num_rows = math.ceil(len(settings[:6]) / 3)
    heights = 2.4 * num_rows + 0.6, 0.35 * len(settings) + 1.4
    figure = pyplot().figure(figsize=(12, sum(heights)), layout="constrained")
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=heights)).flat
    grid = above.subplots(num_rows, min(3, len(settings)), sharey=True, squeeze=False)
    for axis, setting in zip(grid.flat, settings, strict=False):
        _draw_curves(axis, setting, {name: by_cell.get((setting, name), []) for name in optimizers})
    for axis in grid.flat[len(settings) :]:
        axis.set_axis_off()
    grid[0, 0].set_ylabel("accuracy (dotted: training rows)", fontsize=8)
    grid[0, 0].legend(frameon=False, fontsize=8)
    latest = result["options"]["max_steps"] - result["options"]["sustain_steps"]
    axis = below.subplots()
    found = {cell: median(steps_of(runs)).value for cell, runs in by_cell.items()}
    medians = [[found.get((setting, name), math.nan) for name in optimizers] for setting in settings]
    below.colorbar(_draw_map(axis, medians, latest), ax=axis)
    axis.set_xticks(range(len(optimizers)), optimizers, fontsize=8)
    axis.set_yticks(range(len(settings)), settings, fontsize=8)
    figure.suptitle(result["device"], fontsize=9)
    save(figure, path, dpi=100)


def _draw_curves(axis: Any, setting: str, runs_of: dict[str, list[Run]]) -> None:
    for index, (optimizer, runs) in enumerate(runs_of.items()):
        for seed, run in enumerate(runs):
            curves, color, label = run["curves"], f"C{index}", None if seed else optimizer
            axis.plot(curves["step"], curves["val_accuracy"], color=color, linewidth=1, label=label)
            axis.plot(curves["step"], curves["train_accuracy"], ":", color=color, linewidth=0.6, alpha=0.7)
    axis.set_title(setting, fontsize=9)
    axis.set_xlabel("step", fontsize=8)
    axis.grid(alpha=0.3)


def _draw_map(axis: Any, medians: list[list[float]], latest: int) -> Any:
    """Medians as colors and numbers; `latest` stands for never."""
    from matplotlib.colors import LogNorm

    values = np.array(medians)
    capped = np.clip(values, 1, latest)
    image = axis.imshow(capped, aspect="auto", cmap="viridis_r", norm=LogNorm(np.nanmin(capped), latest * 1.01))
    for (row, column), value in np.ndenumerate(values):
        text = "" if math.isnan(value) else f"> {latest}" if math.isinf(value) else f"{value:.0f}"
        color = "white" if image.norm(min(value, latest)) > 0.6 else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    axis.set_title("steps until validation accuracy is 95% and stays there, median over seeds", fontsize=9)
    return image
