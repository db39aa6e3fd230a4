"""What only a GPU can show: CUDA graphs, no allocation, no synchronisation, and both kernels against each other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optim import Aurora, Muon
from optim.aurora import aurora_polar
from optim.polar import polar

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
RULES = pytest.mark.parametrize("rule", [polar, aurora_polar], ids=["polar", "aurora_polar"])
SHAPES = [(4, 768, 768), (4, 2048, 768), (4, 768, 2048), (3, 130, 70)]
with_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).cuda()


@RULES
@with_shape
def test_triton_is_no_further_from_float32_than_plain_torch(
    rule: Callable[..., Tensor], shape: tuple[int, int, int]
) -> None:
    X = randn(*shape)
    exact = rule(X.cpu(), dtype=torch.float32, kernels="torch").double()
    errors = {
        kernels: (rule(X, kernels=kernels).cpu().double() - exact).norm() / exact.norm()
        for kernels in ("triton", "torch")
    }
    assert errors["triton"] <= 1.1 * errors["torch"] + 1e-3


@RULES
@with_shape
def test_a_cuda_graph_replays_the_same_numbers(rule: Callable[..., Tensor], shape: tuple[int, int, int]) -> None:
    X = randn(*shape)
    rule(X)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = rule(X)
    X.copy_(randn(*shape) + 1)
    graph.replay()
    assert torch.equal(result, rule(X))


@pytest.mark.parametrize("optimizer", [Muon, Aurora])
def test_steps_after_the_first_neither_allocate_nor_wait(optimizer: type[Muon]) -> None:
    """No new device memory from the driver, and nothing that stops the host until the device is done."""
    params = [nn.Parameter(randn(2048, 768)), nn.Parameter(randn(768, 768)), nn.Parameter(randn(768, 2048))]
    for p in params:
        p.grad = torch.randn_like(p)
    step = optimizer(params).step
    for _ in range(2):
        step()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
