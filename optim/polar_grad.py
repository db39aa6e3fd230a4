"""PolarGrad: the polar factor of the momentum times its nuclear norm (arXiv 2505.21799).

    U = P <P, M>    with P = polar(M), where <P, M> = sum_ij P_ij M_ij is the sum of M's singular values

which is the steepest descent of length ||M||_* under the spectral norm: steps shrink with the gradient, as those of
gradient descent do. No state. With Newton-Schulz steps <P, M> is as near to the nuclear norm as P to the polar factor.

This rule alone is not scale-free: an update is proportional to the gradients, so the learning rate belongs to their
scale, gradient clipping acts on every step, and where gradients are sums over tokens a rate for mean gradients has to
be divided by the number of tokens. NVIDIA's Emerging Optimizers take a rate of 3e-4, weight decay 0.01 and momentum
without Nesterov's step.
"""

import functools
import warnings
from typing import Any, ClassVar

from torch import Tensor

from optim.bank import State
from optim.checks import level_of_caller
from optim.matrix_optimizer import MatrixOptimizer


class PolarGrad(MatrixOptimizer):
    """Muon with updates as long as the momentum's nuclear norm. Warns that its rate is for mean gradients."""

    is_scale_free: ClassVar[bool] = False

    @functools.wraps(MatrixOptimizer.__init__)  # type: ignore[misc]  # the same signature
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        warnings.warn(
            "PolarGrad: the update is proportional to the gradients, and lr is one for mean gradients; where they are "
            "summed over tokens, divide lr by the number of tokens",
            stacklevel=level_of_caller(),
        )

    def orthogonalize(self, update: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        P = self.polar(update, group).float()
        return P * update.mul_(P).sum(dim=(-2, -1), keepdim=True)
