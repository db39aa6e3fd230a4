"""Tokens a second of the real training loop, and where a step's time goes, for each matrix optimizer.

    python -m benchmarks.train_step configs/sotu_cpu.toml --matrix_optimizers adamw muon aurora

The loop that is timed is train_gpt.train itself: the loader, the forward pass, the backward pass and the optimizers
are wrapped in stopwatches that wait for the device, and what is left of the training clock is the loop's own
overhead. Optimizers take turns, a few steps at a time, so that a slow moment of a shared machine falls on all alike.
"""

import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from tqdm import tqdm

from benchmarks.report import report
from benchmarks.tables import Row
from machine import Clock, find_machine
from runlog import RunLog
from train_gpt import Run, load_config, set_up, train

PHASES = ("loader", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Args:
    recipe: tyro.conf.Positional[str] = "configs/sotu_cpu.toml"
    """The model, batch and data to time."""
    matrix_optimizers: tuple[str, ...] = ("adamw", "muon", "aurora")
    """Optimizers of the hidden matrices; the first is the baseline of the ratio."""
    rounds: int = 9
    """Turns of each optimizer; the table has medians over them."""
    steps: int = 10
    """Training steps in a turn."""


class Stopwatches:
    """Seconds spent inside wrapped functions, by phase."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict.fromkeys(PHASES, 0.0)

    def wrap(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            result = function(*args, **kwargs)
            self.seconds[phase] += self._now() - start
            return result

        return timed

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def on(self, run: Run) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for target, name, phase in [
                (run.loader, "batch", "loader"),
                (run, "compiled", "forward"),
                (torch.Tensor, "backward", "backward"),
                *((optimizer, "step", "optimizer") for optimizer in run.optimizers),
            ]:
                stack.enter_context(mock.patch.object(target, name, self.wrap(phase, getattr(target, name))))
            yield


def take_turn(run: Run) -> dict[str, float]:
    """Train a few steps; seconds by phase, with `loop` for the rest of the training clock."""
    run.clock, stopwatches = Clock(run.machine.device), Stopwatches(run.machine.device)
    with stopwatches.on(run), mock.patch("train_gpt.warm_up"), mock.patch("train_gpt.evaluate", return_value=1.0):
        train(run, RunLog(run.config, run.machine, run.data))
    seconds = {**stopwatches.seconds, "logging": run.clock.seconds["logging"]}
    return {**seconds, "loop": run.clock.seconds["train"] - sum(stopwatches.seconds.values())}


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        fixed = [f"--train_steps={args.steps}", "--checkpoint_every=0", "--resume=", f"--run_dir={folder}"]
        fixed += ["--log_every=5", "--target_loss=0"]
        runs: dict[str, Run] = {}
        for name in args.matrix_optimizers:
            config = load_config([args.recipe, *fixed, f"--matrix_optimizer={name}"])
            runs[name] = set_up(config, find_machine(config.device, config.dtype))
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        for turn in tqdm(range(args.rounds + 1), unit="round", leave=False, disable=None):
            for name, run in runs.items():
                with contextlib.redirect_stdout(nowhere):
                    seconds = take_turn(run)
                if turn > 0:  # the first compiles and warms up
                    turns[name].append(seconds)
        rows = [row(name, runs[name], turns) for name in runs]
    machine = next(iter(runs.values())).machine
    report("train_step", rows, str(machine.device), **dataclasses.asdict(args), dtype=str(machine.dtype))


def row(name: str, run: Run, turns: dict[str, list[dict[str, float]]]) -> Row:
    step_s = {
        key: statistics.median(sum(turn.values()) for turn in turns[key]) / run.config.train_steps for key in turns
    }
    tokens_per_s = run.config.batch_tokens / step_s[name]
    peak = run.machine.peak_flops if run.machine.dtype == torch.bfloat16 else None
    phases = {phase: statistics.median(turn[phase] for turn in turns[name]) for phase in (*PHASES, "logging", "loop")}
    shares = {f"{phase}_%": 100 * time_s / sum(phases.values()) for phase, time_s in phases.items()}
    return {
        "matrix_optimizer": name,
        "tokens_per_s": tokens_per_s,
        "step_ms": 1e3 * step_s[name],
        "ratio": step_s[next(iter(turns))] / step_s[name],
        "MFU": run.model.flops_per_token() * tokens_per_s / peak if peak else "unknown",
        **shares,
    }


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))
