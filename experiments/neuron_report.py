"""Tables and figures of the experiment on neurons (experiments/neurons.py), from its JSON alone.

Leverage, idle rows, contributing and dead neurons are harness/neuron_stats.py's; shares are of all layers together and,
where nothing else is said, at the last measurement of a run.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.arms import EDGE
from experiments.comparisons import against
from harness.figures import pyplot, save
from harness.neuron_stats import (
    IDLE,
    KINDS,
    LEVERAGES,
    MAIN,
    MATRICES,
    MEASURES,
    PRUNED,
    THRESHOLDS,
    idle_share,
    pooled,
)
from harness.tables import Row, mean_and_sd, table

Record = dict[str, Any]
BASELINE = "muon"
EDGES = (0.05, 0.1, IDLE)  # of the mean, in tables and the figure of a run
STYLES = {"row_norms": "-", "momentum": ":"}  # of the kinds that a figure shows


def pooled_over_layers(look: Any) -> Any:
    """A measurement with the mean over its layers, four digits, in place of each list of them."""
    if isinstance(look, dict):
        return {key: pooled_over_layers(value) for key, value in look.items()}
    if isinstance(look, list):
        look = pooled(look)
    return None if look is None else float(f"{look:.4g}")


def curves_of(rows: Sequence[Row]) -> Row:
    """What a figure shows of a run's measurements over time, three digits."""
    looks = [row["neurons"] for row in rows]

    def short(values: Sequence[float | None]) -> list[float | None]:
        return [None if value is None else float(f"{value:.3g}") for value in values]

    def of_leverage(key: str) -> dict[str, list[float | None]]:
        return {kind: short([pooled(pooled(look[name]["leverage"][kind][key]) for name in MATRICES[:2] if name in look)
                             for look in looks]) for kind in KINDS}  # fmt: skip

    return dict(
        steps=[row["step"] for row in rows],
        idle={kind: short([idle_share(look, kind) for look in looks]) for kind in KINDS},
        effective=of_leverage("effective"), persistence=of_leverage("persistence"),
        contributing=short([pooled(look["contributing"]) for look in looks]),
        dead={measure: short([pooled(look["dead"][measure][f"{THRESHOLDS[0]:g}"]) for look in looks])
              for measure in MEASURES},
    )  # fmt: skip


def by_cell(record: Record) -> dict[tuple[str, str], list[Row]]:
    """Runs by (variant, arm), in the record's order."""
    cells: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for run in record["runs"]:
        cells[run["variant"], run["arm"]].append(run)
    order = itertools.product(record["variants"], record["arms"])
    return {cell: cells[cell] for cell in order if cell in cells}


def percent(values: Sequence[float | None], digits: int = 1) -> str:
    return mean_and_sd([None if value is None else 100 * value for value in values], digits)


def final(run: Row, *keys: str) -> Any:
    """A number of a run's last measurement; None for a run that diverged or was never measured."""
    value: Any = None if run["val_loss"] is None else run["last"]
    for key in keys:
        value = value and value.get(key)
    return value


def of_gate_and_up(run: Row, kind: str, *keys: str) -> float | None:
    """A number of the leverage of gate and up, of which some models have up alone; mean of both."""
    return pooled(final(run, name, "leverage", kind, *keys) for name in MATRICES[:2])


def losses(record: Record) -> list[Row]:
    """A row for each variant and arm: final losses (± standard deviation over the seeds), and how they differ from
    Muon's at the same seeds, with p Holm-adjusted over the arms of the variant."""
    rows = []
    cells = by_cell(record)
    for variant in record["variants"]:
        of_arms = {arm: runs for (of, arm), runs in cells.items() if of == variant}
        seeds = [run["seed"] for run in of_arms.get(BASELINE, [])]
        comparable = {arm: [run["val_loss"] for run in runs] for arm, runs in of_arms.items()
                      if [run["seed"] for run in runs] == seeds}  # fmt: skip
        found, p_values = against(comparable, BASELINE)
        for arm, runs in of_arms.items():
            rate = f"{runs[0]['rate']:g}{EDGE if runs[0]['at_edge'] else ''}"
            row = {"variant": variant, "arm": arm, "rate": rate, "seeds": str(len(runs)),
                   "final loss": mean_and_sd([run["val_loss"] for run in runs], 4),
                   "diverged": f"{sum(run['status'].startswith('diverged') for run in runs)}/{len(runs)}"}  # fmt: skip
            each = found.get(arm)
            row["less than muon's by"] = f"{-each.mean:.4f}" if each else "-"
            each = each if len(runs) > 1 else None
            row["95% interval"] = f"{-each.high:.4f} to {-each.low:.4f}" if each else "-"
            row["p (Holm)"] = f"{p_values[arm]:.2g}" if each else "-"
            rows.append(row)
    return rows


def leverages(record: Record) -> list[Row]:
    """A row for each variant and arm: how evenly rows of gate and up move, and would by the momentum; means over seeds.

    "% < 0.25" are idle rows, whose squared norm or leverage is below a quarter of the mean; "effective" is the
    participation ratio, 1 if all are equal; "persistence" the rank correlation with the measurement before.
    """
    rows = []
    for (variant, arm), runs in by_cell(record).items():
        row = {"variant": variant, "arm": arm}
        for kind in KINDS:
            name = kind.replace("_", " ")
            for edge in EDGES:
                shares = [of_gate_and_up(run, kind, "below", f"{edge:g}") for run in runs]
                row[f"{name}: % < {edge:g}"] = percent(shares)
            for key in ("effective", "persistence"):
                row[f"{name}: {key}"] = mean_and_sd([of_gate_and_up(run, kind, key) for run in runs], 2)
        rows.append(row)
    return rows


def functions(record: Record) -> list[Row]:
    """A row for each variant and arm: how many neurons contribute, what pruning costs in thousandths of a nat, and
    which are dead by a threshold; means over the seeds."""
    rows = []
    for (variant, arm), runs in by_cell(record).items():
        row = {"variant": variant, "arm": arm}
        row["contributing"] = mean_and_sd([final(run, "contributing") for run in runs], 2)
        for share in PRUNED:
            rises = [1000 * run["pruning"][f"{share:g}"] for run in runs if run["pruning"]]
            row[f"pruned {share:.0%}"] = mean_and_sd(rises, 1)
        for measure, threshold in (("mean", THRESHOLDS[0]), ("mean", MAIN), ("peak", THRESHOLDS[0])):
            shares = [final(run, "dead", measure, f"{threshold:g}") for run in runs]
            row[f"dead % ({measure} < {threshold:g})"] = percent(shares)
        rows.append(row)
    return rows


def report(record: Record) -> str:
    """All tables with what has to be said of them."""
    of_params = " or ".join(f"{number:,}" for number in record["params"])
    parts = [f"{record['device']}; {record['recipe']}, {record['steps']} steps, {record['tokens']:,} tokens, "
             f"{of_params} parameters, seeds {' '.join(map(str, record['seeds']))}"]  # fmt: skip
    parts.append(table(losses(record)))
    if any(run["at_edge"] for run in record["runs"]):
        parts.append(f"{EDGE} the best rate is at an end of those tried: a rate beyond it may be better")
    if not record["tuning"]:
        parts.append("rates were not tuned here")
    cells = by_cell(record)
    failed = [of for of in record["variants"] if any(run["val_loss"] is None for run in cells.get((of, BASELINE), []))]
    if failed:
        parts.append(f"no comparison in {', '.join(failed)}: a run of {BASELINE} diverged")
    parts += [
        "Rows of gate and up at the end, shares below a part of the mean: squared norms of the update as it was,\n"
        "leverage (squared row norms of the exact polar factor) of it and of the momentum. effective: participation\n"
        f"ratio, 1 if all are equal; persistence: rank correlation with the scores {record['every']} steps before.",
        table(leverages(record)),
        "Neurons at the end. contributing: participation ratio of mean output times norm of the down column; pruned:\n"
        "by how many thousandths of a nat the loss rises without the share of each layer that contributes least.",
        table(functions(record)),
    ]
    return "\n\n".join(parts)


def draw(record: Record, path: Path) -> None:
    """Of the first variant: idle rows over time, how leverage is spread at the end, what pruning costs, and losses."""
    variant = record["variants"][0]
    figure, (idle_axis, spread_axis, pruning_axis, loss_axis) = pyplot().subplots(
        1, 4, figsize=(15, 3.8), layout="constrained"
    )
    arms = [arm for of, arm in by_cell(record) if of == variant]
    for place, arm in enumerate(arms):
        runs = [run for run in by_cell(record)[variant, arm] if run["last"] and run["val_loss"] is not None]
        if not runs:
            continue
        color = pyplot().get_cmap("tab20")(place)
        for kind, style in STYLES.items():
            steps = runs[0]["looks"]["steps"]
            idle = np.array([run["looks"]["idle"][kind] for run in runs], dtype=float)  # None: nan
            idle_axis.plot(steps, 100 * idle.mean(0), style, color=color, label=None if style == ":" else arm)
            below = np.array([[of_gate_and_up(run, kind, "below", f"{x:g}") for x in LEVERAGES] for run in runs], float)
            spread_axis.plot(LEVERAGES, 100 * below.mean(0), style, color=color)
        rises = np.array([[run["pruning"][f"{share:g}"] for share in PRUNED] for run in runs if run["pruning"]])
        if len(rises):
            pruning_axis.plot([100 * share for share in PRUNED], rises.mean(0), color=color)
        loss_axis.plot([run["val_loss"] for run in runs], [place] * len(runs), "o", color=color)
    idle_axis.set(xlabel="step", ylabel="rows of gate and up (%)", title=f"below {IDLE:g} of the mean")
    spread_axis.set(xlabel="part of the mean", ylabel="rows below it (%)", xscale="log", title="at the end")
    pruning_axis.set(xlabel="neurons pruned in each layer (%)", ylabel="rise of the loss (nats per token)",
                     title="without those that contribute least")  # fmt: skip
    pruning_axis.set_yscale("symlog", linthresh=1e-3)
    loss_axis.set(xlabel="final loss (nats per token)", yticks=range(len(arms)), yticklabels=arms, title="each run")
    loss_axis.invert_yaxis()
    for axis in (idle_axis, spread_axis, pruning_axis, loss_axis):
        axis.grid(alpha=0.3)
    idle_axis.legend(frameon=False, fontsize=7)
    told = f"{record['recipe']}, {variant}; solid: squared row norms of updates, dotted: leverage of the momentum"
    figure.suptitle(f"{told}; {record['device']}", fontsize=9, parse_math=False)
    save(figure, path)


def draw_run(rows: list[Row], path: Path) -> None:
    """One training run: leverage of gate and up by threshold and by layer, and neurons that do something."""
    plt = pyplot()
    steps, looks = [row["step"] for row in rows], [row["neurons"] for row in rows]
    curves = curves_of(rows)
    figure, (edges, layers, function) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for (kind, style), (place, edge) in itertools.product(STYLES.items(), enumerate(EDGES)):
        idle = 100 * np.array([idle_share(look, kind, edge) for look in looks], float)
        edges.plot(steps, idle, style, color=f"C{place}", label=f"{kind.replace('_', ' ')} < {edge:g}")
    names = [name for name in MATRICES[:2] if name in looks[0]]
    of_names = [[look[name]["leverage"]["row_norms"]["below"][f"{IDLE:g}"] for name in names] for look in looks]
    by_layer = np.array(of_names, dtype=float).mean(1).T
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(by_layer)))
    for layer, (shares, shade) in enumerate(zip(by_layer, shades, strict=True)):
        label = f"layer {layer}" if layer in (0, len(by_layer) - 1) else None  # the shades between tell the rest
        layers.plot(steps, 100 * shares, color=shade, label=label)
    function.plot(steps, 100 * np.array(curves["contributing"], float), label="contributing")
    for measure, style in zip(MEASURES, ("-", ":"), strict=True):
        dead = 100 * np.array(curves["dead"][measure], float)
        function.plot(steps, dead, style, color="C3", label=f"dead, {measure} < {THRESHOLDS[0]:g}")
    edges.set(ylabel="rows of gate and up (%)", title="below a part of the mean")
    layers.set(ylabel="rows of gate and up (%)", title=f"by layer, row norms < {IDLE:g}")
    function.set(ylabel="neurons (%)", title="what they do")
    for axis in (edges, layers, function):
        axis.set_xlabel("step")
        axis.set_ylim(0, 1.3 * axis.get_ylim()[1])  # room for the legend
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=7, ncols=2 if axis is edges else 3, loc="upper center")
    save(figure, path)
