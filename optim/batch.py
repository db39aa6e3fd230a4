"""What an update rule works with: the matrices of one bank that a rank owns, in one step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optim.bank import State, by_matrix


@dataclass
class MatrixBatch:
    """`state` holds tensors of leading size B, to be changed or replaced; a rule adds its own under new names when they
    are missing, and meets zeros for matrices that it has not seen."""

    gradient: Tensor  # mean over the ranks [B, m, n], float32; zeros where `active` is false
    state: State
    group: dict[str, Any]  # the param group's options
    weights: Callable[[], Tensor]  # gives a copy of the weights [B, m, n], float32
    active: Tensor | None = None  # bool [B]: the matrices that move; None: all

    def momentum(self, gradient: Tensor | None = None) -> Tensor:
        """The momentum after this step's gradient, looking one more step ahead with `nesterov`, [B, m, n] float32.

        `gradient` is the batch's own, or what a rule has made of it; it is overwritten.
        """
        gradient = self.gradient if gradient is None else gradient
        share = self.group["momentum"]
        weight = 1 - share
        if self.active is not None:
            weight = weight * by_matrix(self.active, gradient).float()
        buffer = self.state["momentum_buffer"].lerp_(gradient, weight)
        return gradient.lerp_(buffer, share) if self.group["nesterov"] else buffer.clone()

    def per_matrix(self, name: str, *sizes: int) -> Tensor:
        """The state `name`, [B, *sizes] float32, from zeros."""
        if name not in self.state:
            self.state[name] = self.gradient.new_zeros(self.gradient.size(0), *sizes)
        return self.state[name]
