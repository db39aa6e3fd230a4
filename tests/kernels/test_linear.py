"""Products in 8 bits: the formats, the three products of a training step, and where the model uses them.

On the CPU torch computes them in float32; with a GPU of compute capability 8.9 or later these tests run there.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.linear import E4M3, E5M2, check_float8, float8_linear, linear, quantize
from kernels.linear_cross_entropy import linear_cross_entropy
from model import GPT, ModelConfig

HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).detach().norm() / b.double().detach().norm())


def dequantized(x: Tensor, dtype: torch.dtype) -> Tensor:
    values, scale = quantize(x.detach(), dtype)
    return values.double() * scale.double()


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize(
    ("dtype", "half_step", "smallest"), [(E4M3, 2**-4, 2**-9 / 448), (E5M2, 2**-3, 2**-16 / 57344)]
)
def test_quantized_numbers_are_within_half_a_step(
    dtype: torch.dtype, half_step: float, smallest: float, size: float
) -> None:
    """Of themselves where they are normal, of the smallest number below; the largest is in the range's upper half."""
    x = size * torch.cat([randn(1000), 10 ** (-6 * randn(1000).abs()), torch.tensor([7.0], device=DEVICE)])
    values, scale = quantize(x, dtype)
    largest = torch.finfo(dtype).max
    assert largest / 2 < values.abs().float().max() <= largest
    assert scale.shape == ()
    assert scale.dtype == torch.float32
    off = (dequantized(x, dtype) - x.double()).abs()
    bound = (half_step * x.double().abs()).clamp_min(smallest * 7 * size)
    assert (off <= bound).all()
    assert (off > 0.4 * half_step * x.abs()).any()  # that is, the format has no more bits than it says


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_three_products_are_those_of_the_quantized_operands(dtype: torch.dtype) -> None:
    x, weight, gradient = randn(2, 32, 64, dtype=dtype), randn(2, 48, 64, seed=1), randn(2, 32, 96, seed=2, dtype=dtype)
    x.requires_grad_(), weight.requires_grad_()
    y = float8_linear(x, weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), gradient)
    assert (y.dtype, dx.dtype, dweight.dtype) == (dtype, dtype, torch.float32)
    x8, W8 = dequantized(x, E4M3).flatten(0, 1), dequantized(weight, E4M3).flatten(0, 1)
    g8 = dequantized(gradient, E5M2).flatten(0, 1)
    rounding = 1e-5 if dtype == torch.float32 else 4e-3
    tolerance = 2e-3 if HAS_GPU else rounding  # Hopper's fast sums
    assert error(y.flatten(0, 1), x8 @ W8.T) < max(tolerance, rounding)
    assert error(dx.flatten(0, 1), g8 @ W8) < rounding + (1e-4 if HAS_GPU else 0)
    assert error(dweight.flatten(0, 1), g8.T @ x8) < (1e-4 if HAS_GPU else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_number_is_rounded_once(dtype: torch.dtype) -> None:
    """As float64 would round it: the scale is a power of two, and dividing by it exact in bfloat16, too."""
    x = randn(4096, dtype=dtype) * 3e-3
    values, scale = quantize(x, E4M3)
    assert torch.equal(values.float(), (x.cpu().double() / scale.cpu().double()).to(E4M3).float().to(DEVICE))
    mantissa, _ = torch.frexp(scale)
    assert float(mantissa) == 0.5


def test_products_are_as_a_gpu_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first operand row by row in memory, the second column by column, sizes in multiples of 16, one scale each;
    sums rounded in the forward product alone; and no product that nobody asked for."""
    genuine, seen = torch._scaled_mm, list[tuple[torch.dtype, torch.dtype, bool]]()

    def spy(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, *, use_fast_accum: bool, **rest: object) -> Tensor:
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert all(size % 16 == 0 for size in (*a.shape, *b.shape))
        assert (a_scale.shape, b_scale.shape) == ((), ())
        seen.append((a.dtype, b.dtype, use_fast_accum))
        return genuine(a, b, a_scale, b_scale, use_fast_accum=use_fast_accum, **rest)

    monkeypatch.setattr(torch, "_scaled_mm", spy)
    forward, backward = (E4M3, E4M3, True), (E5M2, E4M3, False)
    for needs_x, needs_weight in ((True, True), (True, False), (False, True)):
        seen.clear()
        x, weight = randn(32, 64).requires_grad_(needs_x), randn(48, 64, seed=1).requires_grad_(needs_weight)
        float8_linear(x, weight).sum().backward()
        assert (x.grad is not None, weight.grad is not None) == (needs_x, needs_weight)
        assert seen == [forward] + [backward] * (needs_x + needs_weight)
    for float8, products in ((("mlp",), 6), (("head",), 3), (("head", "mlp"), 9)):
        seen.clear()
        model, inputs, targets = model_and_batch(float8=float8, fused=("none",), num_layers=1)
        model(inputs, targets).backward()
        assert len(seen) == products


def test_how_far_it_is_from_the_plain_product() -> None:
    """Gaussian operands: each rounds by 2.6% (e4m3) or 5.2% (e5m2) of its size, root mean square."""
    x, weight, gradient = (randn(64, 64, seed=seed) for seed in range(3))
    x.requires_grad_(), weight.requires_grad_()
    results = [
        [y, *torch.autograd.grad(y, (x, weight), gradient)] for y in (f(x, weight) for f in (float8_linear, linear))
    ]
    errors = [error(a, b) for a, b in zip(*results, strict=True)]
    assert errors == pytest.approx([0.037, 0.058, 0.058], rel=0.1)


def test_one_row_no_row_and_zeros() -> None:
    weight = randn(16, 32)
    assert float8_linear(randn(32), weight).shape == (16,)
    assert (float8_linear(torch.zeros(16, 32, device=DEVICE), weight) == 0).all()
    assert float8_linear(randn(0, 32), weight).shape == (0, 16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(value: float) -> None:
    x, weight = randn(16, 32), randn(16, 32)
    x[3, 5] = value
    assert not float8_linear(x, weight).isfinite().any()


def test_torch_compile_takes_it_whole() -> None:
    x, weight = randn(32, 64), randn(48, 64)
    x.requires_grad_(), weight.requires_grad_()
    results = []
    for f in (float8_linear, torch.compile(float8_linear, fullgraph=True, backend="aot_eager")):
        y = f(x, weight)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, weight))])
    assert all(map(torch.equal, *results))


def test_a_second_derivative_is_refused() -> None:
    x = randn(16, 32).requires_grad_()
    (dx,) = torch.autograd.grad(float8_linear(x, randn(16, 32)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_the_loss_of_logits_in_8_bits() -> None:
    """Is the loss of the product of the quantized operands, however many rows go through at a time."""
    x, weight, targets = randn(32, 64), randn(80, 64, seed=1), torch.arange(32, device=DEVICE) * 7 % 80
    x8, W8 = dequantized(x, E4M3), dequantized(weight, E4M3)
    z = 15 * torch.tanh(x8 @ W8.T / 15)
    expected = torch.nn.functional.cross_entropy(z, targets, reduction="sum")
    losses = [linear_cross_entropy(x, weight, targets, float8=True, chunk_tokens=rows) for rows in (None, 16, 1)]
    assert losses == pytest.approx([float(expected)] * 3, rel=1e-3 if HAS_GPU else 1e-5)
    assert float(linear_cross_entropy(x, weight, targets)) != pytest.approx(float(expected), rel=1e-4)
    x.requires_grad_(), weight.requires_grad_()
    dx, dweight = torch.autograd.grad(linear_cross_entropy(x, weight, targets, float8=True), (x, weight))
    slope = torch.softmax(z, 1) - torch.nn.functional.one_hot(targets, 80)
    slope *= 1 - (z / 15).square()
    assert error(dx, slope @ weight.double()) < (1e-3 if HAS_GPU else 1e-5)  # of operands as they are
    assert error(dweight, slope.T @ x.double()) < (1e-3 if HAS_GPU else 1e-5)


def model_and_batch(num_layers: int = 2, **settings: Any) -> tuple[GPT, Tensor, Tensor]:
    torch.manual_seed(0)
    shape = dict(num_layers=num_layers, model_dim=32, num_heads=2, head_dim=16, seq_len=32)
    config = ModelConfig(**shape, init_down=0.02, init_head=0.02, **settings)  # type: ignore[arg-type]
    with DEVICE:
        model = GPT(config, torch.bfloat16 if HAS_GPU else torch.float32)
    tokens = torch.randint(257, (2, 33), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@pytest.mark.parametrize("fused", [("none",), ("head",), ("mlp",)])
@pytest.mark.parametrize("parts", [("head",), ("mlp",), ("head", "mlp")])
def test_a_model_uses_it_where_it_is_told(parts: tuple[str, ...], fused: tuple[str, ...]) -> None:
    """The loss is another and a close one, and so are the gradients."""
    results = []
    for float8 in (parts, ()):
        model, inputs, targets = model_and_batch(float8=float8, fused=fused)
        loss = model(inputs, targets) / targets.numel()
        results.append([loss, *torch.autograd.grad(loss, [model.head.weight, *model.blocks[1].mlp.parameters()])])
    errors = [error(a, b) for a, b in zip(*results, strict=True)]
    assert 0 < errors[0] < 1e-3
    assert 0 < max(errors) < 0.12


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(architecture="track3"), "needs architecture = 'gpt', not 'track3'"),
        (dict(model_dim=40), "model_dim = 40 must be a multiple of 16 with float8; 48 works"),
        (dict(mlp_hidden=88), "mlp_hidden = 88 must be a multiple of 16 with float8; 96 works"),
        (dict(seq_len=8), "seq_len = 8 must be a multiple of 16 with float8; 16 works"),
    ],
)
def test_what_cannot_be_in_8_bits_is_refused(settings: dict[str, object], words: str) -> None:
    shape = dict(num_layers=1, model_dim=32, num_heads=2, head_dim=16, seq_len=32)
    with pytest.raises(ValueError, match=words):
        ModelConfig(**shape | settings, float8=("mlp",))  # type: ignore[arg-type]


def test_validation_is_in_the_dtype_of_the_model() -> None:
    """One scale is for all tokens, those to come among them; so it is for training alone."""
    for fused in (("none",), ("head",)):
        model, inputs, targets = model_and_batch(float8=("head", "mlp"), fused=fused)
        plain, *_ = model_and_batch(fused=fused)
        with torch.no_grad():
            assert torch.equal(model(inputs, targets), plain(inputs, targets))
            assert torch.equal(model.logits(model.hidden(inputs)), plain.logits(plain.hidden(inputs)))
        assert not torch.equal(model(inputs, targets), plain(inputs, targets))


def test_float64_is_refused() -> None:
    x, weight, targets = randn(16, 32).double(), randn(16, 32), torch.zeros(16, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="must not be float64"):
        linear_cross_entropy(x, weight, targets, float8=True)


def test_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_float8((), torch.device("cuda"))
    check_float8(("head",), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"has 8\.0; leave float8 out"):
        check_float8(("head",), torch.device("cuda"))
    monkeypatch.setattr("kernels.linear.has_float8", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match="leave float8 out"):
        model_and_batch(float8=("head",))
