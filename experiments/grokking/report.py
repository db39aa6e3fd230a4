"""What runs amount to: a table, a few sentences, a figure; all of it from result.json alone."""

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from experiments.grokking.survival import holm, logrank, median
from experiments.grokking.tasks import TRAIN_SHARES
from experiments.grokking.train import Settings

Run = dict[str, Any]
Cell = tuple[str, str]  # setting, optimizer

COLUMNS = {
    "setting": "setting", "optimizer": "optimizer", "lr": "lr", "decay": "decay", "n": "n",
    "memorised": "memorised", "crossed": "first 95%", "sustained": "held 95%", "interval": "interval", "never": "never",
    "delay": "delay", "collapsed": "collapsed", "ratio": "of AdamW's steps", "p": "p", "holm": "p (Holm)",
    "seconds": "s a run",
}  # fmt: skip
BASELINE = "adamw"


def without_curves(run: Run) -> Run:
    return {key: value for key, value in run.items() if key != "curves"}


def thinned(run: Run, every: int = 2) -> Run:
    """The run with every second look of its accuracies, for a file that is kept."""
    kept = ("step", "train_accuracy", "val_accuracy")
    return {**run, "curves": {key: values[::every] for key, values in run["curves"].items() if key in kept}}


def setting_name(run: Run) -> str:
    """What a run was of, but for its optimizer and seed: add, 40% of rows, width 64."""
    settings = Settings(**run["settings"])
    share = f"{settings.task}, {100 * (settings.train_share or TRAIN_SHARES[settings.task]):.0f}% of rows"
    weights = "" if (settings.attention, settings.loss) == ("softmax", "softmax") else (
        f", {settings.attention} attention, {settings.loss} loss"
    )  # fmt: skip
    batch = f", batch {settings.batch_size}" if settings.batch_size else ""
    return f"{share}, width {settings.width}{batch}{weights}"


def cells(runs: list[Run]) -> dict[Cell, list[Run]]:
    found: dict[Cell, list[Run]] = defaultdict(list)
    for run in runs:
        found[setting_name(run), run["settings"]["optimizer"]].append(run)
    return found


def rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A row of the table for each setting and optimizer: steps, as medians over the seeds. COLUMNS has the headings."""
    by_cell = cells(result["runs"])
    p_values = {
        cell: p
        for cell, runs in by_cell.items()
        if cell[1] != BASELINE and (cell[0], BASELINE) in by_cell
        if (p := logrank(times(runs), times(by_cell[cell[0], BASELINE]))) is not None
    }
    adjusted = holm(p_values)
    return [_row(cell, by_cell, result["tuning"], p_values.get(cell), adjusted.get(cell)) for cell in by_cell]


def _row(
    cell: Cell, by_cell: dict[Cell, list[Run]], tuning: list[Run], p: float | None, adjusted: float | None
) -> dict[str, str]:
    setting, optimizer = cell
    runs, baseline = by_cell[cell], by_cell.get((setting, BASELINE), [])
    held, n = median(times(runs)), len(runs)
    ratio = held.value / median(times(baseline)).value if baseline and optimizer != BASELINE else math.nan
    return dict(
        setting=setting, optimizer=optimizer, n=str(n),
        **{name: tuned(runs[0], key, tuning) for name, key in (("lr", "lr"), ("decay", "weight_decay"))},
        **{key: steps(median(times(runs, key)).value) for key in ("memorised", "crossed", "sustained", "delay")},
        interval=f"{steps(held.low)} to {steps(held.high)}",
        never=f"{sum(run['sustained'] is None for run in runs)}/{n}",
        collapsed=f"{sum(run['collapsed'] for run in runs)}/{n}",
        ratio=f"{ratio:.2f}" if math.isfinite(ratio) and ratio else "-",
        p="-" if p is None else f"{p:.2g}", holm="-" if adjusted is None else f"{adjusted:.2g}",
        seconds=f"{statistics.median(run['seconds'] for run in runs):.0f}",
    )  # fmt: skip


def times(runs: list[Run], key: str = "sustained") -> list[float | None]:
    return [run[key] for run in runs]


def steps(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "never"


def tuned(run: Run, key: str, tuning: list[Run]) -> str:
    """The value that the sweep chose; * where it is the lowest or highest of those tried."""
    optimizer, value = run["settings"]["optimizer"], run["settings"][key]
    tried = {one["settings"][key] for one in tuning if one["settings"]["optimizer"] == optimizer}
    return f"{value:g}{'*' if len(tried) > 1 and value in (min(tried), max(tried)) else ''}"


def summary(result: dict[str, Any]) -> list[dict[str, str]]:
    """The table in brief, a row a setting: each optimizer's `first 95% / held 95%`, and how many runs never held it."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows(result):
        missed = "" if row["never"].startswith("0/") else f" ({row['never']} never)"
        found[row["setting"]] |= {row["optimizer"]: f"{row['crossed']} / {row['sustained']}{missed}"}
        if row["optimizer"] != BASELINE:
            found[row["setting"]] |= {f"p, {row['optimizer']}": row["p"]}
    return [{"setting": setting, **row} for setting, row in found.items()]


def remarks(result: dict[str, Any]) -> list[str]:
    """What the table's marks mean, and how the optimizers stand to AdamW over all settings together."""
    options, by_cell = result["options"], cells(result["runs"])
    coverage = median(times(next(iter(by_cell.values())))).coverage if by_cell else 0.0
    lines = [
        f"steps: medians over n seeds; never: by step {options['max_steps'] - options['sustain_steps']}, the last from "
        f"which {options['sustain_steps']} could be watched; interval: of the median of held 95%, {coverage:.0%}",
        f"*: at the edge of the {options['lrs']} x {options['weight_decays']} grid that every optimizer got, on seeds "
        f"{' '.join(map(str, options['tuning_seeds']))}; p: log-rank test against {BASELINE}, by permutation",
    ]
    for optimizer in dict.fromkeys(optimizer for _, optimizer in by_cell if optimizer != BASELINE):
        pairs = [
            (median(times(runs)).value, median(times(by_cell[setting, BASELINE])).value)
            for (setting, name), runs in by_cell.items()
            if name == optimizer and (setting, BASELINE) in by_cell
        ]
        if pairs:
            sooner, later = (sum(compare(a, b) for a, b in pairs) for compare in (float.__lt__, float.__gt__))
            ratios = [a / b for a, b in pairs if math.isfinite(a + b) and a and b]
            mean = math.exp(statistics.fmean(map(math.log, ratios))) if ratios else math.nan
            lines.append(
                f"{optimizer}: before {BASELINE} in {sooner} of {len(pairs)} settings, after it in {later}; ratio of "
                f"steps {mean:.2f} (geometric mean of the {len(ratios)} that are known)"
            )
    return lines


def draw(result: dict[str, Any], path: Path) -> None:
    """Curves of accuracy for up to six settings, and a map of the medians of all: settings x optimizers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    by_cell = cells(result["runs"])
    settings, optimizers = (list(dict.fromkeys(cell[i] for cell in by_cell)) for i in (0, 1))
    num_rows = math.ceil(len(settings[:6]) / 3)
    heights = 2.4 * num_rows + 0.6, 0.35 * len(settings) + 1.4
    figure = plt.figure(figsize=(12, sum(heights)), layout="constrained")
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
    found = {cell: median(times(runs)).value for cell, runs in by_cell.items()}
    medians = [[found.get((setting, name), math.nan) for name in optimizers] for setting in settings]
    below.colorbar(_draw_map(axis, medians, latest), ax=axis)
    axis.set_xticks(range(len(optimizers)), optimizers, fontsize=8)
    axis.set_yticks(range(len(settings)), settings, fontsize=8)
    figure.suptitle(result["device"], fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_curves(axis: Any, setting: str, runs_of: dict[str, list[Run]]) -> None:
    for index, (optimizer, runs) in enumerate(runs_of.items()):
        for seed, run in enumerate(runs):
            steps_of, color, label = run["curves"]["step"], f"C{index}", None if seed else optimizer
            axis.plot(steps_of, run["curves"]["val_accuracy"], color=color, linewidth=1, label=label)
            axis.plot(steps_of, run["curves"]["train_accuracy"], ":", color=color, linewidth=0.6, alpha=0.7)
    axis.set_title(setting, fontsize=9)
    axis.set_xlabel("step", fontsize=8)
    axis.grid(alpha=0.3)


def _draw_map(axis: Any, medians: list[list[float]], latest: int) -> Any:
    """Medians as colors and numbers; `latest` stands for never."""
    import numpy as np
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
