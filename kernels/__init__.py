"""Kernels of the optimizers and of the loss: Triton on CUDA, the same functions in plain torch everywhere else.

    ops = kernels.backend("auto", device)
    R = ops.gram(X)                momentum, momentum_rows, normalize_rows, scale_rows, gram, symmetric_product,
                                   apply_symmetric, cross_entropy (kernels/linear_cross_entropy.py puts the head first)

Each Triton file says what it computes and costs; reference.py holds the plain twins with the same arguments.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
# Of the operators in torch.ops. A copy of this package under another name, as in the wheel, has operators of its own.
NAMESPACE = f"aurora_{__name__.replace('.', '_')}"
BACKENDS = ("auto", "triton", "torch")
HAS_TRITON = importlib.util.find_spec("triton") is not None  # there is none for macOS


class Backend(NamedTuple):
    """One implementation of every kernel that both have. `symmetric`: computes half of a symmetric product."""

    name: str
    symmetric: bool
    momentum: Callable[..., Any]
    momentum_rows: Callable[..., Any]
    normalize_rows: Callable[..., Any]
    scale_rows: Callable[..., Any]
    gram: Callable[..., Any]
    symmetric_product: Callable[..., Any]
    apply_symmetric: Callable[..., Any]
    cross_entropy: Callable[..., Any]


def backend(kernels: str, device: torch.device) -> Backend:
    """What `kernels` ("auto", "triton" or "torch") means on `device`; auto is Triton where it can run.

    Raises ValueError for another name and for Triton where it cannot run.
    """
    if kernels not in BACKENDS:
        raise ValueError(f"kernels = {kernels!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if kernels == "torch" or (kernels == "auto" and not (device.type == "cuda" and HAS_TRITON)):
        return _torch()
    if not HAS_TRITON:
        raise ValueError("kernels = 'triton', but Triton is not installed here; use kernels = 'torch' or 'auto'")
    from kernels.triton_common import can_launch

    if can_launch(device):
        return _triton()
    if kernels == "auto":
        return _torch()
    raise ValueError(
        f"kernels = 'triton' needs a CUDA GPU of compute capability 8.0 or later, and the tensors are on {device}; "
        "use kernels = 'torch' or 'auto'"
    )


def constant(function: F) -> F:
    """Mark a function whose result torch.compile may take as a constant: torch.compiler.assume_constant_result, which
    imports the compiler to do just this, two seconds of the start of every process."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _torch() -> Backend:
    from kernels import reference as r

    return Backend(
        "torch", False, r.momentum, r.momentum_rows, r.normalize_rows, r.scale_rows, r.gram, r.symmetric_product,
        r.apply_symmetric, r.cross_entropy,
    )  # fmt: skip


def _triton() -> Backend:
    from kernels.apply_symmetric import apply_symmetric
    from kernels.cross_entropy import cross_entropy
    from kernels.gram import gram
    from kernels.momentum import momentum, momentum_rows
    from kernels.normalize_rows import normalize_rows
    from kernels.scale_rows import scale_rows
    from kernels.symmetric_product import symmetric_product

    return Backend(
        "triton", True, momentum, momentum_rows, normalize_rows, scale_rows, gram, symmetric_product, apply_symmetric,
        cross_entropy,
    )  # fmt: skip
