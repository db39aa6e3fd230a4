"""From a direction to the weights: the learning rate, the scale of a matrix's shape, weight decay, and what else may
act on a matrix W [m, n] whatever rule its update U (scale times direction) comes from:

hyperball      W keeps its Frobenius norm r, the learning rate is the step's share of it:
               W <- r W' / |W'| with W' = W - lr r U / |U|                              (arXiv 2606.16899)
update_floor   an update shorter than tau |W| is lengthened to that, as a whole or row by row (f_i = tau |W_i| / |U_i|
               where above 1): as NorMuon's record runs of the optimizer track have it in place of weight decay
radial_brake   k of the update's radial part a W, a = <U, W> / |W|^2, is kept where it makes W longer (a < 0), all of it
               where shorter; W then gets the norm |W| - lr <U, W> / |W| that this part alone gives it (in the same
               track's records k = 0.5)
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import backend
from optim.bank import Bank
from optim.options import Option

SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda m, n: math.sqrt(max(1, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "aspect": lambda m, n: math.sqrt(m / n),
    "none": lambda m, n: 1.0,
}
WEIGHT_OPTIONS = {
    "hyperball": Option(False, "keep each matrix's norm; the learning rate is the step's share of it"),
    "update_floor": Option(0.0, "shortest update, as a share of the weight's norm", (">= 0",)),
    "floor_by_row": Option(False, "that floor under each row of an update instead of the whole"),
    "radial_brake": Option(
        1.0, "share kept of what lengthens a weight; below 1 turning alone does not", (">= 0", "<= 1")
    ),
}
SMALLEST = 1e-8  # norm of a weight or of an update that is still told from zero


def check_weight_options(who: str, group: dict[str, Any], decay: str = "weight_decay") -> None:
    """ValueError for options that contradict each other; `decay` is what the user knows weight_decay by."""
    others = {
        "weight_decay": (decay, 0.0),
        "update_floor": ("update_floor", 0.0),
        "radial_brake": ("radial_brake", 1.0),
    }
    for key, (name, off) in others.items():
        if group["hyperball"] and group[key] != off:
            raise ValueError(
                f"{who}: hyperball keeps norms, and {name} = {group[key]} changes them; set {name} = {off}"
            )
    if group["floor_by_row"] and not group["update_floor"]:
        raise ValueError(f"{who}: floor_by_row is without a floor; set update_floor, 0.35 is usual")


def constrains(group: dict[str, Any]) -> bool:
    """Whether a step depends on the weights by more than weight decay."""
    return group["hyperball"] or group["update_floor"] > 0 or group["radial_brake"] < 1


def decays(group: dict[str, Any]) -> bool:
    """Whether weights decay, as far as one can say without waiting for the device."""
    return isinstance(group["weight_decay"], Tensor) or group["weight_decay"] != 0


def rate(group: dict[str, Any], is_finite: Tensor | None) -> Any:
    """The learning rate, or zero after a bad gradient, decided on the device."""
    return group["lr"] if is_finite is None else group["lr"] * is_finite.float()


def scaled(direction: Tensor, m: int, n: int, group: dict[str, Any], is_finite: Tensor | None) -> Tensor:
    """lr * scale * direction of m x n matrices, whole or in parts, float32, zero after a bad gradient; without lr where
    the step is constrained, which is then applied with the weights at hand."""
    scale: Any = SCALES[group["scale"]](m, n)
    return direction.float() * (scale if constrains(group) else rate(group, is_finite) * scale)


def apply_update(weights: list[Tensor], updates: list[Tensor], group: dict[str, Any], is_finite: Tensor | None) -> None:
    """weight <- weight - lr * weight_decay * weight - update, in place, of updates that `scaled` gave."""
    if not weights:
        return
    if constrains(group):
        W, U = (torch.stack(each).flatten(2) for each in (weights, updates))
        moved = constrained_step(W, U, group, rate(group, is_finite))
        moved = moved if is_finite is None else torch.where(is_finite, moved, W)  # to the bit, however short W is
        torch._foreach_copy_(weights, [w.view(weights[0].shape) for w in moved.unbind(0)])
        return
    if decays(group):
        decay = rate(group, is_finite) * group["weight_decay"]
        if group["cautious"]:
            lost = torch._foreach_mul(weights, updates)
            torch._foreach_sign_(lost)
            torch._foreach_clamp_min_(lost, 0)  # 1 where decay and update both shrink the weight, else 0
            torch._foreach_mul_(lost, weights)
            torch._foreach_mul_(lost, decay)
            torch._foreach_sub_(weights, lost)
        else:
            torch._foreach_mul_(weights, 1 - decay)
    torch._foreach_sub_(weights, updates)


def apply_in_one_pass(
    bank: Bank, directions: Tensor, group: dict[str, Any], is_finite: Tensor | None, kernels: str
) -> bool:
    """`scaled` and `apply_update` on a bank's weights by one kernel, from the directions of all its matrices as
    `bank.gathered` gives them. False, with nothing done, where other kernels are in use or this one cannot do it."""
    if bank.is_sharded or constrains(group) or backend(kernels, bank.device).name != "triton":
        return False
    from kernels.apply_update import apply_update

    places, weights = bank.active_weights()
    lr, scale = rate(group, is_finite), SCALES[group["scale"]](bank.m, bank.n)
    return apply_update(weights, directions, places, lr, scale, group["weight_decay"], group["cautious"])


def constrained_step(W: Tensor, U: Tensor, group: dict[str, Any], lr: Any) -> Tensor:
    """The weights W [B, m, n] after a step by U [B, m, n] under the group's constraints; where lr is 0 W itself,
    but that `radial_brake` keeps norms at SMALLEST or more."""
    norm = matrix_norm(W)
    if group["hyperball"]:
        U = U * (norm / matrix_norm(U).clamp_min(1e-10))
        return with_norm(W - lr * U, norm)
    if group["radial_brake"] < 1:
        radial = (U * W).sum(dim=(-2, -1), keepdim=True) / norm.square().clamp_min(1e-12)
        U = U - (1 - group["radial_brake"]) * radial.clamp_max(0) * W
    if group["update_floor"]:
        length = (lambda X: torch.linalg.vector_norm(X, dim=-1, keepdim=True)) if group["floor_by_row"] else matrix_norm
        least = group["update_floor"] * length(W).clamp_min(SMALLEST)
        U = U * (least / length(U).clamp_min(SMALLEST)).clamp_min(1)
    moved = W - lr * U
    if group["radial_brake"] < 1:
        along = (U * W).sum(dim=(-2, -1), keepdim=True) / norm.clamp_min(SMALLEST)
        moved = with_norm(moved, (norm - lr * along).clamp_min(SMALLEST))
    if decays(group):  # after the norm was set, which would undo it
        decaying = moved.where(U * W > 0, 0) if group["cautious"] else moved
        moved = moved - lr * group["weight_decay"] * decaying
    return moved


def matrix_norm(X: Tensor) -> Tensor:
    """Frobenius norms of X [B, m, n], [B, 1, 1]."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)


def with_norm(X: Tensor, norm: Tensor) -> Tensor:
    return X * (norm / matrix_norm(X).clamp_min(1e-10))
