"""Figures of records, with matplotlib: loss against time, steps and tokens; the record time over the days."""

import io
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.dates import date2num
from matplotlib.figure import Figure

from data.files import whole_file
from leaderboard.records import Record

# The same records give the same file: no date in it, ids from the content. Text stays text.
SVG: Any = {"svg.hashsalt": "leaderboard", "svg.fonttype": "none"}
METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def curves(records: Sequence[Record], target: float) -> Figure:
    """Mean validation loss over the seeds of each record, a band from the lowest to the highest seed.

    Against time the curve stands at the mean time of each step, so a band is of losses alone. Step 0, a new model's
    guess, is left out. Tokens are in millions; a foreign log of unknown batch has no place in that panel.
    """
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for index, record in enumerate(records):
        validations = [{v.step: v for v in run.validations if v.step} for run in record.runs]
        steps = sorted(set.intersection(*map(set, validations)))
        losses = np.array([[run[step].loss for step in steps] for run in validations])
        seconds = np.array([[run[step].time_s for step in steps] for run in validations]).mean(0)
        batch = record.summary["tokens"] / record.steps if record.summary["tokens"] else None
        xs = seconds, np.array(steps), np.array(steps) * batch / 1e6 if batch else None
        for axis, x in zip(axes, xs, strict=True):
            if x is not None:
                axis.plot(x, losses.mean(0), color=f"C{index}", label=record.path.name, marker=".", markersize=4)
                axis.fill_between(x, losses.min(0), losses.max(0), color=f"C{index}", alpha=0.2, linewidth=0)
    lasts = [loss for record in records for loss in record.losses]
    for axis, label in zip(axes, ("seconds of training", "steps", "million tokens"), strict=True):
        axis.axhline(target, color="black", linestyle=":", linewidth=1)
        axis.set_xlabel(label)
        axis.set_ylim(min([target, *lasts]) - 0.05 * target, 1.6 * target)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("validation loss (nats per token)")
    axes[0].legend(fontsize=8)
    return figure


def history(records: Sequence[Record]) -> Figure:
    """Time to target of every record by its date, and the best of this repository's own until then."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    dated = sorted(records, key=lambda record: (record.summary["date"], record.summary["time_s"]["mean"]))
    days = [float(date2num(date.fromisoformat(record.summary["date"]))) for record in dated]
    times = [record.summary["time_s"]["mean"] for record in dated]
    own = [(day, time_s) for day, time_s, record in zip(days, times, dated, strict=True) if not record.is_foreign]
    best = np.minimum.accumulate([time_s for _, time_s in own])
    axis.plot([day for day, _ in own], best, drawstyle="steps-post", color="tab:green", label="record")
    axis.plot(days, times, "o", color="tab:blue", label="entry")
    for day, time_s, record in zip(days, times, dated, strict=True):
        name = record.summary["name"] + ("†" if record.is_foreign else "")
        axis.annotate(name, (day, time_s), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set(ylabel="time to target (s)", ylim=(0, 1.15 * max(times)))
    axis.xaxis_date()
    if len(set(days)) < 8:
        axis.set_xticks(sorted(set(days)))
    axis.tick_params(axis="x", rotation=30)
    axis.margins(x=0.3)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    return figure


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write <stem>.png and <stem>.svg; returns them."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, metadata in METADATA.items():
        path = stem.with_name(f"{stem.name}.{kind}")
        with matplotlib.rc_context(SVG), whole_file(path, "wb") as file:
            figure.savefig(file, format=kind, dpi=110, metadata=metadata)
        written.append(path)
    return written


def svg(figure: Figure) -> str:
    """The figure as an <svg> element that takes the width it is given."""
    buffer = io.StringIO()
    with matplotlib.rc_context(SVG):
        figure.savefig(buffer, format="svg", metadata=METADATA["svg"])
    element = buffer.getvalue()
    return element[element.index("<svg") :]
