"""Stacks of runs in processes of their own, one thread each, and the file that holds every run that has ended."""

import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from data.files import try_lock
from data.processes import Workers
from experiments.grokking.train import Settings, stacks, train
from harness.machine import device_name, git_commit


def machine_name() -> str:
    """Of what runs are computed on."""
    return device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def read_runs(out: Path) -> dict[Settings, dict[str, Any]]:
    """All runs in `out`, without one whose line was cut off. Raises ValueError for a file of another kind."""
    path, runs = out / "runs.jsonl", dict[Settings, dict[str, Any]]()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            if line.endswith("\n"):
                run = json.loads(line)
                runs[Settings(**run["settings"])] = run
        except (ValueError, LookupError, TypeError) as error:
            told = f"{path} line {number} is no run of this experiment ({error}); use another --out"
            raise ValueError(told) from None
    return runs


class Store:
    """OUT/runs.jsonl: a line for each run that has ended. One process at a time may hold it."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file: TextIO = (out / "runs.jsonl").open("a+", encoding="utf-8")
        if (locked := try_lock(self.file)) is False:
            self.file.close()
            raise ValueError(f"{out} is being written by another process; wait for it or use another --out")
        if locked is None:
            print(f"{out}: there are no locks here; see to it that no other process writes it", file=sys.stderr)
        self.runs = read_runs(out)
        self.file.seek(0)
        text = self.file.read()
        self.file.truncate(text.rfind("\n") + 1)  # a line that was cut off; all of it is ASCII
        self.origin = dict(device=machine_name(), git_commit=git_commit())

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, run: dict[str, Any]) -> None:
        """Unless it is there: another stack's last digits are others, and settings may have been chosen by these."""
        run = {**run, **self.origin}
        if Settings(**run["settings"]) in self.runs:
            return
        self.runs[Settings(**run["settings"])] = run
        print(json.dumps(run), file=self.file, flush=True)


def unfinished(wanted: Sequence[Settings], known: dict[Settings, dict[str, Any]]) -> list[list[Settings]]:
    """The stacks of these runs of which some are not known. A stack is trained as a whole, so that a run's last digits
    do not depend on where an earlier start was cut off."""
    return [stack for stack in stacks(wanted) if any(run not in known for run in stack)]


def run_all(wanted: Sequence[Settings], store: Store, jobs: int, what: str) -> None:
    """Run what is not in the store. Whatever ends this early leaves no process behind."""
    todo = unfinished(wanted, store.runs)
    todo.sort(key=lambda stack: -stack[0].max_steps * stack[0].width * stack[0].depth)  # the longest do not come last
    bar = tqdm(total=sum(map(len, todo)), desc=what, unit="run", dynamic_ncols=True, disable=not todo)
    number = multiprocessing.get_context("spawn").Value("i", 0)
    with bar, Workers(jobs, _prepare_worker, number) as pool:
        for future in as_completed([pool.submit(train, stack) for stack in todo]):
            runs = future.result()
            for run in runs:
                store.add(run)
            told = runs[0]["settings"]
            bar.set_postfix_str(f"{told['task']}, {told['optimizer']}: {[run['crossed'] for run in runs]}")
            bar.update(len(runs))


def _prepare_worker(number: Any) -> None:
    """`number`: how many workers there are before this one, which spreads them over the GPUs."""
    torch.set_num_threads(1)
    with number.get_lock():
        if torch.cuda.is_available():
            torch.cuda.set_device(number.value % torch.cuda.device_count())
        number.value += 1
