"""Running means over a run, of steps and of weights, whatever optimizers take the steps.

    averages = Averages(model, optimizers, config)
    averages.lookahead.shift(0.3, 0.3)     before the forward pass
    ...                                    forward, backward, the optimizers' steps
    averages.lookahead.note_step()
    averages.tail.update()
    with averages.tail.in_place(): ...     the loss of the averaged weights

They are of all parameters, the token embedding's too, which published runs leave out of the average. Every rank holds
whole weights and so the whole of both, or shards of all three: nothing is sent, and results are the same on any number
of ranks.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from optim.shards import local, shard_like


@dataclass(frozen=True)
class AveragesConfig:
    """When there are means, and of how many steps."""

    # Means over steps
    lookahead: Annotated[float, ">= 0"] = 0.0  # mean steps by which weights go ahead before a step, at the full rate
    lookahead_decay: Annotated[float, ">= 0", "< 1"] = 0.99  # share of the mean step that a step keeps
    lookahead_start: Annotated[int, ">= 0"] = 0  # first step before which weights go ahead
    lookahead_end: Annotated[int, ">= 0"] = 0  # first step before which they no longer do; 0: none
    average_steps: Annotated[int, ">= 0"] = 0  # length of the average of weights that is evaluated; 0: no average
    average_start: Annotated[int, "> 0"] = 1  # steps after which it begins, with the weights there are then
    average_share: Annotated[float, ">= 0", "<= 1"] = 1.0  # of the average in what is evaluated, beside the weights

    def check_averages(self, train_steps: int) -> None:
        """Raises ValueError for what would begin after its end."""
        end = min(self.lookahead_end or train_steps, train_steps)
        if self.lookahead and self.lookahead_start >= end:
            name = f"lookahead_end = {end}" if end < train_steps else f"train_steps = {train_steps}"
            raise ValueError(f"lookahead_start = {self.lookahead_start} must be less than {name}; 0 works")
        if self.average_steps and self.average_start >= train_steps:
            limit = f"average_start = {self.average_start} must be less than train_steps = {train_steps}"
            raise ValueError(f"{limit}, or nothing is averaged; set it lower, or average_steps = 0 for no average")


class Lookahead:
    """EMA-Nesterov (arXiv 2605.25395): before a step the weights go ahead along the running mean E of the steps so far.

        W' = W + share E,   W'' = W' - the optimizer's step from there,   E <- decay E + (1 - decay) (W'' - W)

    The shift is part of the step and is not undone. E starts at zero and gathers from the first step on. Groups of the
    optimizers carry a `name`; that of the matrices, "matrix", has a share of its own. Memory: two copies of the
    weights, of which checkpoints hold E. Without optimizers nothing is kept and nothing moves.

    Raises ValueError for parameters of 16 bits, which follow float32 weights that their optimizer keeps.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer], decay: float) -> None:
        self.decay = decay
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.weights: dict[str, list[Tensor]] = {group["name"]: group["params"] for group in groups}
        for p in (p for weights in self.weights.values() for p in weights):
            if p.dtype.itemsize < 4:
                raise ValueError(f"lookahead needs parameters of 32 bits or more, not {p.dtype}; keep them in float32")
        self.mean_step = {name: [torch.zeros_like(p) for p in weights] for name, weights in self.weights.items()}
        self._before = {name: [torch.empty_like(p) for p in weights] for name, weights in self.weights.items()}

    @torch.no_grad()
    def shift(self, of_matrices: float, of_others: float) -> None:
        """Let weights go ahead by these shares of their mean step."""
        for name, weights in self.weights.items():
            here = list(map(local, weights))
            torch._foreach_copy_(list(map(local, self._before[name])), here)
            if share := of_matrices if name == "matrix" else of_others:
                torch._foreach_add_(here, list(map(local, self.mean_step[name])), alpha=share)

    @torch.no_grad()
    def note_step(self) -> None:
        """Take the way that the weights have come since `shift` began into the mean."""
        for name, weights in self.weights.items():
            before, mean_step = (list(map(local, each)) for each in (self._before[name], self.mean_step[name]))
            torch._foreach_sub_(before, list(map(local, weights)))
            torch._foreach_mul_(mean_step, self.decay)
            torch._foreach_add_(mean_step, before, alpha=self.decay - 1)

    def state_dict(self) -> dict[str, Any]:
        return {name: list(steps) for name, steps in self.mean_step.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """A state without some groups leaves theirs as it is."""
        for name in self.mean_step.keys() & state_dict.keys():
            for mean, saved in zip(self.mean_step[name], state_dict[name], strict=True):
                mean.copy_(shard_like(saved, mean))


class TailAverage:
    """Exponential average E of a model's weights over about the last `steps` steps, for evaluation alone.

        E <- E + (W - E) / steps

    at every `update` but the first, at which E starts as the weights. Evaluated is (1 - share) W + share E.
    Memory: a copy of the weights in float32 or wider, in checkpoints too, and another one while E is in place.
    """

    def __init__(self, model: nn.Module, steps: int, share: float) -> None:
        self.weights, self.steps, self.share = dict(model.named_parameters()), steps, share
        self.mean: dict[str, Tensor] = {}  # empty until it begins

    @torch.no_grad()
    def update(self) -> None:
        if not self.mean:
            widths = {name: torch.promote_types(p.dtype, torch.float32) for name, p in self.weights.items()}
            self.mean = {name: p.to(widths[name], copy=True) for name, p in self.weights.items()}
            return
        weights = [local(self.weights[name]).to(mean.dtype) for name, mean in self.mean.items()]
        torch._foreach_lerp_(list(map(local, self.mean.values())), weights, 1 / self.steps)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """A block in which the model has the weights that are to be evaluated; its own ones until E begins."""
        kept = {name: self.weights[name].detach().clone() for name in self.mean}
        try:
            with torch.no_grad():
                for name, weight in kept.items():
                    self.weights[name].copy_(averaged(weight, self.mean[name], self.share))
            yield
        finally:
            with torch.no_grad():
                for name, weight in kept.items():
                    self.weights[name].copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.mean)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        shards = {name: shard_like(saved, self.weights[name]) for name, saved in state_dict.items()}
        self.mean = {name: saved.to(self.weights[name].device, copy=True) for name, saved in shards.items()}


class Averages:
    """Both as the settings say; what is off keeps nothing and does nothing."""

    def __init__(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], config: AveragesConfig) -> None:
        self.lookahead = Lookahead(optimizers if config.lookahead else [], config.lookahead_decay)
        self.tail = TailAverage(model, config.average_steps, config.average_share)

    def state_dict(self) -> dict[str, Any]:
        """Without what is off, or has not begun."""
        states = {"lookahead": self.lookahead.state_dict(), "average": self.tail.state_dict()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.lookahead.load_state_dict(state_dict.get("lookahead", {}))
        self.tail.load_state_dict(state_dict.get("average", {}))

    def resume(self, checkpoint: dict[str, Any], has_begun: bool) -> None:
        """Take the state out of a checkpoint; that of the average only if by these settings it has begun there."""
        saved = {name: checkpoint.pop(name, {}) for name in ("lookahead", "average")}
        self.load_state_dict(saved if has_begun else saved | {"average": {}})


def averaged(weight: Tensor, mean: Tensor, share: float) -> Tensor:
    """What is evaluated in place of a weight, in its dtype."""
    return weight.to(mean.dtype).lerp(mean, share).to(weight.dtype)
