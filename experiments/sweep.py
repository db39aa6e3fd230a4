"""Run a recipe over a grid of settings and seeds; print mean and spread for each cell.

    python -m experiments.sweep configs/sotu_base.toml --grid matrix_optimizer=muon,adamw matrix_lr=0.01,0.02 --seeds 0
    python -m experiments.sweep configs/sotu_base.toml --table --best_by matrix_optimizer      (of what there is so far)

A --grid is every combination of its values; several --grid add up; without one the recipe itself is the only cell.
Colons join the parts of a tuple: adam_betas=0.9:0.95,0.8:0.95. Seeds are the outer loop, so that the cells of one
comparison run close in time. Each run is a process of its own with one GPU, or with its share of the CPU's threads.

OUT/sweep.json tells what ran and what came out; OUT/runs/<cell>/seed<seed>/ has the output and the run directory.
The same command again runs what has no result yet; another grid over the same recipe adds cells to the table.
A diverged run is a result. Exit status: 0 done, 1 a run crashed, 2 a mistake in what was asked for, 130 interrupted.
"""

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from tqdm import tqdm

from data import console
from data.files import check_writable, try_lock, user_path, wait_for_lock, write_json
from data.processes import end_group
from harness.machine import versions
from harness.neuron_stats import pooled
from harness.outcome import DIVERGED, is_complete
from harness.overrides import arguments, assignments
from harness.settings import parse_settings
from harness.tables import Row, mean_and_sd
from harness.tables import table as as_text
from train_gpt import load_config

TRAINER = Path(__file__).resolve().parents[1] / "train_gpt.py"
DECIMALS = {"val_loss": 4, "time_to_target_s": 2, "steps_to_target": 0, "train_time_s": 2}  # columns of the table
SPREADS = {"update_cv gate, up": ("gate", "up"), "update_cv down": ("down",)}  # columns of runs with neuron_stats
Cell = Mapping[str, str]  # overrides: setting -> value as typed


@dataclass(frozen=True)
class Options:
    recipe: str = ""  # what every run trains; its name comes first
    grid: tuple[tuple[str, ...], ...] = ()  # key=value,value ...: every combination a cell
    set: tuple[tuple[str, ...], ...] = ()  # key=value ...: the same in every cell
    seeds: tuple[int, ...] = (0,)  # each cell runs with each of them
    out: str = ""  # folder of the results; empty: runs/sweep_<recipe>
    jobs: int = 0  # runs at once; 0: one for each GPU, or 1
    table: bool = False  # run nothing, print the table
    best_by: str = ""  # key of the grid: print only the best cell for each of its values
    markdown: bool = False  # print the table as Markdown


@dataclass(frozen=True)
class Result:
    """One run: how it was asked for and, if it has ended (not crashed, not interrupted), the trainer's summary."""

    overrides: Cell
    seed: int
    jobs: int  # runs that shared the machine
    threads: int  # CPU threads of each
    directory: str = ""  # the run directory
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        return str(self.summary.get("status")).startswith(DIVERGED)  # with the reason, in older summaries

    @property
    def ended(self) -> bool:
        return is_complete(self.summary)

    @property
    def name(self) -> str:
        return f"{cell_name(self.overrides)}/seed{self.seed}"


def grid_cells(grids: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """The cells of all grids, in order and each once; one empty cell if there is no grid."""
    cells = []
    for words in grids or ((),):
        axes = assignments(" ".join(words).split())  # a grid may also be quoted as one word
        for values in itertools.product(*(axis.split(",") for axis in axes.values())):
            cells.append(dict(zip(axes, values, strict=True)))
    return [cell for i, cell in enumerate(cells) if cell not in cells[:i]]


def cell_name(cell: Cell) -> str:
    """A file name of the cell's own, whatever the order of its settings."""
    name = ",".join(f"{key}={value}" for key, value in sorted(cell.items())) or "recipe"
    return quote(name, safe=",=:+", errors="surrogateescape")  # as the locale may have read the command line


@dataclass
class Sweep:
    """A folder with sweep.json and, in runs/<name>/, each run's output.txt and run directory."""

    out: Path
    record: dict[str, Any]  # what was asked for last
    results: dict[str, Result] = field(default_factory=dict)  # by name

    def update(self, run: Result) -> Result:
        """`run` with its result on disk, the last that counts, or none."""
        run = dataclasses.replace(run, directory="", summary={})
        for path in sorted((self.out / "runs" / run.name).glob("*/summary.json")):
            summary = json.loads(path.read_text(encoding="utf-8"))
            if is_complete(summary):
                run = dataclasses.replace(run, directory=str(path.parent), summary=summary)
        self.results[run.name] = run
        return run

    def save(self) -> None:
        runs = [dataclasses.asdict(run) for run in self.results.values()]
        write_json(self.out / "sweep.json", {**self.record, "runs": runs}, indent=1)


def load_sweep(out: Path) -> Sweep:
    """The sweep in folder `out`, as far as it has come. Raises OSError if there is none."""
    sweep = Sweep(out, json.loads((out / "sweep.json").read_text(encoding="utf-8")))
    for run in sweep.record.pop("runs"):
        sweep.update(Result(**run))
    return sweep


def run_sweep(
    recipe: str, cells: Sequence[Cell], seeds: Sequence[int], out: Path, jobs: int = 0, fixed: Cell | None = None
) -> list[Result]:
    """Run each cell with each seed, unless its result is in `out`; returns all their results, seeds outermost.

    fixed: settings of every cell. Check `ended` for runs that crashed. Raises ValueError for a mistake in what was
    asked for, in the trainer's words where it refuses a setting, and OSError for files that cannot be used.
    """
    recipe = str(user_path(recipe))
    text, fixed, gpus = Path(recipe).read_text(encoding="utf-8-sig"), dict(fixed or {}), visible_gpus()
    grid_keys = set(itertools.chain(*cells))
    for key in grid_keys & fixed.keys() | {"seed", "name", "run_dir"} & (grid_keys | fixed.keys()):
        raise ValueError(f"{key} cannot be set here: the grid or the sweep itself sets it (see --seeds and --out)")
    if jobs < 0 or not seeds:
        raise ValueError(f"jobs = {jobs} must be 0 or more and seeds = {list(seeds)} at least one; try --seeds 0 1 2")
    for cell in cells:  # what the last one would be refused for is said before the first one runs
        try:
            load_config([recipe, *arguments(fixed), *arguments(cell)])
        except ValueError as error:
            raise ValueError(f"{cell_name(cell)}: {error}") from None
    jobs = jobs or len(gpus) or 1
    threads = max(1, torch.get_num_threads() // jobs)
    record: dict[str, Any] = dict(recipe=recipe, recipe_text=text, fixed=fixed, cells=list(cells), seeds=list(seeds))
    record.update(jobs=jobs, threads=threads, gpus=gpus, versions=versions())
    plan = [Result(cell, seed, jobs, threads) for seed in dict.fromkeys(seeds) for cell in cells]
    check_writable(out, "choose another folder, such as --out=/tmp/sweep")
    out.mkdir(parents=True, exist_ok=True)
    # Runs inherit the lock: after SIGKILL, the next start waits for those still on.
    with (out / ".lock").open("w", encoding="utf-8") as lock:
        if (locked := try_lock(lock)) is False:
            print(f"{out}: waiting for another sweep, or for runs that one left behind", file=sys.stderr)
            wait_for_lock(lock)
        if locked is None:  # what another one runs is run twice then, and nothing is lost
            print(f"{out}: there are no locks here, so that another sweep in it would not be noticed", file=sys.stderr)
        sweep = load_sweep(out) if (out / "sweep.json").exists() else Sweep(out, record)
        for key, what in ("recipe_text", recipe), ("fixed", "--set"):
            if sweep.record[key] != record[key]:
                raise ValueError(f"{out} has runs of another {what}; undo the change or use another --out")
        sweep.record = record
        _run_all(sweep, plan, lock.fileno())
    return [sweep.results[run.name] for run in plan]


def visible_gpus() -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES, one for each GPU this process may use; makes no CUDA context."""
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(index) for index in range(count)])[:count]


def _run_all(sweep: Sweep, plan: list[Result], lock: int) -> None:
    """Run what has no result, `jobs` at a time. Whatever ends this early also ends the processes it started."""
    waiting = [run for run in plan if not sweep.results.get(run.name, run).ended]
    running: dict[int, tuple[Result, subprocess.Popen[bytes]]] = {}  # by slot, which decides the GPU
    num_todo, start = len(waiting), time.monotonic()
    bar = tqdm(total=len(plan), initial=len(plan) - num_todo, unit="run", leave=False, disable=not sys.stderr.isatty())
    try:
        while waiting or running:
            for slot in range(sweep.record["jobs"]):
                if waiting and slot not in running:
                    run = sweep.update(waiting.pop(0))
                    sweep.save()
                    running[slot] = run, _start(sweep, run, slot, lock)
                    if bar.disable:
                        print(f"{run.name}: started", file=sys.stderr)
            bar.set_postfix_str(" + ".join(run.name for run, _ in running.values()))
            time.sleep(0.2)
            for slot in [slot for slot, (_, process) in running.items() if process.poll() is not None]:
                run, process = running.pop(slot)
                run, output = sweep.update(run), sweep.out / "runs" / run.name / "output.txt"
                sweep.save()
                if process.returncode == 2 and not run.ended:
                    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
                    errors = [line[7:] for line in lines if line.startswith("error: ")]
                    raise ValueError(f"{run.name}: {errors[-1] if errors else f'refused by the trainer, see {output}'}")
                num_left = len(waiting) + len(running)
                left = tqdm.format_interval((time.monotonic() - start) / (num_todo - num_left) * num_left)
                loss = mean_and_sd([run.summary.get("val_loss")], 4)
                outcome = f"{run.summary['status']}, val_loss {loss}" if run.ended else f"crashed, see {output}"
                tqdm.write(f"[{len(plan) - num_left}/{len(plan)}, {left} left] {run.name}: {outcome}", file=sys.stderr)
                bar.update()
    finally:
        with console.stops_held():
            bar.close()
            for _, process in running.values():
                process.terminate()
            for run, process in running.values():
                end_group(process)
                sweep.update(run)
            sweep.save()


def _start(sweep: Sweep, run: Result, slot: int, lock: int) -> subprocess.Popen[bytes]:
    folder, gpus = sweep.out / "runs" / run.name, sweep.record["gpus"]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TRAINER), sweep.record["recipe"]]
    command += [*arguments(sweep.record["fixed"]), *arguments(run.overrides)]
    command += [f"--seed={run.seed}", f"--run_dir={folder}", f"--name={cell_name(run.overrides)}"]
    gpu = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
    environment = {**os.environ, **gpu, "OMP_NUM_THREADS": str(run.threads), "PYTHONUTF8": "1"}
    with (folder / "output.txt").open("w", encoding="utf-8") as output:
        return subprocess.Popen(  # in a session of its own: a stop is ours to pass on
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=[lock],
        )  # fmt: skip


def table(results: Iterable[Result], markdown: bool = False, best_by: str = "") -> str:
    """A row for each cell: mean ± sample standard deviation over the runs that did not diverge.

    Lowest mean val_loss first, cells with diverged runs last; `-` is the recipe's own value, or no value. Where runs
    have neuron statistics, SPREADS of their updates stand beside the losses.
    best_by: only the best cell for each value of that setting. Raises ValueError if no cell has it.
    """
    runs_of: dict[str, list[Result]] = {}
    for run in results:
        if run.ended:
            runs_of.setdefault(cell_name(run.overrides), []).append(run)
    keys = list(dict.fromkeys(key for runs in runs_of.values() for key in runs[0].overrides))
    if best_by and best_by not in keys:
        raise ValueError(f"best_by = {best_by} is not a setting of the grid; it has: {', '.join(keys) or 'none'}")
    ranked: list[tuple[bool, float, Row]] = []
    for runs in runs_of.values():
        good = [run for run in runs if not run.diverged]
        num_reached = sum(run.summary["steps_to_target"] is not None for run in runs)
        row: Row = {key: runs[0].overrides.get(key, "-") for key in keys}
        row |= {"diverged": f"{len(runs) - len(good)}/{len(runs)}", "reached": f"{num_reached}/{len(runs)}"}
        row |= {name: mean_and_sd([run.summary[name] for run in good], digits) for name, digits in DECIMALS.items()}
        row |= {name: mean_and_sd([update_spread(run, matrices) for run in good], 3)
                for name, matrices in SPREADS.items()}  # fmt: skip
        mean = statistics.fmean([run.summary["val_loss"] for run in good] or [0.0])
        ranked.append((len(good) < len(runs), mean, row))
    rows = [row for *_, row in sorted(ranked, key=lambda entry: entry[:2])]
    if best_by:
        rows = [row for i, row in enumerate(rows) if row[best_by] not in [better[best_by] for better in rows[:i]]]
    unknown = {name for name in SPREADS if all(row[name] == "-" for row in rows)}
    rows = [{key: row[key] for key in row if key not in unknown} for row in rows]
    return as_text(rows, markdown).rstrip() if rows else "no run has ended"


def rows_with(key: str, directory: Path) -> list[Row]:
    """The rows of a run's metrics.jsonl that have `key`."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def update_spread(run: Result, matrices: Sequence[str]) -> float | None:
    """Standard deviation over mean of the updates' row norms, mean over layers, matrices and measured steps; None for a
    run without neuron statistics."""
    if not run.summary.get("neurons"):
        return None
    measured = [row["neurons"] for row in rows_with("neurons", Path(run.directory))]
    return pooled(pooled(each[name]["update_cv"]) for each in measured for name in matrices if name in each)


def main(argv: list[str]) -> int:
    return console.run(lambda: _main(argv))


def _main(argv: list[str]) -> int:
    options = parse_settings(Options, argv, __doc__, leading="recipe")
    if not options.recipe:
        raise ValueError("name a recipe first, such as configs/sotu_base.toml")
    out = user_path(options.out or f"runs/sweep_{Path(options.recipe).stem}")
    cells, fixed = grid_cells(options.grid), assignments(itertools.chain(*options.set))
    results = [] if options.table else run_sweep(options.recipe, cells, options.seeds, out, options.jobs, fixed)
    print(table(load_sweep(out).results.values(), options.markdown, options.best_by))
    if len({(run.summary["git_commit"], run.summary["device"]) for run in results if run.ended}) > 1:
        print("note: these runs are of more than one git commit or device, see sweep.json", file=sys.stderr)
    crashed = [run for run in results if not run.ended]
    for run in crashed:
        print(f"{run.name}: crashed, see {out}/runs/{run.name}/output.txt", file=sys.stderr)
    return 1 if crashed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
