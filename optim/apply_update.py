"""From a direction to the weights: the learning rate, the scale of a matrix's shape, and weight decay."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda m, n: math.sqrt(max(1, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "aspect": lambda m, n: math.sqrt(m / n),
    "none": lambda m, n: 1.0,
}


def rate(group: dict[str, Any], is_finite: Tensor | None) -> Any:
    """The learning rate, or zero after a bad gradient, decided on the device."""
    return group["lr"] if is_finite is None else group["lr"] * is_finite.float()


def scaled(direction: Tensor, group: dict[str, Any], is_finite: Tensor | None) -> Tensor:
    """lr * scale * direction [..., m, n], float32; zero after a bad gradient."""
    return direction.float() * (rate(group, is_finite) * SCALES[group["scale"]](*direction.shape[-2:]))


def apply_update(weights: list[Tensor], updates: list[Tensor], group: dict[str, Any], is_finite: Tensor | None) -> None:
    """weight <- weight - lr * weight_decay * weight - update, in place."""
    if group["weight_decay"] and weights:
        decay = rate(group, is_finite) * group["weight_decay"]
        if group["cautious"]:
            decays = torch._foreach_mul(weights, updates)
            torch._foreach_sign_(decays)
            torch._foreach_clamp_min_(decays, 0)  # 1 where decay and update both shrink the weight, else 0
            torch._foreach_mul_(decays, weights)
            torch._foreach_mul_(decays, decay)
            torch._foreach_sub_(weights, decays)
        else:
            torch._foreach_mul_(weights, 1 - decay)
    if weights:
        torch._foreach_sub_(weights, updates)
