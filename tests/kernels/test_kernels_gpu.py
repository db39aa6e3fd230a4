"""What only a GPU can show: CUDA graphs, no allocation, no synchronisation, and both kernels against each other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.loss_head import exact, forward_backward, make_inputs, peak_bytes
from kernels.linear_cross_entropy import linear_cross_entropy
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
def test_a_captured_step_is_an_ordinary_one(optimizer: type[Muon]) -> None:
    """As tests/optim/test_capture.py has it of all rules, by an imitation; here by the driver."""
    shapes = [(2048, 768), (768, 768), (768, 2048)]
    params, twins = ([nn.Parameter(randn(*shape)) for shape in shapes] for _ in range(2))
    for p in (*params, *twins):
        p.grad = torch.zeros_like(p)
    ordinary, captured = (optimizer(each, torch.tensor(0.02).cuda(), defer_check=True) for each in (params, twins))
    graph = torch.cuda.CUDAGraph()
    for step, lr in enumerate((0.02, 0.03, 0.01, 0.005, 0.02)):
        for p, twin in zip(params, twins, strict=True):
            p.grad.copy_(randn(*p.shape) + step)
            p.grad += torch.nan if step == 3 else 0.0
            twin.grad.copy_(p.grad)
        for each in (ordinary, captured):
            each.param_groups[0]["lr"].fill_(lr)
        ordinary.step()
        if step < 2:
            captured.step()
        else:
            if step == 2:
                with torch.cuda.graph(graph):
                    captured.step()
            graph.replay()
        assert all(map(torch.equal, params, twins)), step
    with pytest.raises(FloatingPointError, match="parameter 0"):
        captured.raise_if_not_finite()


@pytest.mark.parametrize("moves", [False, True], ids=["gradients stay", "gradients move"])
@pytest.mark.parametrize("optimizer", [Muon, Aurora])
def test_steps_after_the_first_neither_allocate_nor_wait(optimizer: type[Muon], moves: bool) -> None:
    """No new device memory from the driver, and nothing that stops the host until the device is done; with the check of
    the gradients deferred, as in the trainer, since an answer at once has to be waited for."""
    params = [nn.Parameter(randn(2048, 768)), nn.Parameter(randn(768, 768)), nn.Parameter(randn(768, 2048))]
    for p in params:
        p.grad = torch.randn_like(p)
    step = optimizer(params, defer_check=True).step
    places = [[torch.randn_like(p) for p in params] for _ in range(5)]
    for _ in range(2):
        step()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for gradients in places:
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient if moves else p.grad
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


HEADS = [(1024, 50304, 768), (3000, 257, 128), (2048, 320, 128)]
with_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: "x".join(map(str, head)))
CUDA = torch.device("cuda")


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@with_head
def test_the_fused_loss_is_no_further_from_float64_than_the_plain_one(head: tuple[int, int, int], kernels: str) -> None:
    """In bfloat16, in ragged chunks, and the same bits again."""
    x, weight, targets = make_inputs(head, torch.bfloat16, CUDA)
    expected = exact(x, weight, targets)
    first, again = (
        (loss.detach(), *torch.autograd.grad(loss, (x, weight)))
        for loss in (linear_cross_entropy(x, weight, targets, chunk_tokens=700, kernels=kernels) for _ in range(2))
    )
    assert all(map(torch.equal, first, again))
    for name, result, plain, e in zip(
        ("loss", "dx", "dW"), first, forward_backward("plain", x, weight, targets), expected, strict=True
    ):
        own, rival = ((r.double().cpu() - e.cpu()).norm() / e.cpu().norm() for r in (result, plain))
        assert own <= 1.02 * rival + 1e-6, name


def test_an_upstream_gradient_is_not_rounded_to_half_precision() -> None:
    """1/3000 in bfloat16 is off by 0.13 %, and so would be every gradient."""
    x, weight, targets = make_inputs((512, 320, 64), torch.bfloat16, CUDA)
    loss = linear_cross_entropy(x, weight, targets)
    once, scaled = (torch.autograd.grad(loss * factor, x, retain_graph=True)[0].double() for factor in (1, 1 / 3000))
    assert abs(float((3000 * scaled * once).sum() / once.square().sum()) - 1) < 2e-4


def test_the_fused_loss_takes_a_quarter_of_the_memory() -> None:
    fused, plain = (peak_bytes(variant, (16384, 50304, 768), torch.bfloat16, CUDA) for variant in ("fused", "plain"))
    assert fused <= plain / 4


def test_the_fused_loss_neither_allocates_again_nor_waits() -> None:
    x, weight, targets = make_inputs((4096, 50304, 128), torch.bfloat16, CUDA)

    def step() -> None:
        loss = linear_cross_entropy(x, weight, targets, chunk_tokens=1024)
        torch.autograd.grad(loss, (x, weight))

    for _ in range(2):
        step()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("target", [320, -2, 2**40])
def test_a_wrong_target_gives_nan_and_leaves_the_device_alive(kernels: str, target: int) -> None:
    x, weight, targets = make_inputs((64, 320, 32), torch.bfloat16, CUDA)
    targets[5] = target
    loss = linear_cross_entropy(x, weight, targets, kernels=kernels)
    (dx,) = torch.autograd.grad(loss, x)
    assert loss.isnan()
    assert dx.isnan().any(dim=1).tolist() == [row == 5 for row in range(64)]
    targets[5] = 0
    assert linear_cross_entropy(x, weight, targets, kernels=kernels).isfinite()


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_inductor_takes_the_fused_loss_whole(kernels: str) -> None:
    x, weight, targets = make_inputs((512, 320, 64), torch.bfloat16, CUDA)

    def step(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, kernels=kernels) / 7

    compiled = torch.compile(step, fullgraph=True)
    results = [
        (loss, *torch.autograd.grad(loss, (x, weight))) for loss in (f(x, weight, targets) for f in (compiled, step))
    ]
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-3, atol=1e-5)
