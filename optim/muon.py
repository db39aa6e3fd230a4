"""MatrixOptimizer, which moves hidden matrices by an orthogonalised momentum, and Muon, its plainest form.

For each matrix with gradient G (m rows are outputs, n columns inputs), momentum B, learning rate lr:

    B <- momentum * B + (1 - momentum) * G
    M  = momentum * B + (1 - momentum) * G       (nesterov; else M = B)
    U  = orthogonalize(M)                        (Muon: the polar factor of M)
    W <- (1 - lr * weight_decay) * W - lr * scale(m, n) * U

Muon: Keller Jordan et al. (2024), https://kellerjordan.github.io/posts/muon. Scale "spectral" is from there,
"match_rms_adamw" from Liu et al., arXiv 2502.16982, which lets AdamW's learning rates be used.

A new update rule is a subclass with one method:

    class SignMuon(MatrixOptimizer):
        def orthogonalize(self, update, state, group):
            return update.sign() / update.size(-1) ** 0.5
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import backend
from optim.bank import Bank, make_banks
from optim.polar import check_polar_arguments, fast_half_dtype, polar

SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda m, n: math.sqrt(max(1, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "none": lambda m, n: 1.0,
}


class MatrixOptimizer(torch.optim.Optimizer):
    """Base class: momentum, batches of equal shape, averaging over ranks, weight decay, the update.

    Parameters have two or more dimensions; the last two are the matrix, leading ones are batch. Momentum is
    float32 whatever the parameter's dtype. Gradients are averaged over `process_group` (default: all ranks, where
    torch.distributed is initialised) and must be present on the same parameters everywhere. A parameter without
    a gradient is skipped. `kernels` is "auto" (Triton on CUDA), "triton" or "torch".
    Raises ValueError for wrong hyperparameters and for parameters that are not matrices; FloatingPointError, before
    anything is touched, for a gradient on the CPU that is not finite. On CUDA that check would stall the device at
    every step: there NaN propagates, and the caller's look at the loss finds it.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: str = "spectral",
        polar_method: str = "polar_express",
        polar_steps: int | None = None,
        kernels: str = "auto",
        process_group: dist.ProcessGroup | None = None,
        **rule: Any,
    ) -> None:
        self.kernels, self.process_group = kernels, process_group  # where and how, not what: no part of the state
        self._banks: dict[int, list[Bank]] = {}  # index of the param group -> its banks, made when first needed
        defaults = dict(
            lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, scale=scale,
            polar_method=polar_method, polar_steps=polar_steps, **rule,
        )  # fmt: skip
        super().__init__(params, defaults)

    def orthogonalize(self, update: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """The direction to move in, for a batch of momenta `update` [B, m, n] float32; same shape, any dtype.

        `update` may be overwritten. `state` holds this batch's tensors of leading size B, to be changed in place.
        """
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, index: int) -> None:
        group, rule = self.param_groups[index], type(self).__name__
        for key, low, high in (("lr", 0, math.inf), ("momentum", 0, 1), ("weight_decay", 0, math.inf)):
            if not low <= group[key] < high:
                raise ValueError(f"{rule}: {key} = {group[key]} must be at least {low} and below {high}")
        if group["scale"] not in SCALES:
            raise ValueError(f"{rule}: scale = {group['scale']!r} is unknown; choose one of {', '.join(SCALES)}")
        check_polar_arguments(group["polar_method"], group["polar_steps"])
        for name, p in zip(self._names(index), group["params"], strict=True):
            if p.ndim < 2:
                raise ValueError(
                    f"{rule}: {name} has shape {tuple(p.shape)} and is no matrix; give it to torch.optim.AdamW"
                )
            if not p.is_floating_point():
                raise ValueError(
                    f"{rule}: {name} has dtype {p.dtype}; only real floating-point matrices can be updated"
                )
            backend(self.kernels, p.device)

    def _names(self, index: int) -> list[str]:
        group = self.param_groups[index]
        return group.get("param_names") or [f"parameter {i} of group {index}" for i in range(len(group["params"]))]

    def _group_banks(self, index: int) -> list[Bank]:
        if index not in self._banks:
            self._banks[index] = make_banks(self.param_groups[index]["params"], self._names(index))
            for bank in self._banks[index]:
                bank.restore(self.state)
        return self._banks[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "kernels": self.kernels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also the end of load_state_dict: the banks no longer hold the state
        self._banks = {}
        self.__dict__.setdefault("process_group", None)
        self.__dict__.setdefault("kernels", "auto")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state stays float32 where torch would cast it to the parameter's dtype."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                self.state[p][name] = value.to(p.device, torch.float32, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        banks = [
            (bank, group)
            for index, group in enumerate(self.param_groups)
            for bank in self._group_banks(index)
            if any(p.grad is not None for p in bank.params)
        ]
        gradients = [bank.average_gradients(self.process_group) for bank, _ in banks]
        for (bank, _), gradient in zip(banks, gradients, strict=True):
            if gradient.device.type == "cpu":
                bank.check_finite(gradient)
        for bank, group in banks:
            self._update(bank, gradients.pop(0), group)  # popped: each is freed once it is used
        return loss

    def _update(self, bank: Bank, gradient: Tensor, group: dict[str, Any]) -> None:
        if "momentum_buffer" not in bank.state:
            bank.attach("momentum_buffer", torch.zeros_like(bank.join(bank.params)), self.state)
            if bank.params[0].dtype != torch.float32:
                bank.attach("master_weight", bank.join(bank.params), self.state)
        rows = bank.rows_with_gradient()
        state = bank.state if rows is None else {name: value[rows] for name, value in bank.state.items()}
        momentum_buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp_(momentum_buffer, group["momentum"]) if group["nesterov"] else momentum_buffer.clone()
        with torch.autocast(update.device.type, enabled=False):  # the caller's would recast the products
            direction = self.orthogonalize(update, state, group)
        if rows is not None:
            for name, value in state.items():
                bank.state[name][rows] = value
        scale = SCALES[group["scale"]](bank.m, bank.n)
        bank.apply(direction.float() * (group["lr"] * scale), 1 - group["lr"] * group["weight_decay"])


class Muon(MatrixOptimizer):
    """Muon: the update is the polar factor of the (Nesterov) momentum."""

    def orthogonalize(self, update: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        dtype = fast_half_dtype(update.device.type)
        return polar(update, group["polar_method"], group["polar_steps"], dtype, self.kernels)
