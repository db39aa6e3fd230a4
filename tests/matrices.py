"""Matrices for tests of the optimizers, the same on every machine, and float64 for all that is computed with them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def uneven(m: int, n: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """A Gaussian whose longer side has log-normal scales: rows of a tall matrix, columns of a wide one."""
    scale = (spread * randn(max(m, n), seed=seed + 1)).exp()
    return randn(m, n, seed=seed) * (scale[:, None] if m > n else scale)


class Float64(TorchFunctionMode):
    """Inside, whatever asks torch for float32 or bfloat16 gets float64: `.float()`, `dtype=torch.float32` and the like.

    Two ways to compute the same then differ by roundings of 1e-16. What amplifies them most is Polar Express: each of
    its factors multiplies a weak direction by up to 990, the product of its linear coefficients, so that two or three
    of them in a step and a few dozen steps stay below 1e-9, the bound of the tests. In float32 there is no such bound:
    1e-7 times 990 twice over is as large as the update.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.bfloat16:  # of float32 a copy, which may then be written to
            return args[0].to(torch.float64, copy=True)
        func = Tensor.double if func is Tensor.float else func
        return func(*map(_widened, args), **{key: _widened(value) for key, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 or value is torch.bfloat16 else value
