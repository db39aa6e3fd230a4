"""What an update rule works with: the matrices of one bank that a rank owns, in one step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels import backend
from optim.bank import State, by_matrix
from optim.gradients import Gradients
from optim.unit_rows import UnitRows


@dataclass
class MatrixBatch:
    """`state` holds tensors of leading size B, to be changed or replaced; a rule adds its own under new names when they
    are missing, and meets zeros for matrices that it has not seen."""

    gradients: Gradients  # means over the ranks of B matrices; anything, NaN too, where `active` is false
    state: State
    group: dict[str, Any]  # the param group's options
    weights: Callable[[], Tensor]  # gives a copy of the weights [B, m, n], float32
    active: Tensor | None = None  # bool [B]: the matrices that move; None: all
    kernels: str = "torch"
    _is_masked: bool = field(default=False, init=False)
    _is_spent: bool = field(default=False, init=False)  # the gradient, on the momentum

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.gradients.shape

    @property
    def device(self) -> torch.device:
        return self.gradients.device

    @property
    def gradient(self) -> Tensor:
        """The mean over the ranks, [B, m, n] float32; zeros where `active` is false. Made at the first use: passes over
        memory that a rule of momentum alone does without. RuntimeError after the momentum was made of it."""
        if self._is_spent:
            raise RuntimeError(
                "batch.gradient was read after batch.momentum(), which may overwrite it; read it before, and clone() "
                "what is needed after"
            )
        whole = self.gradients.whole
        if self.active is not None and not self._is_masked:
            whole.masked_fill_(~by_matrix(self.active, whole), 0)
            self._is_masked = True
        return whole

    def momentum(self, gradient: Tensor | None = None) -> Tensor:
        """The momentum after this step's gradient, looking one more step ahead with `nesterov`, [B, m, n] float32.

        `gradient` is the batch's own, or what a rule has made of it, float32 [B, m, n]; it may be overwritten.
        """
        matrices = self.gradients.readable(self.kernels) if gradient is None else gradient.contiguous()
        self._is_spent |= gradient is None
        return backend(self.kernels, self.device).momentum(matrices, *self._momentum_arguments())

    def momentum_rows(self, dtype: torch.dtype) -> UnitRows:
        """What `polar` makes of that momentum first, in `dtype`: its rows scaled to norm 1, in the same pass."""
        matrices, ops = self.gradients.readable(self.kernels), backend(self.kernels, self.device)
        self._is_spent = True
        rows, norm = ops.momentum_rows(matrices, *self._momentum_arguments(), dtype)
        return UnitRows(rows, norm, torch.Size(self.shape))

    def _momentum_arguments(self) -> tuple[Any, ...]:
        return self.state["momentum_buffer"], self.group["momentum"], self.group["nesterov"], self.active

    def per_matrix(self, name: str, *sizes: int) -> Tensor:
        """The state `name`, [B, *sizes] float32, from zeros."""
        if name not in self.state:
            self.state[name] = torch.zeros(self.shape[0], *sizes, dtype=torch.float32, device=self.device)
        return self.state[name]
