"""The fused head and loss against F.cross_entropy on dense float64 logits, in plain torch and in Triton.

Without a GPU the Triton kernel runs in its interpreter, in float32 and float16; with one, in bfloat16 too. Memory is
looked at in tests/benchmarks/test_loss_head.py.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss_head import SOFTCAP, plain
from kernels import reference
from kernels.linear_cross_entropy import default_chunk_tokens, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned_memory")
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
HALVES = [torch.float16, torch.bfloat16] if HAS_GPU else [torch.float16]  # the interpreter's bfloat16 is wrong
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="there is no Triton for this platform")
with_kernels = pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=needs_triton)])


@dataclass
class Case:
    """x [N, D], weight [V, D], which of the targets are ignored, and the operator's options."""

    N: int = 13
    V: int = 37
    D: int = 5
    size: float = 1.0  # of x: 1 gives logits of about 20, past the cap's straight part
    ignored: str = "some"
    strided: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        random = functools.partial(torch.randn, generator=torch.Generator().manual_seed(self.N + self.V))
        x = self.size * random(2 * self.N, 3 * self.D)
        x = x[::2, 1::3] if self.strided else x[: self.N, : self.D].contiguous()
        weight = (10 * random(self.V, self.D)).bfloat16()  # values that every dtype holds
        targets = torch.arange(self.N) * 7 % self.options.get("vocab_size", self.V)
        ignore_index = self.options.get("ignore_index", -1)
        targets[{"some": slice(2, None, 3), "all": slice(None), "none": slice(0)}[self.ignored]] = ignore_index
        leaves = x.to(DEVICE, dtype), weight.to(DEVICE, weight_dtype or dtype)
        return *(leaf.requires_grad_() for leaf in leaves), targets.to(DEVICE)  # type: ignore[return-value]


CASES = {
    "some ignored": Case(),
    "none ignored": Case(ignored="none"),
    "all ignored": Case(ignored="all"),
    "one row": Case(N=1),
    "one column": Case(V=1),
    "one of each": Case(N=1, V=1, D=1),
    "no rows": Case(N=0),
    "padded vocabulary": Case(options=dict(vocab_size=31)),
    "vocabulary of one": Case(options=dict(vocab_size=1)),
    "z-loss": Case(options=dict(z_loss=0.3)),
    "z-loss, padded, ragged chunks": Case(options=dict(z_loss=0.3, vocab_size=31, chunk_tokens=5)),
    "chunks of one": Case(options=dict(chunk_tokens=1)),
    "chunk past the end": Case(options=dict(chunk_tokens=99)),
    "strided x": Case(strided=True, options=dict(chunk_tokens=4)),
    "ignored index inside": Case(options=dict(ignore_index=3)),
    "far beyond the cap": Case(size=300),
    "small logits": Case(size=1e-2),
    "another cap": Case(options=dict(softcap=40.0)),
    "more than a block": Case(N=3, V=5001, options=dict(z_loss=1e-2, vocab_size=4999)),
}
with_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def dense(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float = SOFTCAP, vocab_size: int | None = None,
    z_loss: float = 0.0, ignore_index: int = -1, chunk_tokens: object = None,
) -> Tensor:  # fmt: skip
    """What it all means, in x's dtype, with every logit in memory."""
    z = softcap * torch.tanh(x @ weight[:vocab_size].mT / softcap)
    lse = z.logsumexp(dim=1)[targets != ignore_index]
    return F.cross_entropy(z, targets, ignore_index=ignore_index, reduction="sum") + z_loss * lse.square().sum()


def with_gradients(loss: Callable[..., Tensor], x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> list[Tensor]:
    value = loss(x, weight, *rest, **options)
    return [value.detach(), *torch.autograd.grad(value, (x, weight))]


def exact(case: Case, x: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Loss and both gradients in float64 of the values given."""
    leaves = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    return with_gradients(dense, *leaves, targets, **case.options)


def error(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape
    return float((result.double() - expected).norm() / expected.norm().clamp_min(1))


@with_kernels
@with_case
def test_loss_and_gradients_are_the_dense_ones(case: Case, kernels: str) -> None:
    """To 1e-5, or to what rounding a logit, by eps |x| |w|, makes of the slope near the cap, exp(-2 |u| / softcap)."""
    x, weight, targets = case.inputs(torch.float32)
    results = with_gradients(linear_cross_entropy, x, weight, targets, kernels=kernels, **case.options)
    assert all(result.dtype == torch.float32 for result in results)
    longest = [float(rows.detach().norm(dim=1).max()) if len(rows) else 0.0 for rows in (x, weight)]
    rounding = torch.finfo(torch.float32).eps * longest[0] * longest[1]
    bound = max(1e-5, 2 / case.options.get("softcap", SOFTCAP) * rounding)
    assert max(map(error, results, exact(case, x, weight, targets))) < bound
    assert (results[2][case.options.get("vocab_size", case.V) :] == 0).all()
    assert (results[1][targets == case.options.get("ignore_index", -1)] == 0).all()


@with_case
def test_float64_is_float64_throughout(case: Case) -> None:
    x, weight, targets = case.inputs(torch.float64)
    results = with_gradients(linear_cross_entropy, x, weight, targets, **case.options)
    assert all(r.dtype == torch.float64 for r in results)
    assert max(map(error, results, exact(case, x, weight, targets))) < 1e-11


def test_gradcheck_finds_both_gradients_and_a_second_derivative_is_refused() -> None:
    x, weight, targets = Case(N=5, V=7, D=3, size=0.2).inputs(torch.float64)
    loss = functools.partial(linear_cross_entropy, targets=targets, vocab_size=6, z_loss=0.1, chunk_tokens=2)
    assert torch.autograd.gradcheck(lambda x, weight: loss(x, weight).square(), (x, weight))
    (dx,) = torch.autograd.grad(loss(x, weight), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@with_kernels
@pytest.mark.parametrize("chunk_tokens", [None, 48], ids=["one chunk", "ragged chunks"])
def test_half_precision_is_no_further_from_float64_than_the_plain_path(
    kernels: str, dtype: torch.dtype, chunk_tokens: int | None
) -> None:
    if kernels == "triton" and dtype not in HALVES:
        pytest.skip("the interpreter's bfloat16 is wrong")
    case = Case(N=128, V=250, D=32, size=0.2)
    x, weight, targets = case.inputs(dtype, torch.float32)
    expected = exact(case, x, weight, targets)
    fused = with_gradients(linear_cross_entropy, x, weight, targets, kernels=kernels, chunk_tokens=chunk_tokens)
    assert [result.dtype for result in fused] == [torch.float32, dtype, torch.float32]
    for result, rival, e in zip(fused, with_gradients(plain, x, weight, targets), expected, strict=True):
        assert error(result, e) <= 1.02 * error(rival, e) + 1e-7
        assert error(result, e) < 2 * torch.finfo(dtype).eps


def test_weights_in_half_precision_get_their_gradient_from_float32_sums() -> None:
    """Summed over 400 chunks in bfloat16, one row's gradients would stop growing on the way."""
    x = torch.ones(400, 1, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    linear_cross_entropy(x, weight, torch.zeros(400, dtype=torch.long, device=DEVICE), chunk_tokens=1).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[-200], [200]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_gradients_are_multiplied_by_what_arrives(dtype: torch.dtype) -> None:
    """By 1/3000, which half precision would round by more than the gradients' own rounding; and twice over."""
    x, weight, targets = Case().inputs(dtype, torch.float32)
    once = with_gradients(linear_cross_entropy, x, weight, targets)
    loss = linear_cross_entropy(x, weight, targets)
    for _ in range(2):
        scaled = torch.autograd.grad(loss, (x, weight), torch.tensor(1 / 3000, device=DEVICE), retain_graph=True)
        torch.testing.assert_close(scaled[0], (once[1].double() / 3000).to(dtype), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(scaled[1], once[2] / 3000)


@pytest.mark.parametrize("x_gradient", [False, True], ids=["", "x"])
@pytest.mark.parametrize("weight_gradient", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("grad_mode", [False, True], ids=["no_grad", "grad"])
def test_only_what_autograd_asks_for_is_computed(
    x_gradient: bool, weight_gradient: bool, grad_mode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the matrix products of two chunks and by what the logits' kernel is asked to do."""
    case = Case(options=dict(chunk_tokens=7))
    x, weight, targets = case.inputs(torch.float32)
    _, dx, dweight = exact(case, x, weight, targets)
    x.requires_grad_(x_gradient)
    weight.requires_grad_(weight_gradient)
    asked: list[bool] = []
    memory = set()
    genuine = reference.cross_entropy

    def spy(*arguments: Any) -> Tensor:
        asked.append(arguments[-1])
        memory.add((arguments[0].data_ptr(), arguments[0].untyped_storage().nbytes()))
        return genuine(*arguments)

    monkeypatch.setattr(reference, "cross_entropy", spy)

    def run() -> None:
        with torch.set_grad_enabled(grad_mode):
            loss = linear_cross_entropy(x, weight, targets, kernels="torch", **case.options)
        assert loss.requires_grad == (grad_mode and (x_gradient or weight_gradient))
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]

    with torch.profiler.profile() as profile:
        run()
    called = [event.name for event in profile.events()]
    assert called.count("aten::mm") == 2 * (1 + (grad_mode and x_gradient))
    assert called.count("aten::addmm_") == 2 * (grad_mode and weight_gradient)
    assert asked == [grad_mode and (x_gradient or weight_gradient)] * 2
    assert [size for _, size in memory] == [7 * 37 * 4]  # the same for every chunk
    for leaf, wanted, expected in ((x, x_gradient, dx), (weight, weight_gradient, dweight)):
        assert error(leaf.grad, expected) < 1e-5 if grad_mode and wanted else leaf.grad is None


@with_kernels
def test_a_compiled_graph_holds_it_whole(kernels: str) -> None:
    """One node between others, without graph breaks; the same bits as eager, evaluation included."""
    torch._dynamo.reset()
    x, weight, targets = Case(options=dict(vocab_size=31)).inputs(torch.float32)

    def step(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(x.sin(), weight, targets, chunk_tokens=5, vocab_size=31, kernels=kernels) / 7

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for result, expected in zip(*(with_gradients(f, x, weight, targets) for f in (compiled, step)), strict=True):
        assert torch.equal(result, expected)
    with torch.no_grad():
        assert torch.equal(compiled(x, weight, targets), step(x, weight, targets))


@with_kernels
def test_the_same_arguments_give_the_same_bits(kernels: str) -> None:
    x, weight, targets = Case(N=50, options=dict(chunk_tokens=7)).inputs(torch.float32)
    first, second = (with_gradients(linear_cross_entropy, x, weight, targets, kernels=kernels) for _ in range(2))
    assert all(map(torch.equal, first, second))


# The logits' kernel alone


def dense_rows(u: Tensor, targets: Tensor, z_loss: float = 0.0, ignore_index: int = -1) -> Tensor:
    z = SOFTCAP * torch.tanh(u / SOFTCAP)
    lse = z.logsumexp(dim=1) * (targets != ignore_index)
    return F.cross_entropy(z, targets, ignore_index=ignore_index, reduction="none") + z_loss * lse.square()


def rows(kernels: str, *arguments: Any, tile: tuple[int, ...] | None = None) -> Tensor:
    if kernels == "torch":
        return reference.cross_entropy(*arguments)
    module = importlib.import_module("kernels.cross_entropy")
    return module.cross_entropy(*arguments, tile=tile)


@with_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("tile", [None, (1, 16, 0, 4, 1)], ids=["own tile", "small tile"])
@pytest.mark.parametrize("gradient", [False, True], ids=["loss alone", "gradient"])
def test_rows_far_apart_are_overwritten_and_nothing_beside_them(
    kernels: str, dtype: torch.dtype, tile: tuple[int, ...] | None, gradient: bool
) -> None:
    memory = torch.full((9, 50), torch.nan, dtype=dtype, device=DEVICE)
    values = 20 * torch.randn(9, 41, generator=torch.Generator().manual_seed(0))
    logits = memory[:, 4:45].copy_(values)
    targets = torch.tensor([0, 39, 5, -7, 7, 38, 1, 2, 3], device=DEVICE).repeat_interleave(2)[::2]
    before = memory.clone()
    u = logits.double().requires_grad_()
    expected = dense_rows(u[:, :40], targets, 0.1, -7)
    (slope,) = torch.autograd.grad(expected.sum(), u)
    loss = rows(kernels, logits, targets, SOFTCAP, 40, 0.1, -7, gradient, tile=tile)
    assert error(loss, expected.detach()) < 1e-6
    assert memory[:, :4].isnan().all()
    assert memory[:, 45:].isnan().all()
    if gradient:
        assert error(logits, slope) < (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)
        assert (logits[3] == 0).all()
        assert (logits[:, 40] == 0).all()
    else:
        assert torch.equal(memory.nan_to_num(), before.nan_to_num())


@with_kernels
@pytest.mark.parametrize("vocab_size", [1, 16, 17, 33, 47, 48, 64])
def test_blocks_within_across_and_beyond_the_vocabulary(kernels: str, vocab_size: int) -> None:
    """Of 16 columns, four in a row of 64; targets at both ends of blocks. Numbers in the padding count for nothing."""
    u = 20 * torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets = torch.tensor([0, 15, 16, 17, 31, 32, 46, 47, 63], device=DEVICE).clamp_max(vocab_size - 1)
    exact = u[:, :vocab_size].double().requires_grad_()
    expected = dense_rows(exact, targets, 0.1)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    u[:, vocab_size:] = torch.nan
    loss = rows(kernels, u, targets, SOFTCAP, vocab_size, 0.1, -1, True, tile=(1, 16, 0, 4, 1))
    assert error(loss, expected.detach()) < 1e-6
    assert error(u[:, :vocab_size], slope) < 1e-5
    assert (u[:, vocab_size:] == 0).all()


@with_kernels
@pytest.mark.parametrize("place", [0, 20, 39])
def test_a_logit_that_is_no_number_shows_in_its_row(kernels: str, place: int) -> None:
    u = torch.randn(3, 48, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    u[1, place] = torch.nan
    loss = rows(kernels, u, torch.tensor([1, 2, 3], device=DEVICE), SOFTCAP, 40, 0.0, -1, True, tile=(1, 16, 0, 4, 1))
    assert loss.isnan().tolist() == [False, True, False]
    assert u[1, :40].isnan().all()
    assert u[::2].isfinite().all()


@with_kernels
@pytest.mark.parametrize("u", [1e-4, 60.0, 1e4, 3e38])
def test_both_ends_of_tanh(kernels: str, u: float) -> None:
    """Saturated logits are +-15 and get gradient 0 (or 2^-124), tiny ones are themselves. Between them torch's slope is
    1 - tanh^2, off by the roundings of 1 and of a tanh that may miss its last two bits."""
    logits = torch.tensor([[u, -u]], device=DEVICE)
    exact = logits.double().requires_grad_()
    target = torch.tensor([1], device=DEVICE)
    expected = dense_rows(exact, target)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    loss = rows(kernels, logits, target, SOFTCAP, 2, 0.0, -1, True)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    atol = 4 * torch.finfo(torch.float32).eps if kernels == "torch" else 1e-12
    torch.testing.assert_close(logits.double(), slope, rtol=1e-4, atol=atol)
    assert u < 1e4 or (logits.abs() <= 2**-124).all()


@with_kernels
@pytest.mark.parametrize("target", [40, 41, -2, 2**40, -(2**40)])
def test_a_wrong_target_reads_nothing_and_shows(kernels: str, target: int) -> None:
    logits = torch.randn(3, 41, device=DEVICE)
    targets = torch.tensor([1, target, 39], device=DEVICE)
    loss = rows(kernels, logits, targets, SOFTCAP, 40, 0.0, -1, True)
    assert loss.isnan().tolist() == [False, True, False]
    assert logits[1, :40].isnan().all()
    assert logits[[0, 2]].isfinite().all()
    assert (logits[:, 40] == 0).all()


# What it promises around the numbers


@pytest.mark.skipif(HAS_GPU, reason="a GPU gives NaN, see tests/kernels/test_kernels_gpu.py")
@with_kernels
@pytest.mark.parametrize("target", [37, -2])
def test_a_wrong_target_is_an_error_on_the_cpu_as_in_torch(kernels: str, target: int) -> None:
    x, weight, targets = Case().inputs(torch.float32)
    targets[4] = target
    with pytest.raises(IndexError):
        dense(x, weight, targets)
    with pytest.raises(IndexError, match=rf"target {target} must be 0 to 36, or ignore_index = -1"):
        linear_cross_entropy(x, weight, targets, kernels=kernels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(x=torch.ones(2, 3, 5)), "x is torch.float32 (2, 3, 5)"),
        (dict(x=torch.ones(13, 5).long()), "must be floating point"),
        (dict(weight=torch.ones(37, 6)), "(37, 6); beside x it must be float32 or torch.float32 [V, 5]"),
        (dict(weight=torch.ones(37, 5).half()), "weight is torch.float16"),
        (dict(targets=torch.zeros(12).long()), "(12,); they must be int64 [13]"),
        (dict(targets=torch.zeros(13)), "targets are torch.float32"),
        (dict(softcap=0.0), "softcap = 0.0 must be above 0 and at most 40"),
        (dict(softcap=41.0), "softcap = 41.0"),
        (dict(vocab_size=38), "vocab_size = 38 must be 1 to weight's 37 rows"),
        (dict(vocab_size=0), "vocab_size = 0"),
        (dict(chunk_tokens=0), "chunk_tokens = 0 must be at least 1"),
        (dict(kernels="cuda"), "kernels = 'cuda' is unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_refusals_name_the_argument_and_the_rule(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = dict(zip(("x", "weight", "targets"), Case().inputs(torch.float32), strict=True))
    with pytest.raises(ValueError) as refusal:
        linear_cross_entropy(**arguments | change)
    assert words in str(refusal.value)


def test_default_chunks() -> None:
    """64 MiB of logits on a CPU, 1 GiB on a GPU, a power of two of rows and never none."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert default_chunk_tokens(50304, torch.bfloat16, cpu) == 512
    assert default_chunk_tokens(50304, torch.bfloat16, gpu) == 8192
    assert default_chunk_tokens(320, torch.float32, cpu) == 32768
    assert default_chunk_tokens(10**9, torch.float32, cpu) == 1
