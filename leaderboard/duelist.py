"""One side of a duel, in a process of its own: the trainer of a record or of this checkout, whose steps wait for their
turn. Started by duel.py in the folder of that source; it imports nothing of this repository but what lies there.

    python -P duelist.py SOCKET STEPS SETTINGS...

It lets the trainer go through its whole schedule, but takes only the first steps of it, in order to tell the kinds of
step apart (shape of the batch, window, whatever else the plan changes for good) and to count them. Then it takes one
step of a kind whenever it is asked to, with learning rates of 0, and says how long that took.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

TRAINED = 10  # first steps that are taken as they are: weights that begin at zero have left it by then
WARMUPS = 2  # steps of each kind before the first turn
MOST_KINDS = 64
Kind = tuple[Any, ...]


def kind_of(run: Any, inputs: Any) -> Kind:
    """What the time of a step can depend on: shapes and, of a plan, whatever is no place in the data and, of numbers
    that change from step to step, only whether they are 0."""
    plan = vars(run.plan) if getattr(run, "plan", None) else {}
    parts = {name: value for name, value in plan.items() if name != "first_token"}
    told = [f"{name}={switch(value)}" for name, value in parts.items()]
    return (str(tuple(inputs.shape)), *told)


def switch(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(switch, value))
    return value != 0 if isinstance(value, float) else value


class Duelist:
    """Takes the place of train_gpt.train_step; its first call after the warm-up is step 0."""

    def __init__(self, channel: Any, train_step: Any, last: int) -> None:
        self.channel, self.train_step, self.last = channel, train_step, last
        self.is_warm, self.steps = False, 0
        self.kinds: dict[Kind, tuple[Any, Any]] = {}  # its first step's plan and batch
        self.counts: dict[Kind, int] = {}

    def __call__(self, run: Any, inputs: Any, targets: Any) -> Any:
        if not self.is_warm:
            return self.train_step(run, inputs, targets)
        kind = kind_of(run, inputs)
        self.kinds.setdefault(kind, (getattr(run, "plan", None), (inputs, targets)))
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.steps += 1
        if len(self.kinds) > MOST_KINDS:
            raise ValueError(f"more than {MOST_KINDS} kinds of step; the last one: {kind}")
        if self.steps == (self.last or run.config.train_steps):
            self.duel(run)
        if self.steps <= TRAINED:
            return self.train_step(run, inputs, targets)
        return torch.zeros((), device=inputs.device)

    def duel(self, run: Any) -> None:
        kinds = list(self.kinds)
        for kind in kinds:
            for _ in range(WARMUPS):
                self.take(run, kind)
        said = [dict(shape=kind[0], plan=list(kind[1:]), steps=self.counts[kind],
                     tokens=self.kinds[kind][1][0].numel()) for kind in kinds]  # fmt: skip
        self.say(dict(kinds=said, train_steps=run.config.train_steps))
        for line in self.channel:
            self.say(self.take(run, kinds[json.loads(line)]))
        os._exit(0)  # the other end is closed: the duel is over

    def take(self, run: Any, kind: Kind) -> list[float]:
        """Start by the machine's clock, wall and CPU seconds of a step."""
        plan, batch = self.kinds[kind]
        if plan is not None:
            run.follow(plan)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        self.wait_for_device(run)
        start, cpu = time.monotonic(), time.process_time()
        self.train_step(run, *batch)
        self.wait_for_device(run)
        return [start, time.monotonic() - start, time.process_time() - cpu]

    def wait_for_device(self, run: Any) -> None:
        if run.machine.device.type == "cuda":
            torch.cuda.synchronize(run.machine.device)

    def say(self, value: Any) -> None:
        self.channel.write(json.dumps(value) + "\n")
        self.channel.flush()


def main(descriptor: str, steps: str, *settings: str) -> int:
    sys.path.insert(0, str(Path.cwd()))
    import train_gpt

    channel = socket.socket(fileno=int(descriptor)).makefile("rw", encoding="utf-8")
    duelist = Duelist(channel, train_gpt.train_step, int(steps))
    warm_up = train_gpt.warm_up

    def warm_up_first(run: Any) -> None:
        warm_up(run)
        duelist.is_warm = True

    train_gpt.train_step, train_gpt.warm_up = duelist, warm_up_first
    train_gpt.evaluate = lambda run: 1e9  # no target is reached
    train_gpt.main(list(settings))
    return 1  # it ended before its last step


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
