"""Figures of records, with matplotlib: loss against time, steps and tokens; the record by date and by idea."""

import io
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import date2num
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from data.files import whole_file
from harness.tables import Row
from leaderboard.duel import Ratio
from leaderboard.records import Record

MANY = 5  # records; for more, a legend beside the panels and log axes

# The same records give the same file: no date in it, ids from the content. Text stays text.
SVG: Any = {"svg.hashsalt": "leaderboard", "svg.fonttype": "none"}
METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def curves(records: Sequence[Record], target: float) -> Figure:
    """Mean validation loss over the seeds of each record, a band from the lowest to the highest seed.

    Against time the curve stands at the mean time of each step, so a band is of losses alone. Step 0, a new model's
    guess, is left out. Tokens are in millions; a foreign log of unknown batch has no place in that panel.
    """
    many = len(records) > MANY
    colors = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(records)))
    figure = Figure(figsize=(12, 4 + many * 0.05 * len(records)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for index, record in enumerate(records):
        color = colors[index] if many else f"C{index}"
        validations = [{v.step: v for v in run.validations if v.step} for run in record.runs]
        steps = sorted(set.intersection(*map(set, validations)))
        losses = np.array([[run[step].loss for step in steps] for run in validations])
        seconds = np.array([[run[step].time_s for step in steps] for run in validations]).mean(0)
        xs = seconds, np.array(steps), _million_tokens(record, steps)
        for axis, x in zip(axes, xs, strict=True):
            if x is not None:
                axis.plot(x, losses.mean(0), color=color, label=record.path.name, marker=".", markersize=4)
                axis.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.2, linewidth=0)
    lasts = [loss for record in records for loss in record.losses]
    for axis, label in zip(axes, ("seconds of training", "steps", "million tokens"), strict=True):
        axis.axhline(target, color="black", linestyle=":", linewidth=1)
        axis.set_xlabel(label)
        axis.set_ylim(min([target, *lasts]) - 0.05 * target, 1.6 * target)
        axis.grid(alpha=0.25)
        if many:
            _logarithmic(axis, "x")
    axes[0].set_ylabel("validation loss (nats per token)")
    if many:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    else:
        axes[0].legend(fontsize=8)
    return figure


def _million_tokens(record: Record, steps: Sequence[int]) -> np.ndarray | None:
    """Trained on by each of the steps; None where that is not known."""
    if not record.is_foreign:
        return np.array([record.runs[0].tokens_at(step) for step in steps]) / 1e6
    tokens = record.summary["tokens"]
    return np.array(steps) * tokens / record.steps / 1e6 if tokens else None


def history(records: Sequence[Record], by_steps: bool = False) -> Figure:
    """Time, or steps, to target of every record by its date, and the best of this repository's own until then. Of many
    only those are named that no other of their day surpassed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()

    def value(record: Record) -> float:
        return record.steps if by_steps else float(record.summary["time_s"]["mean"])

    def day(record: Record) -> float:
        return float(date2num(date.fromisoformat(record.summary["date"])))

    dated = sorted(records, key=lambda record: (day(record), value(record)))
    days = sorted({*map(day, records)})
    own = [record for record in dated if not record.is_foreign]
    best = np.minimum.accumulate([*map(value, own)])
    axis.plot([*map(day, own)], best, drawstyle="steps-post", color="tab:green", label="record")
    axis.plot([*map(day, dated)], [*map(value, dated)], "o", color="tab:blue", label="entry")
    many = len(records) > MANY
    named = [record for record, least in zip(own, best, strict=True) if value(record) == least]
    place: Any = dict(xytext=(0, -7), va="top", ha="center") if many else dict(xytext=(6, 0), va="center")
    for record in dated if not many else [*named, *(record for record in dated if record.is_foreign)]:
        name = record.summary["name"] + ("†" if record.is_foreign else "")
        axis.annotate(name, (day(record), value(record)), textcoords="offset points", fontsize=8, **place)
    axis.set_ylabel("steps to target" if by_steps else "measured time (s)")
    _logarithmic(axis, "y")
    axis.xaxis_date()
    if len(days) < 8:
        axis.set_xticks(days)
    axis.tick_params(axis="x", rotation=30)
    axis.margins(x=0.3, y=0.15)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    return figure


def ideas(rows: Sequence[Row]) -> Figure:
    """One line per record, the slowest first, with what changed; rows: a track's, ranked.

    By steps where steps rank; else by the time of all steps over that of the fastest, with its 95% interval, of the
    records that duels connect; without any by measured time.
    """
    if rows[0]["machine"] == "by steps":
        label, values = "steps to the target", [(row, Ratio(*[row["steps"]] * 3)) for row in rows]
    elif values := [(row, row["relative"]) for row in rows if row["relative"]]:
        label = "time of all steps by duels, over that of the fastest record (95% CI)"
    else:
        label = "seconds to the target as measured (95% CI)"
        times = [row["time_s"] for row in rows]
        values = [(row, Ratio(t["mean"], t["low"] or t["mean"], t["high"] or t["mean"]))
                  for row, t in zip(rows, times, strict=True)]  # fmt: skip
    values.sort(key=lambda each: -each[1].estimate)
    figure = Figure(figsize=(5.4, 0.9 + 0.45 * len(values)), layout="constrained")
    axis = figure.subplots()
    xs, places = [x.estimate for _, x in values], range(len(values))
    least = 0.01 * min(xs)  # a measured time's interval may reach below 0
    errors = np.transpose([[x.estimate - max(x.low, least), x.high - x.estimate] for _, x in values])
    axis.set(xlabel=label, xlim=(0.8 * min(xs), 1.3 * max(xs)), ylim=(len(xs) - 0.6, -0.9), yticks=[])
    _logarithmic(axis, "x")
    axis.barh(places, xs, height=0.3, color="tab:blue", alpha=0.3)
    axis.errorbar(xs, places, xerr=errors, fmt="o", color="tab:blue", markersize=4, capsize=2, linewidth=1)
    for place, (row, x) in enumerate(values):
        name = f"{row['name'][len('2026-11-22_') :]}{'†' if row['foreign'] else ''}"
        text = shorten(f"{name}: {row['description']}", 80, placeholder=" …")
        where = axis.get_yaxis_transform()
        words = axis.annotate(text, (0, place), (4, 12), where, "offset points", fontsize=8, va="center")
        words.set(in_layout=False, parse_math=False)
        if place:
            gain = f"{x.estimate / xs[place - 1] - 1:+.0%}"
            axis.annotate(gain, (x.high, place), (4, 0), textcoords="offset points", fontsize=8, va="center")
    axis.grid(alpha=0.25, axis="x")
    return figure


def _logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """A log scale with plain numbers."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


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
    """The figure as an <svg> element that takes the width it is given, to stand beside others on a page."""
    buffer = io.StringIO()
    with matplotlib.rc_context(SVG):
        figure.savefig(buffer, format="svg", metadata=METADATA["svg"])
    element = re.sub(
        r' id="[a-zA-Z][a-zA-Z.0-9]*_\d+"', "", buffer.getvalue()
    )  # every figure counts its parts from 1 on
    return element[element.index("<svg") :]
