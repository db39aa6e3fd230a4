"""Tables and figures of the experiment on dead neurons (experiments/neurons.py), from its JSON alone.

Dead is a neuron below a threshold times its layer's median (harness/neuron_stats.py). Shares are of all layers together
and at the last measurement of a run; the spread of row norms is the mean over a run's measurements.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from experiments.arms import EDGE
from harness.figures import pyplot, save
from harness.neuron_stats import MAIN, MATRICES, MEASURES, THRESHOLDS, pooled
from harness.tables import Row, mean_and_sd, table

Record = dict[str, Any]
MAIN_KEY = f"{MAIN:g}"


def curves_of(rows: Sequence[Row]) -> tuple[Row, Row | None]:
    """A run's measurements as curves of three digits, pooled over the layers but for one, and the last one whole."""
    found = [row["neurons"] for row in rows]

    def short(values: Iterable[float | None]) -> list[float | None]:
        return [None if value is None else float(f"{value:.3g}") for value in values]

    def curve(values: Iterable[list[float | None]]) -> list[float | None]:
        return short(map(pooled, values))

    shares: dict[str, dict[str, list[float | None]]] = {
        measure: {f"{t:g}": curve(one["dead"][measure][f"{t:g}"] for one in found) for t in THRESHOLDS}
        for measure in MEASURES
    }
    update_cv = {name: curve(one[name]["update_cv"] for one in found) for name in MATRICES}
    median = curve(one["median"]["mean"] for one in found)
    layers = [short(one["dead"]["mean"][MAIN_KEY]) for one in found]
    steps = [row["step"] for row in rows]
    looks = dict(steps=steps, dead=shares, dead_by_layer=layers, update_cv=update_cv, median=median)
    return looks, found[-1] if found else None


def by_cell(record: Record) -> dict[tuple[str, str], list[Row]]:
    """Runs by (expansion, arm), in the record's order."""
    cells: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for run in record["runs"]:
        cells[run["expansion"], run["arm"]].append(run)
    order = itertools.product(record["expansions"], record["arms"])
    return {cell: cells[cell] for cell in order if cell in cells}


def percent(values: Sequence[float | None]) -> str:
    return mean_and_sd([None if value is None else 100 * value for value in values], 2)


def final(run: Row, *keys: str) -> float | None:
    """A number of a run's last measurement, over all layers; None for a run that diverged or was never measured."""
    value: Any = None if run["val_loss"] is None else run["last"]
    for key in keys:
        value = value and value[key]
    return pooled(value) if isinstance(value, list) else value


def mean_spread(run: Row, *matrices: str) -> float | None:
    """Spread of the updates' row norms, mean over measurements and matrices."""
    return pooled(value for name in matrices for value in run["looks"]["update_cv"][name])


def summary(record: Record) -> list[Row]:
    """A row for each expansion and arm; means over the seeds (± standard deviation), dead by the mean over tokens."""
    rows = []
    for (expansion, arm), runs in by_cell(record).items():
        edge = EDGE if runs[0]["at_edge"] else ""
        row = {"MLP": expansion, "arm": arm, "rate": f"{runs[0]['rate']:g}{edge}"}
        row["final loss"] = mean_and_sd([run["val_loss"] for run in runs], 4)
        row["diverged"] = f"{sum(run['status'].startswith('diverged') for run in runs)}/{len(runs)}"
        for threshold in THRESHOLDS:
            shares = [final(run, "dead", "mean", f"{threshold:g}") for run in runs]
            row[f"dead % < {threshold:g}"] = percent(shares)
        row[f"by peak % < {THRESHOLDS[0]:g}"] = percent(
            [final(run, "dead", "peak", f"{THRESHOLDS[0]:g}") for run in runs]
        )
        row["half dead by"] = mean_and_sd([final(run, "dead_since", "mean") for run in runs], 0)
        for name in ("ever_dead", "revived"):
            row[f"{name.replace('_', ' ')} %"] = percent([final(run, name, "mean", MAIN_KEY) for run in runs])
        row["CV gate, up"] = mean_and_sd([mean_spread(run, "gate", "up") for run in runs], 3)
        row["CV down"] = mean_and_sd([mean_spread(run, "down") for run in runs], 3)
        moved = [pooled(final(run, name, "least_moved_share") for name in MATRICES) for run in runs]
        rows.append(row | {"least moved %": percent(moved)})
    return rows


def sensitivity(record: Record) -> list[Row]:
    """Dead neurons at the end in %, at every threshold and by both measures; means over the seeds."""
    rows = []
    for (expansion, arm), runs in by_cell(record).items():
        row = {"MLP": expansion, "arm": arm}
        for measure, threshold in itertools.product(MEASURES, THRESHOLDS):
            key = f"{threshold:g}"
            row[f"{measure} < {key}"] = percent([pooled(final(run, "dead", measure, key) for run in runs)])
        rows.append(row)
    return rows


def correlation(record: Record) -> list[Row]:
    """Spearman's rank correlation of the dead share with the final loss, over the runs of all arms of an expansion.

    Arms differ in more than in their dead neurons: a correlation over them is no cause. Last column: over seeds within
    an arm, after each arm's means are taken off both.
    """
    rows = []
    for expansion, measure in itertools.product(record["expansions"], MEASURES):
        runs = [run for run in record["runs"] if run["expansion"] == expansion and run["val_loss"] is not None]
        dead = {id(run): final(run, "dead", measure, MAIN_KEY) for run in runs}
        of_arm: dict[str, list[Row]] = defaultdict(list)
        for run in (run for run in runs if dead[id(run)] is not None):
            of_arm[run["arm"]].append(run)
        pairs = [(dead[id(run)], run["val_loss"]) for arm in of_arm.values() for run in arm]
        within = []
        for arm in of_arm.values():
            points = np.array([(dead[id(run)], run["val_loss"]) for run in arm], dtype=float)
            within += list(points - points.mean(0)) if len(arm) > 1 else []
        rho, p = spearman(pairs)
        row = {"MLP": expansion, "dead by": measure, "runs": str(len(pairs)), "rho": rho, "p": p}
        rows.append(row | {"rho within arms": spearman(within)[0]})
    return rows


def spearman(pairs: Sequence[Any]) -> tuple[str, str]:
    """rho and its two-sided p; dashes where they have no value: under three pairs, or one side all alike."""
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return "-", "-"
    found = stats.spearmanr(*zip(*pairs, strict=True))
    return f"{found.statistic:.2f}", f"{found.pvalue:.2g}"


def report(record: Record) -> str:
    """All tables with what has to be said of them."""
    parts = [f"{record['device']}; {record['recipe']}, {record['steps']} steps, seeds {record['seeds']}"]
    parts.append(table(summary(record)))
    if any(run["at_edge"] for run in record["runs"]):
        parts.append(f"{EDGE} the best rate is at an end of those tried: a rate beyond it may be better")
    if not record["tuning"]:
        parts.append("rates were not tuned here")
    parts += ["Dead neurons at the end (%), by threshold and measure:", table(sensitivity(record))]
    parts += [f"Dead at {MAIN_KEY} against final loss, Spearman:", table(correlation(record))]
    return "\n\n".join(parts)


def draw(record: Record, path: Path) -> None:
    """A line of panels for each expansion: dead shares and spread against steps, final loss against dead share."""
    expansions = record["expansions"]
    figure, grid = pyplot().subplots(
        len(expansions), 3, figsize=(12, 3.4 * len(expansions)), squeeze=False, layout="constrained"
    )
    colors = {arm: f"C{index}" for index, arm in enumerate(record["arms"])}
    for (expansion, arm), runs in by_cell(record).items():
        dead_axis, spread_axis, loss_axis = grid[expansions.index(expansion)]
        known = [run for run in runs if run["looks"]["steps"] and run["val_loss"] is not None]
        if not known:
            continue
        steps = known[0]["looks"]["steps"]
        of_dead = [run["looks"]["dead"]["mean"][MAIN_KEY] for run in known]
        of_spread = [[pooled(at) for at in zip(*run["looks"]["update_cv"].values(), strict=True)] for run in known]
        of_peak = [run["looks"]["dead"]["peak"][f"{THRESHOLDS[0]:g}"] for run in known]
        panels = (dead_axis, of_dead, 100, "-"), (dead_axis, of_peak, 100, ":"), (spread_axis, of_spread, 1, "-")
        for axis, curves, scale, style in panels:
            values = scale * np.array(curves, dtype=float)  # None: nan
            axis.plot(steps, values.mean(0), style, color=colors[arm], label=arm if style == "-" else None)
            axis.fill_between(steps, values.min(0), values.max(0), color=colors[arm], alpha=0.2, linewidth=0)
        dead = np.array([final(run, "dead", "mean", MAIN_KEY) for run in known], dtype=float)
        loss_axis.plot(100 * dead, [run["val_loss"] for run in known], "o", color=colors[arm])
    for expansion, (dead_axis, spread_axis, loss_axis) in zip(expansions, grid, strict=True):
        told = f"mean below {MAIN_KEY}; dotted: peak below {THRESHOLDS[0]:g}"
        dead_axis.set(xlabel="step", ylabel=f"dead neurons (%)\n{told}", title=f"MLP {expansion}")
        spread_axis.set(xlabel="step", ylabel="spread of updates' row norms", title="standard deviation / mean")
        loss_axis.set(xlabel="dead at the end (%)", ylabel="final loss (nats per token)", title="each run")
    for axis in grid.flat:
        axis.grid(alpha=0.3)
    for axis in grid[:, :2].flat:
        axis.set_ylim(bottom=0)
    grid[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{record['recipe']}; {record['device']}", fontsize=9, parse_math=False)
    save(figure, path)


def draw_run(rows: list[Row], path: Path) -> None:
    """One training run: dead shares by threshold and by layer, and the spread of row norms by matrix."""
    plt = pyplot()
    steps, measured = [row["step"] for row in rows], [row["neurons"] for row in rows]
    figure, (thresholds, layers, spreads) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for (measure, style), threshold in itertools.product({"mean": "-", "peak": ":"}.items(), THRESHOLDS):
        found = np.array([pooled(one["dead"][measure][f"{threshold:g}"]) for one in measured], dtype=float)
        color = f"C{THRESHOLDS.index(threshold)}"
        thresholds.plot(steps, 100 * found, style, color=color, label=f"{measure} < {threshold:g}")
    by_layer = np.array([one["dead"]["mean"][MAIN_KEY] for one in measured], dtype=float).T
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(by_layer)))
    for layer, (shares, shade) in enumerate(zip(by_layer, shades, strict=True)):
        label = f"layer {layer}" if layer in (0, len(by_layer) - 1) else None  # the shades between tell the rest
        layers.plot(steps, 100 * shares, color=shade, label=label)
    for name in MATRICES:
        spreads.plot(steps, np.array([pooled(one[name]["update_cv"]) for one in measured], dtype=float), label=name)
    thresholds.set(ylabel="dead neurons (%)", title="by threshold, of the layer's median")
    layers.set(ylabel="dead neurons (%)", title=f"by layer, mean < {MAIN_KEY}")
    spreads.set(ylabel="standard deviation / mean", title="row norms of updates")
    for axis in (thresholds, layers, spreads):
        axis.set_xlabel("step")
        axis.set_ylim(0, 1.3 * axis.get_ylim()[1])  # room for the legend
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=7, ncols=2 if axis is thresholds else 3, loc="upper center")
    save(figure, path)
