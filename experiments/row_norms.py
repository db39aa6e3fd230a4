"""How unequal the rows of the updates are in training, and what the loss comes to: is one polar factor a step enough?

    python -m experiments.row_norms configs/sotu_cpu.toml --cell matrix_optimizer=muon matrix_lr=0.01 --cell
        matrix_optimizer=aurora --cell matrix_optimizer=aurora aurora_variant=warm --out experiments/results/warm.json

Each --cell is the recipe with these settings, run once for each seed, in this process and to the end of the schedule.
Every `every` steps the spread of the row norms of each update that is not square is taken (columns of a wide one):
standard deviation over mean, 0 for equal rows. OUT is written after each run; runs that are in it are not repeated.
The table has, for each cell, mean and standard deviation over seeds of the final validation loss, the steps to the
target, and the spread, averaged over the matrices and the steps of a run, apart for tall (gate and up) and wide (down).
"""

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import tyro
from torch import Tensor

from data import console
from data.files import check_writable, user_path, whole_file
from experiments.sweep import GOES_ON, assignments, mean_and_sd
from harness.machine import find_machine, git_commit, versions
from harness.runlog import RunLog
from harness.settings import parse_settings
from harness.tables import align
from optim import MatrixOptimizer
from train_gpt import Run, load_config, set_up, train


@dataclass(frozen=True)
class Options:
    cell: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()  # key=value ...: settings of a cell
    seeds: tuple[int, ...] = (0, 1, 2)  # each cell runs with each of them
    every: int = 25  # steps between looks at the updates
    out: str = "runs/row_norms.json"  # where the results are kept


def spread(update: Tensor) -> Tensor:
    """Standard deviation over mean of the row norms (columns where m < n) of [B, m, n], float32 [B]."""
    tall = update if update.size(-2) > update.size(-1) else update.mT
    norms = tall.float().norm(dim=-1)
    return norms.std(dim=-1) / norms.mean(dim=-1)


def watch(optimizer: MatrixOptimizer, every: int, spreads: dict[str, list[float]]) -> Callable[..., Tensor]:
    """The optimizer's `orthogonalize`, which now and then notes the spread of what it returns under tall or wide."""
    rule, calls = optimizer.orthogonalize, defaultdict[tuple[int, ...], int](int)

    def watched(update: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        direction = rule(update, state, group)
        m, n = direction.shape[-2:]
        if m != n and calls[direction.shape] % every == 0:
            of_each = spread(direction)
            of_moving = of_each[of_each.isfinite()]  # all but updates of zero, which a new model has
            if len(of_moving):
                spreads["tall" if m > n else "wide"].append(of_moving.mean().item())
        calls[direction.shape] += 1
        return direction

    return watched


def run_cell(recipe: str, cell: dict[str, str], seed: int, every: int, commit: str) -> dict[str, Any]:
    """One run of the recipe; its result as it is kept. `commit` is of the code that this process has loaded."""
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        arguments = [f"--{key}={value}" for key, value in cell.items()]
        fixed = ["--stop_at_target=false", "--checkpoint_every=0", f"--run_dir={folder}", f"--seed={seed}"]
        config = load_config([recipe, *arguments, *fixed])
        run: Run = set_up(config, find_machine(config.device, config.dtype))
        optimizer, spreads = run.optimizers[0], defaultdict[str, list[float]](list)
        if not isinstance(optimizer, MatrixOptimizer):
            raise ValueError(f"matrix_optimizer = {config.matrix_optimizer!r} has no polar factor to look at; try muon")
        watched = mock.patch.object(optimizer, "orthogonalize", watch(optimizer, every, spreads))
        with contextlib.redirect_stdout(nowhere), mock.patch("train_gpt.warm_up"), watched:
            summary = train(run, RunLog(config, run.machine, run.data))
        run.loader.close()
        if summary["status"] == "interrupted":  # the trainer's own end of a stop
            raise KeyboardInterrupt
        if summary["status"].startswith("failed"):
            raise ValueError(f"{cell}, seed {seed}: {summary['status']}; {GOES_ON}")
        kept = {key: summary[key] for key in ("status", "val_loss", "steps", "steps_to_target")}
        place = dict(device=run.machine.name, versions=versions(), git_commit=commit)
        config_kept = {key: value for key, value in dataclasses.asdict(config).items() if key != "run_dir"}
        return dict(cell=cell, seed=seed, **kept, every=every, spreads=spreads, **place, config=config_kept)


def cells(runs: list[dict[str, Any]]) -> list[list[str]]:
    """The table, its headings first."""
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


def main(argv: list[str]) -> int:
    return console.run(lambda: _main(argv), GOES_ON)


def _main(argv: list[str]) -> None:
    recipe, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("configs/sotu_cpu.toml", argv)
    options = parse_settings(Options, argv, description=__doc__)
    out, wanted = user_path(options.out), [assignments(words) for words in options.cell]
    check_writable(out.parent, "choose another file, such as --out=/tmp/row_norms.json")
    runs, commit = json.loads(out.read_text(encoding="utf-8")) if out.exists() else [], git_commit()
    for seed in options.seeds:
        for cell in wanted:
            if any((run["cell"], run["seed"]) == (cell, seed) for run in runs):
                continue
            runs.append(run_cell(str(user_path(recipe)), cell, seed, options.every, commit))
            out.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(out) as file:
                file.write(json.dumps(runs) + "\n")
            print(f"{cell}, seed {seed}: {runs[-1]['status']}, val_loss {runs[-1]['val_loss']:.4f}", file=sys.stderr)
    print(align(cells(runs)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
