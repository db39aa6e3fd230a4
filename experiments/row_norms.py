"""The table of results/row_norms.json: how unequal the rows of updates are in training, and what the loss comes to.

The same is measured, and tabled, by a sweep of runs with neuron statistics:

    python -m experiments.sweep configs/sotu_cpu.toml --set stop_at_target=false neuron_stats=25 --seeds 0 1 2
        --grid matrix_optimizer=muon matrix_lr=0.01 --grid matrix_optimizer=aurora aurora_variant=release,warm
"""

from collections import defaultdict
from typing import Any

from harness.tables import mean_and_sd


def cells(runs: list[dict[str, Any]]) -> list[list[str]]:
    """The table, its headings first. A spread is the standard deviation over the mean of an update's row norms (columns
    of a wide one), averaged over the matrices and the steps of a run."""
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        by_name[", ".join(f"{key}={value}" for key, value in run["cell"].items())].append(run)
    rows = [["settings", "final loss", "steps to target", "spread, tall", "spread, wide"]]
    for name, of_cell in by_name.items():
        row = [name, mean_and_sd([run["val_loss"] for run in of_cell], 4)]
        row.append(mean_and_sd([run["steps_to_target"] for run in of_cell], 0))
        for kind in ("tall", "wide"):
            means = [sum(run["spreads"][kind]) / len(run["spreads"][kind]) for run in of_cell]
            row.append(mean_and_sd(means, 3))
        rows.append(row)
    return rows
