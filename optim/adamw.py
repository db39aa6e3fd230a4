"""torch's AdamW with cautious weight decay (arXiv 2510.12402): only where decay and update both shrink a weight.

    q = [U W > 0],   W <- W - lr weight_decay q W - lr U

U is Adam's update, whose sign is that of the next first moment, beta1 exp_avg + (1 - beta1) gradient.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from optim.shards import local

_plain_step = inspect.unwrap(torch.optim.AdamW.step)  # hooks have been called around the step that calls it


class CautiousAdamW(torch.optim.AdamW):
    """Takes torch's own step, fused or not, without decay, after it has decayed the weights. State dicts are torch's.
    Not for `maximize`, nor for a GradScaler: a step that it skips would decay weights all the same."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            self._decay(group)
        try:
            for group in self.param_groups:
                group["weight_decay"] = 0.0
            _plain_step(self)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        return loss

    def _decay(self, group: dict[str, Any]) -> None:
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights or not group["weight_decay"]:
            return
        gradients = [p.grad for p in weights]
        moments = [self.state[p].get("exp_avg", p.grad) for p in weights]  # before the first step only the sign counts
        weights, gradients, moments = (list(map(local, each)) for each in (weights, gradients, moments))
        decays = torch._foreach_lerp(moments, gradients, 1 - group["betas"][0])
        torch._foreach_sign_(decays)  # of the update; its product with a small weight could round to zero
        torch._foreach_mul_(decays, weights)
        torch._foreach_sign_(decays)
        torch._foreach_clamp_min_(decays, 0)
        torch._foreach_mul_(decays, weights)
        torch._foreach_mul_(decays, group["lr"] * group["weight_decay"])
        torch._foreach_sub_(weights, decays)
