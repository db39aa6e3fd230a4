"""Keep a sweep's loss curves as one small JSON file, and draw them.

    python -m experiments.curves runs/sweep_sotu_cpu --out experiments/results/my_sweep.json
    python -m experiments.curves experiments/results/my_sweep.json                                 (draws it again)

The figure, beside the JSON as .png: validation loss against seconds of training and against steps; a line for the
mean over the seeds of a cell, a band from the lowest to the highest seed, a dotted line at the target.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import console
from data.files import check_writable, user_path, write_json
from experiments.sweep import load_sweep, rows_with
from harness.figures import pyplot, save
from harness.settings import parse_settings

KEPT = (
    "status val_loss steps time_to_target_s steps_to_target tokens_to_target train_time_s tokens_per_s num_params "
    "device dtype world_size versions git_commit val_fingerprint train_fingerprint config"
)


@dataclass(frozen=True)
class Options:
    source: str = ""  # folder of a sweep, or a JSON file that this tool wrote
    out: str = ""  # JSON file to write, needed for a folder; the figure gets the same name with .png


def collect(sweep: Path) -> dict[str, Any]:
    """The record of a sweep that is kept: its plan and, for each run that ended, summary and validation curve."""
    loaded = load_sweep(sweep)
    runs = []
    for result in loaded.results.values():
        if result.ended:
            summary = {key: result.summary[key] for key in KEPT.split()}
            summary["config"] = {key: value for key, value in summary["config"].items() if key != "run_dir"}
            asked = dict(overrides=result.overrides, seed=result.seed)
            runs.append(asked | dict(summary=summary, curve=curve(Path(result.directory))))
    return {key: loaded.record[key] for key in ("recipe", "fixed", "jobs", "threads")} | {"runs": runs}


def curve(directory: Path) -> list[tuple[int, float, float]]:
    """(step, seconds of training, validation loss) at every validation of a run."""
    rows = rows_with("val_loss", directory)
    return [(row["step"], round(row["train_time_s"], 3), row["val_loss"]) for row in rows]


def draw(record: dict[str, Any], path: Path) -> None:
    cells: dict[str, list[Any]] = defaultdict(list)
    for run in record["runs"]:
        cells[", ".join(run["overrides"].values()) or record["recipe"]].append(run)
    target = record["runs"][0]["summary"]["config"]["target_loss"]
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for label, runs in cells.items():
        length = min(len(run["curve"]) for run in runs)  # a run that stopped at its target is shorter
        curves = np.array([run["curve"][:length] for run in runs])[:, 1:]  # without step 0: a new model's guess
        steps, seconds, losses = curves[0, :, 0], curves[:, :, 1].mean(0), curves[:, :, 2]
        shown = f"{label} (n = {len(runs)})".replace("$", r"\$")  # no formula
        for axis, x in zip(axes, (seconds, steps), strict=True):
            (line,) = axis.plot(x, losses.mean(0), label=shown, linewidth=1.5)
            axis.fill_between(x, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.25, linewidth=0)
    for axis, name in zip(axes, ("training time (s)", "step"), strict=True):
        axis.set(xlabel=name, yscale="log")
        axis.yaxis.set_major_formatter("{x:.1f}")
        axis.yaxis.set_minor_formatter("{x:.1f}")
        axis.grid(alpha=0.3, which="both")
        if target:
            axis.axhline(target, color="black", linestyle=":", linewidth=1, label=f"target {target:g}")
    axes[0].set_ylabel("validation loss (nats per token)")
    axes[1].legend(frameon=False)
    figure.suptitle(record["runs"][0]["summary"]["device"], fontsize=9)
    save(figure, path)


def keep(argv: list[str]) -> None:
    options = parse_settings(Options, argv, __doc__, leading="source")
    source, path = user_path(options.source), user_path(options.out or options.source)
    if source.is_dir():
        if not options.out:
            raise ValueError(f"{source} is a sweep: say where its curves go, such as --out {source}/curves.json")
        record = collect(source)
    else:
        record = json.loads(source.read_text(encoding="utf-8-sig"))
    if not record["runs"]:
        raise ValueError(f"{source} has no run that ended: nothing to draw; run the sweep first")
    check_writable(path.parent, "choose another file, such as --out=/tmp/curves.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    draw(record, path.with_suffix(".png"))
    print(f"{len(record['runs'])} runs -> {path}, {path.with_suffix('.png')}")


def main(argv: list[str]) -> int:
    return console.run(lambda: keep(argv), "the same command starts again")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
