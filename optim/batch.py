"""What an update rule works with: the matrices of one bank that a rank owns, in one step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kernels import backend
from optim.bank import State, by_matrix


@dataclass
class MatrixBatch:
    """`state` holds tensors of leading size B, to be changed or replaced; a rule adds its own under new names when they
    are missing, and meets zeros for matrices that it has not seen."""

    unmasked_gradient: Tensor  # mean over the ranks [B, m, n], float32; anything, NaN too, where `active` is false
    state: State
    group: dict[str, Any]  # the param group's options
    weights: Callable[[], Tensor]  # gives a copy of the weights [B, m, n], float32
    active: Tensor | None = None  # bool [B]: the matrices that move; None: all
    kernels: str = "torch"
    _is_masked: bool = field(default=False, init=False)

    @property
    def gradient(self) -> Tensor:
        """The mean over the ranks, [B, m, n] float32; zeros where `active` is false, set at the first use: a pass over
        memory that a rule of momentum alone does without."""
        if self.active is not None and not self._is_masked:
            self.unmasked_gradient.masked_fill_(~by_matrix(self.active, self.unmasked_gradient), 0)
            self._is_masked = True
        return self.unmasked_gradient

    def momentum(self, gradient: Tensor | None = None) -> Tensor:
        """The momentum after this step's gradient, looking one more step ahead with `nesterov`, [B, m, n] float32.

        `gradient` is the batch's own, or what a rule has made of it; it is overwritten.
        """
        if gradient is None:
            gradient, self._is_masked = self.unmasked_gradient, True  # or overwritten, which is as good
        momentum, buffer = backend(self.kernels, gradient.device).momentum, self.state["momentum_buffer"]
        return momentum(gradient.contiguous(), buffer, self.group["momentum"], self.group["nesterov"], self.active)

    def per_matrix(self, name: str, *sizes: int) -> Tensor:
        """The state `name`, [B, *sizes] float32, from zeros."""
        if name not in self.state:
            gradient = self.unmasked_gradient
            self.state[name] = gradient.new_zeros(gradient.size(0), *sizes)
        return self.state[name]
