"""The trainer with a kill -9 of its own at a chosen point of each attempt; started by torchrun in tests/test_faults.py.

FAULTS=step:13,write:20,validation:30 kills the second rank before step 13 in the first attempt, the first rank in the
middle of writing the checkpoint of step 20 in the second, and the second rank within the validation of step 30 in the
third. node:13 kills the node of the rank that has it in its FAULTS: the launcher, then the rank itself. An attempt
without a fault of its own runs as ever.
"""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import train_gpt
from harness import checkpoint


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, at_step: int, rank: int) -> None:
    follow_genuinely, validation, save = train_gpt.Run.follow, train_gpt.validation, torch.save
    now = 0

    def follow(run: train_gpt.Run, plan: train_gpt.StepPlan) -> None:
        nonlocal now
        now = run.summary.get("steps", 0)
        if point == "step" and rank == 1 and now == at_step:
            die()
        if point == "node" and now == at_step:
            os.kill(os.getppid(), signal.SIGKILL)
            die()
        follow_genuinely(run, plan)

    def killed_validation(*arguments: Any) -> Iterator[Any]:
        for batch in validation(*arguments):
            yield batch
            if point == "validation" and rank == 1 and now == at_step:
                die()

    def half_save(state: dict[str, Any], file: Any) -> None:
        if point == "write" and state["step"] == at_step:
            buffer = io.BytesIO()
            save(state, buffer)
            file.write(buffer.getvalue()[: buffer.tell() // 2])
            file.flush()
            die()
        save(state, file)

    replace: Callable[[Any, str, Any], None] = setattr
    replace(train_gpt.Run, "follow", follow)
    replace(train_gpt, "validation", killed_validation)
    replace(checkpoint.torch, "save", half_save)


if __name__ == "__main__":
    attempt, faults = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["FAULTS"].split(",")
    if attempt < len(faults) and faults[attempt]:
        point, _, step = faults[attempt].partition(":")
        arm(point, int(step), int(os.environ["RANK"]))
    sys.exit(train_gpt.main(sys.argv[1:]))
