"""What is run: the parts of the experiment, the settings that each optimizer may choose from, and how it chooses.

Every optimizer of a part tries as many settings as every other: points of a Halton sequence in a box of its own (BOXES)
of the learning rate and decay of the hidden matrices and the decay of embedding and head. They are halved on a seed
that is not reported: all are trained for 400 steps, the best third for 1,000, the best third of these for 2,500. Better
is what has validation accuracy at 95% after fewer steps, as a sum over the part's tuning tasks (all steps for a task
that does not get there), then what comes to the higher accuracy. The best is carried to all tasks of the part.

`main` trains on 30% of the rows. In trial runs, half of the rows left nothing to grok: at the settings that generalise
soonest, AdamW's and Muon's runs memorised the training rows and generalised at the same measurement. The rounds were
150, 400 and 1,000 steps at first (commit f7729d9): so short, none of AdamW's settings generalised on both tuning tasks,
and the last round chose by luck. They were made longer before any reported run was looked at; the few there were are
not among the results.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.stats import qmc

from experiments.grokking.tasks import TASKS, TRAIN_SHARES
from experiments.grokking.train import Settings

Box = tuple[tuple[float, float], ...]
Run = Mapping[str, Any]

TUNED = "lr", "weight_decay", "adam_weight_decay"
ADAM_DECAYS = 0.003, 3.0
MUON_BOX: Box = (0.006, 0.15), (0.03, 3.0), ADAM_DECAYS
BOXES: dict[str, Box] = {  # of each of TUNED, lowest and highest; the order is that of tables
    "adamw": ((0.002, 0.05), (0.03, 3.0), ADAM_DECAYS),
    "muon": MUON_BOX,
    "aurora": MUON_BOX,
    "normuon": MUON_BOX,
    "rmsprop": ((0.00003, 0.001), (0.00003, 0.1), ADAM_DECAYS),  # this decay and sgd's are added to the gradient
    "sgd": ((0.01, 0.3), (0.00001, 0.01), ADAM_DECAYS),
}
BASELINE = "adamw"
PAIR = BASELINE, "muon"
RUNGS = 400, 1000, 2500  # steps; a third of the settings goes on to the next


@dataclass(frozen=True)
class Part:
    text: str  # as in tables
    tasks: tuple[str, ...] = ("mul",)
    tuned_on: tuple[str, ...] = ("mul",)
    optimizers: tuple[str, ...] = PAIR
    share: float | None = 0.3  # of the rows that are trained on; None: the published ones
    milestone: Literal["crossed", "held"] = "crossed"  # what settings are chosen by and steps are counted to
    chosen_in: str = ""  # the part whose choice is taken; none: settings are chosen here
    changes: Mapping[str, Any] = field(default_factory=dict)  # of Settings

    def settings(self, task: str, optimizer: str, **more: Any) -> Settings:
        share = TRAIN_SHARES[task] if self.share is None else self.share
        smaller = {"batch_size": 128} if task == "parity" else {}  # 512 are all its training rows or more
        return Settings(task, optimizer, train_share=share, **{**smaller, **self.changes, **more})


ADD_MUL = "add", "mul"
PARTS: dict[str, Part] = {
    "main": Part("30% of rows", TASKS, ADD_MUL, tuple(BOXES)),
    "published": Part("published shares", tuple(task for task in TASKS if task != "sub"), ADD_MUL, share=None),
    "held": Part("held, and chosen by that", (*ADD_MUL, "div"), ADD_MUL, milestone="held"),
    "own": Part("chosen on the task itself", ("div",), ("div",)),
    "zero": Part("outputs and head start at zero", ADD_MUL, ADD_MUL, changes={"init": "zero"}),
    "stablemax": Part("stablemax", changes={"attention": "stablemax", "loss": "stablemax"}),
    "sparsemax": Part("sparsemax", changes={"attention": "sparsemax", "loss": "sparsemax"}),
    "batch": Part("batch 128", changes={"batch_size": 128}),
    "width": Part("width 128", changes={"width": 128}),
    "batch_width": Part("batch 128, width 128", changes={"batch_size": 128, "width": 128}),
    "causal": Part("2 layers, causal, batch 256", changes={"depth": 2, "batch_size": 256}),
    "bidirectional": Part(
        "2 layers, bidirectional, batch 256",
        chosen_in="causal",
        changes={"depth": 2, "batch_size": 256, "is_causal": False},
    ),
    "full_batch": Part("full batch, width 128", ("add",), chosen_in="width", changes={"batch_size": 0, "width": 128}),
}
# What becomes of a generalised run: main's choices, and others around them, to the end of LATER_STEPS
LATER = "later"
LATER_TASKS = ("add",)
LATER_FACTORS = 1 / 3, 1.0, 3.0  # of the rate, and of the decay of the matrices
LATER_STEPS = 5000


def candidates(optimizer: str, number: int) -> list[dict[str, float]]:
    """Settings to choose from, two digits each: the same points for every optimizer, within its own box."""
    points = qmc.Halton(len(TUNED), scramble=False)
    points.fast_forward(1)  # a corner
    low, high = np.log(BOXES[optimizer]).T
    values = np.exp(low + points.random(number) * (high - low))
    return [dict(zip(TUNED, (float(f"{value:.2g}") for value in row), strict=True)) for row in values]


def num_kept(number: int, rung: int) -> int:
    """How many of so many settings go on after a rung."""
    return 1 if rung == len(RUNGS) - 1 else math.ceil(number / 3)


def rung_runs(part: Part, optimizer: str, tried: Iterable[Mapping[str, float]], rung: int, seed: int) -> list[Settings]:
    """Where what is chosen by has to be held, a run may go on for as long after the rung's steps."""
    steps = RUNGS[rung] + (Settings.hold_steps if part.milestone == "held" else 0)
    return [
        part.settings(task, optimizer, **each, seed=seed, stop=part.milestone, max_steps=steps)
        for task in part.tuned_on
        for each in tried
    ]


def survivors(
    part: Part, tried: Sequence[Mapping[str, float]], runs: Iterable[Run], number: int
) -> list[dict[str, float]]:
    """The best settings, best first, by runs of all of them on the same tasks."""
    scores = {tuple(each.values()): (0.0, 0.0) for each in tried}
    for run in runs:
        settings = Settings(**run["settings"])
        tuned = tuple(getattr(settings, key) for key in TUNED)
        steps, accuracy = scores[tuned]
        steps += settings.max_steps if run[part.milestone] is None else run[part.milestone]
        scores[tuned] = steps, accuracy - run["best_val_accuracy"]
    ordered = sorted(scores, key=scores.__getitem__)[:number]
    return [dict(zip(TUNED, tuned, strict=True)) for tuned in ordered]


def reported_runs(
    part: Part, optimizer: str, chosen: Mapping[str, float], seeds: Iterable[int], **more: Any
) -> list[Settings]:
    return [part.settings(task, optimizer, **chosen, seed=seed, **more) for task in part.tasks for seed in seeds]


def later_runs(chosen: Mapping[str, Mapping[str, float]], seed: int, tasks: Sequence[str] = TASKS) -> list[Settings]:
    """Of AdamW and Muon, Muon's also with embedding and head frozen once it has generalised."""
    runs = []
    for optimizer in PAIR:
        for is_frozen in (False,) if optimizer == BASELINE else (False, True):
            for task in (task for task in LATER_TASKS if task in tasks):
                run = PARTS["main"].settings(
                    task, optimizer, **chosen[optimizer], seed=seed, stop="never", is_frozen=is_frozen,
                    max_steps=LATER_STEPS,
                )  # fmt: skip
                runs += [
                    dataclasses.replace(
                        run, lr=float(f"{run.lr * rate:.2g}"), weight_decay=float(f"{run.weight_decay * decay:.2g}")
                    )
                    for rate in LATER_FACTORS
                    for decay in LATER_FACTORS
                ]
    return runs
