"""What changes over a run: functions of the step (from 0) and of `config`, the trainer's Config; and set_schedule,
which puts them to work.

How many tokens a step takes is the loader's to know (data/loader.py, tokens_before).
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from torch import Tensor


def lr_scale(step: int, config: Any) -> float:
    """Factor on every learning rate: linear warm-up, constant, linear cooldown towards 0."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = 1 - step / config.train_steps
    return warmup if left >= config.cooldown_frac else min(warmup, left / config.cooldown_frac)


def momentum_at(step: int, config: Any) -> float:
    """From 0.85 linearly to `momentum` over `momentum_warmup_steps`."""
    done = min(1.0, step / config.momentum_warmup_steps) if config.momentum_warmup_steps else 1.0
    return config.momentum - (1 - done) * max(0.0, config.momentum - 0.85)


def window_at(step: int, config: Any) -> int | None:
    """Keys a query sees: from `window_start` to `window` in proportion to the step, in multiples of window_start."""
    if not config.window or not config.window_start:
        return config.window or None
    grown = config.window_start + (config.window - config.window_start) * step / config.train_steps
    return min(config.window, math.ceil(grown / config.window_start) * config.window_start)


def steps_of_each_kind(kind: Callable[[int], Any], first: int, end: int) -> list[int]:
    """The first step of each kind from `first` up to `end`, for a `kind` whose parts each change in one direction: no
    kind comes back then, and the next one is found without a look at every step between."""
    steps = []
    while first < end:
        steps.append(first)
        first += bisect_left(range(first, end), True, key=lambda step: kind(step) != kind(steps[-1]))
    return steps


def set_schedule(run: Any, step: int) -> None:
    """Put everything that changes over a run to what it is at `step`."""
    config = run.config
    for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
        group["lr"] = group["initial_lr"] * lr_scale(step, config)
        if "momentum" in group:
            group["momentum"] = momentum_at(step, config)
    run.is_tied, window = step < config.tie_head_steps, window_at(step, config)
    if isinstance(run.window, Tensor) and window:
        run.window.fill_(window)
    else:
        run.window = window
