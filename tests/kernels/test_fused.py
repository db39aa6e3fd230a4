"""Gradients written out against autograd's own, in float64; and how far they are off in bfloat16."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import fused

Function = Callable[..., Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


rms_norm, rotate = (partial(function, is_fused=True) for function in (fused.rms_norm, fused.rotate))


def plain_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).mT.flatten(-2)


def angles() -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(5, dtype=torch.float64), torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64))
    return angle.cos()[:, None], angle.sin()[:, None]


CASES: dict[str, tuple[Function, Function, tuple[Tensor, ...]]] = {
    "rms_norm": (rms_norm, plain_norm, (randn(3, 5, 7),)),
    "rms_norm of heads": (rms_norm, plain_norm, (randn(2, 5, 3, 6),)),
    "rms_norm of one number": (rms_norm, plain_norm, (randn(4, 1),)),
    "rotate": (rotate, plain_rotation, (randn(2, 5, 3, 6), *angles())),
}
with_case = pytest.mark.parametrize("case", CASES)


@with_case
def test_results_and_gradients_are_the_plain_forms(case: str) -> None:
    function, plain, inputs = CASES[case]
    wanted = [x for x in inputs if x.requires_grad]
    out, expected = function(*inputs), plain(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = randn(*out.shape, seed=1).detach()
    found, right = (torch.autograd.grad(y, wanted, weight) for y in (out, expected))
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-12)


@with_case
def test_gradients_are_the_slopes(case: str) -> None:
    function, _, inputs = CASES[case]
    assert torch.autograd.gradcheck(function, inputs)


def test_a_row_of_zeros_has_finite_gradients() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x).sum().backward()
    plain = torch.zeros(2, 8, requires_grad=True)
    plain_norm(plain).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)


def test_in_bfloat16_the_error_of_the_norm_is_a_few_roundings() -> None:
    """Autograd's RMSNorm computes in float32 and rounds once: 0.0016; the written out one rounds thrice: 0.0034."""
    function, plain, inputs = CASES["rms_norm"]
    large = [randn(64, *x.shape[1:]) if i == 0 else x for i, x in enumerate(inputs)]
    rounded = [x.detach().bfloat16() for x in large]
    weight = randn(*function(*large).shape, seed=1).detach().bfloat16()

    def gradients(f: Function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in rounded]
        return list(torch.autograd.grad(f(*leaves), leaves, weight.to(dtype)))

    exact = gradients(plain, torch.float64)
    errors = [
        [((a.double() - b).norm() / b.norm()).item() for a, b in zip(gradients(f, torch.bfloat16), exact, strict=True)]
        for f in (function, plain)
    ]
    assert all(ours < 2.5 * plains for ours, plains in zip(*errors, strict=True)), errors


@with_case
def test_compiled_it_is_one_graph_with_the_same_results(case: str) -> None:
    function, _, inputs = CASES[case]
    wanted = [x for x in inputs if x.requires_grad]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    out, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    found, right = (torch.autograd.grad(y.sum(), wanted) for y in (out, expected))
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-12)
