"""Tokens per second of the real training loop, and where a step's time goes, by variant of settings and optimizer.

    python -m benchmarks.train_step configs/sotu_base.toml --matrix_optimizers adamw muon aurora
    python -m benchmarks.train_step configs/classics_124m_muon.toml --matrix_optimizers muon \\
        --variants "plain: compile=true" "fused: compile=true fused=mlp,head" \\
        --set batch_tokens=524288 --label 124m

The loop that is timed is train_gpt.train itself: the loader, the forward pass, the backward pass and the optimizers
are timed as phases, and what is left of the training clock is the loop's own overhead. On a GPU the marks
are events of its stream, read when the turn is over: they make nothing wait. Rows take turns, a few steps at a time, so
that a slow moment of a shared machine falls on all alike; the first turn, which compiles, is not timed.

Every row begins with the same weights and trains on the same batches, in every turn the first ones. `loss_diff` is the
largest difference between its training losses, of any step of any turn, and those of the first variant with the same
matrix optimizer: a variant that is faster because it computes something else shows there.
"""

import contextlib
import dataclasses
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
from torch import Tensor

import train_gpt
from data.files import user_path
from harness.machine import Clock, find_machine
from harness.outcome import FINISHED, raise_if_cut_short
from harness.overrides import OWN, arguments, assignments
from harness.results import command, report
from harness.runlog import RunLog
from harness.step_timer import PhaseTimer, take_turns
from harness.tables import Row
from train_gpt import Run, load_config, set_up, train

PHASES = ("loader", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Args:
    recipe: str = "configs/sotu_base.toml"  # the model, batch and data to time
    matrix_optimizers: tuple[str, ...] = ("adamw", "muon", "aurora")  # of the hidden matrices; ratios are to the first
    variants: tuple[str, ...] = ("plain",)  # to compare: a name and what it changes, "fused: fused=mlp,head"
    set: tuple[str, ...] = ()  # key=value ...: settings of every row
    rounds: Annotated[int, ">= 1"] = 9  # turns of each row; the table has medians over them
    steps: Annotated[int, ">= 1"] = 10  # training steps in a turn
    max_seconds: float = 0.0  # begin no round that would end later than this (but one is always timed); 0: no limit
    label: str = ""  # the result is train_step_<label>_<device>.json, so that none overwrites another's


def phases_timed(run: Run, timer: PhaseTimer) -> contextlib.ExitStack:
    """A context in which `timer` sees the phases of the run's steps."""
    timed = [(run.loader, "batch", "loader"), (run, "compiled", "forward"), (torch.Tensor, "backward", "backward")]
    stack = contextlib.ExitStack()
    for target, name, phase in [*timed, *((optimizer, "step", "optimizer") for optimizer in run.optimizers)]:
        stack.enter_context(mock.patch.object(target, name, timer.wrap(phase, getattr(target, name))))
    return stack


@dataclass
class Entry:
    """One row: what it runs, and what was seen of it, turn by turn."""

    variant: str
    run: Run
    held_bytes: int  # on the GPU, by this run alone, between its turns
    turns: list[dict[str, float]] = field(default_factory=list)  # seconds by phase; the first turn compiles
    losses: list[float] = field(default_factory=list)  # nats per token, of every step
    peak_bytes: list[int] = field(default_factory=list)  # most held on the GPU, without what other runs hold

    @property
    def name(self) -> str:
        return f"{self.variant} {self.run.config.matrix_optimizer}"

    @property
    def tokens_per_s(self) -> float:
        turn_s = statistics.median(sum(turn.values()) for turn in self.turns[1:])
        return self.run.config.batch_tokens * self.run.config.train_steps / turn_s


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def take_turn(entry: Entry) -> None:
    """Train a few steps; notes seconds by phase, with `loop` for the rest of the training clock."""
    run, losses = entry.run, list[Tensor]()
    device = run.machine.device
    genuine, run.clock, timer = train_gpt.train_step, Clock(device), PhaseTimer(device)

    def recorded(*arguments: Any) -> Tensor:
        losses.append(genuine(*arguments))
        return losses[-1]

    before = allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        phases_timed(run, timer),
        mock.patch("train_gpt.warm_up"),
        mock.patch("train_gpt.evaluate", return_value=1.0),
        mock.patch("train_gpt.train_step", recorded),
    ):
        summary = train(run, RunLog(run.config, run.machine, run.data))
    raise_if_cut_short(summary, entry.name)
    entry.losses += [loss.item() / run.config.batch_tokens for loss in losses]
    if summary["status"] != FINISHED:
        raise ValueError(f"{entry.name}: {summary['status']} {summary['reason']}; nothing is reported")
    if not all(map(math.isfinite, entry.losses)):
        raise ValueError(f"{entry.name}: its loss is not finite; nothing is reported")
    others = before - entry.held_bytes
    entry.held_bytes = allocated(device) - others
    seconds = dict.fromkeys(PHASES, 0.0) | timer.seconds()
    loop_s = run.clock.seconds["train"] - sum(seconds.values())
    entry.turns.append(seconds | {"logging": run.clock.seconds["logging"], "loop": loop_s})
    if device.type == "cuda":
        entry.peak_bytes.append(torch.cuda.max_memory_allocated(device) - others)


def parse_variants(texts: Sequence[str]) -> dict[str, list[str]]:
    """Trainer's arguments by name of the variant, from texts "name" or "name: key=value ..."."""
    variants: dict[str, list[str]] = {}
    for text in texts:
        name, _, words = text.partition(":")
        if not name.strip() or "=" in name or name.strip() in variants:
            raise ValueError(f'variant {text!r} has no name of its own; try "fused: fused=mlp,head"')
        variants[name.strip()] = arguments(assignments(words.split(), f"variant {name.strip()}: ", OWN))
    return variants


def make_entries(args: Args, folder: str) -> list[Entry]:
    fixed = [f"--train_steps={args.steps}", "--checkpoint_every=0", "--resume=", f"--run_dir={folder}"]
    fixed += ["--log_every=5", "--target_loss=0"]
    given = arguments(assignments(args.set, "--set: ", OWN))
    entries: list[Entry] = []
    for variant, changes in parse_variants(args.variants).items():
        for optimizer in args.matrix_optimizers:
            own = [f"--matrix_optimizer={optimizer}", *given, *changes]
            config = load_config([str(user_path(args.recipe)), *fixed, *own])
            machine = find_machine(config.device, config.dtype)
            before, run = allocated(machine.device), set_up(config, machine)
            entries.append(Entry(variant, run, allocated(machine.device) - before))
    return entries


def main(args: Args) -> None:
    if not args.matrix_optimizers or not args.variants:
        raise ValueError("there must be an optimizer and a variant; leave them out for the defaults")
    until = time.monotonic() + (args.max_seconds or math.inf)
    with tempfile.TemporaryDirectory() as folder:
        entries = make_entries(args, folder)
        take_turns(dict(enumerate(partial(take_turn, entry) for entry in entries)), args.rounds, 1, until=until)
        for entry in entries:
            entry.run.loader.close()
    machine = entries[0].run.machine
    settings = {**dataclasses.asdict(args), "dtype": str(machine.dtype), "rounds_done": len(entries[0].turns) - 1}
    settings["batch_tokens"] = entries[0].run.config.batch_tokens
    settings["losses"] = {entry.name: entry.losses for entry in entries}
    name = f"train_step_{args.label}" if args.label else "train_step"
    report(name, [row(entry, entries) for entry in entries], str(machine.device), **settings)


def row(entry: Entry, entries: Sequence[Entry]) -> Row:
    run, turns = entry.run, entry.turns[1:]
    optimizer = run.config.matrix_optimizer
    twin = next(other for other in entries if other.run.config.matrix_optimizer == optimizer)
    peak = run.machine.peak_flops if run.machine.dtype == torch.bfloat16 else None
    phases = {phase: statistics.median(turn[phase] for turn in turns) for phase in turns[0]}
    shares = {f"{phase}_%": 100 * time_s / sum(phases.values()) for phase, time_s in phases.items()}
    return {
        "variant": entry.variant,
        "matrix_optimizer": optimizer,
        "tokens_per_s": entry.tokens_per_s,
        "step_ms": 1e3 * run.config.batch_tokens / entry.tokens_per_s,
        "ratio": entry.tokens_per_s / entries[0].tokens_per_s,
        "MFU": run.model.flops_per_token() * entry.tokens_per_s / peak if peak else "unknown",
        "peak_mib": max(entry.peak_bytes[1:]) / 2**20 if entry.peak_bytes else "",
        "loss_diff": max(abs(a - b) for a, b in zip(entry.losses, twin.losses, strict=True)),
        **shares,
    }


if __name__ == "__main__":
    command(main, Args, __doc__)
