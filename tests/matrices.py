"""Matrices for tests of the optimizers, the same on every machine."""

import torch


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def uneven(m: int, n: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """A Gaussian whose longer side has log-normal scales: rows of a tall matrix, columns of a wide one."""
    scale = (spread * randn(max(m, n), seed=seed + 1)).exp()
    return randn(m, n, seed=seed) * (scale[:, None] if m > n else scale)
