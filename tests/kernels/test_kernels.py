"""Every Triton kernel against float64, and beside its plain twin.

Without a GPU the kernels run in Triton's interpreter, which is right for float32 and float16 (not for bfloat16). With
one they run on it, in bfloat16 too.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels
from kernels import reference

pytest.importorskip("triton", reason="there is no Triton for this platform")

from kernels import apply_symmetric as apply_module
from kernels import gram as gram_module
from kernels.triton_common import ARCHITECTURES, FLOAT32, LARGE, SMALL, Tile, architecture
from optim.aurora import aurora_polar
from optim.polar import polar
from tests.conftest import ROOT, Trainer

apply_symmetric, gram = apply_module.apply_symmetric, gram_module.gram
normalize_rows = importlib.import_module("kernels.normalize_rows").normalize_rows
scale_rows = importlib.import_module("kernels.scale_rows").scale_rows
symmetric_product = importlib.import_module("kernels.symmetric_product").symmetric_product

pytestmark = pytest.mark.usefixtures("poisoned_memory")
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if HAS_GPU else [torch.float32, torch.float16]
SHAPES = [(1, 1), (1, 7), (7, 1), (16, 32), (33, 17), (18, 50)]
TILE = Tile(16, 16, 16, 4, 2)  # several tiles and a ragged last one for most shapes
with_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, dtype)


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def symmetric(n: int, dtype: torch.dtype, batch: int = 2) -> Tensor:
    A = randn(batch, n, n, seed=5).double()
    return ((A + A.mT) / (2 * n**0.5)).to(dtype)


def layouts(m: int, n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """[2, m, n] with rows, columns, or neither next to each other in memory; a slice; one matrix twice."""
    return {
        "contiguous": randn(2, m, n, dtype=dtype),
        "transposed": randn(2, n, m, dtype=dtype).mT,
        "strided": randn(4, 2 * m, 3 * n, dtype=dtype)[::2, ::2, 1::3],
        "slice": randn(3, m + 2, n + 5, dtype=dtype)[1:, 1:-1, 3:-2],
        "expanded": randn(1, m, n, dtype=dtype).expand(2, m, n),
    }


LAYOUTS = list(layouts(2, 2, torch.float32))
# Every shape in the plainest layout, every other layout in one ragged shape: the interpreter takes its time.
CASES = [(shape, "contiguous") for shape in SHAPES] + [((18, 33), layout) for layout in LAYOUTS[1:]]
with_case = pytest.mark.parametrize(
    ("shape", "layout"), CASES, ids=lambda part: part if isinstance(part, str) else "x".join(map(str, part))
)


def error(result: Tensor, exact: Tensor) -> float:
    assert result.shape == exact.shape
    return float((result.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def check(result: Tensor, twin: Tensor, exact: Tensor, inside: torch.dtype = torch.float16) -> None:
    """float32 within 1e-5 of float64; a half format no further from it than the plain twin, or than its rounding. The
    twin may have been in the format `inside` before it was float32."""
    assert twin.dtype == result.dtype
    eps = torch.finfo(result.dtype).eps
    assert error(twin, exact) < (torch.finfo(inside).eps if result.dtype == torch.float32 else 2 * eps)
    assert error(result, exact) <= (1e-5 if result.dtype == torch.float32 else max(1.1 * error(twin, exact), eps / 2))


# Each kernel


@with_dtype
@with_case
@pytest.mark.parametrize("is_scaled", [False, True], ids=["plain", "scaled"])
def test_gram(shape: tuple[int, int], layout: str, dtype: torch.dtype, is_scaled: bool) -> None:
    X = layouts(*shape, dtype)[layout]
    scale = 1 / (1 + X.float().square().sum(dim=(-2, -1))) if is_scaled else None
    result = gram(X, scale, tile=TILE)
    exact = X.double().mT @ X.double() * (1 if scale is None else scale.double()[:, None, None])
    check(result, reference.gram(X, scale), exact)
    wide = gram(X, scale, torch.float32, TILE)
    assert wide.dtype == torch.float32
    assert error(wide, exact) <= max(1.1 * error(result, exact), torch.finfo(dtype).eps / 4)  # rounded loads alone
    assert torch.equal(result, result.mT)


def test_scales_may_be_views() -> None:
    X, of_rows, scale = randn(2, 18, 33), rand(18, 2).mT, rand(4)[::2]
    S = symmetric(33, torch.float32)
    assert torch.equal(gram(X, scale), gram(X, scale.clone()))
    result, expected = (apply_symmetric(X, S, 1.0, s)[0] for s in (scale, scale.clone()))
    assert torch.equal(result, expected)
    result, expected = (scale_rows(X, d, torch.float32) for d in (of_rows, of_rows.contiguous()))
    assert torch.equal(result, expected)
    transposed = symmetric(33, torch.float32).mT
    assert torch.equal(symmetric_product(transposed, transposed, 1.0, 2.0), symmetric_product(S, S, 1.0, 2.0))


@with_dtype
@pytest.mark.parametrize("n", [1, 5, 16, 50])
@pytest.mark.parametrize(
    ("alpha", "beta", "gamma"), [(0.7, 0.0, 0.0), (0.7, -2.5, 0.0), (1.0, -2.5, 0.0), (0.7, 0.0, 1.5), (1.0, -2.5, 1.5)]
)
def test_symmetric_product(n: int, dtype: torch.dtype, alpha: float, beta: float, gamma: float) -> None:
    A = symmetric(n, dtype)
    B = (0.5 * torch.eye(n, device=DEVICE) - 0.3 * A.double() + A.double() @ A.double()).to(dtype)  # commutes with A
    result = symmetric_product(A, B, alpha, beta, gamma, tile=TILE)
    exact = alpha * A.double() @ B.double() + beta * A.double() + gamma * B.double()
    exact = exact.tril() + exact.tril(-1).mT  # B is rounded, so A B is symmetric but for that
    check(result, reference.symmetric_product(A, B, alpha, beta, gamma), exact)
    assert torch.equal(result, result.mT)  # on the diagonal tiles too, where an asymmetry would grow step by step
    other = symmetric(n, torch.float32)
    result, twin = (f(A, B, alpha, beta, gamma, other) for f in (symmetric_product, reference.symmetric_product))
    check(result, twin, exact + beta * (other.double() - A.double()))
    assert torch.equal(symmetric_product(A, A, alpha, beta), symmetric_product(A, A, alpha, beta).mT)


@with_dtype
@with_case
@pytest.mark.parametrize("outputs", ["matrix", "row_square", "both"])
def test_apply_symmetric(shape: tuple[int, int], layout: str, dtype: torch.dtype, outputs: str) -> None:
    X = layouts(*shape, dtype)[layout]
    S = symmetric(shape[1], dtype)
    for alpha, scale, to in [(0.0, None, torch.float32), (1.5, None, None), (1.5, rand(2), torch.bfloat16)]:
        result, row_square = apply_symmetric(X, S, alpha, scale, to, outputs, tile=TILE)
        twin, twin_square = reference.apply_symmetric(X, S, alpha, scale, to, outputs)
        exact = alpha * X.double() + X.double() @ S.double()
        exact = exact if scale is None else exact * scale.double()[:, None, None]
        if outputs == "row_square":
            assert result.numel() == 0
        else:
            assert result.dtype == (to or dtype)
            check(result, twin, exact, torch.float16 if dtype == torch.float32 else dtype)
        if outputs == "matrix":
            assert row_square.numel() == 0
        else:
            assert error(row_square, exact.square().sum(dim=-1)) < 1e-5  # of the sums, not of the rounded result
            assert error(twin_square, exact.square().sum(dim=-1)) < (1e-5 if dtype == torch.float32 else 1e-2)


@with_dtype
@with_case
def test_normalize_rows(shape: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    X = layouts(*shape, dtype)[layout]
    exact = X.double().norm(dim=-1)
    unit, norm = normalize_rows(X, torch.float16, tile=TILE)
    for result in (norm, reference.normalize_rows(X, torch.float16)[1]):
        assert error(result, exact) < 1e-6
    check(
        normalize_rows(X, torch.float32)[0],
        reference.normalize_rows(X, torch.float32)[0],
        X.double() / exact.unsqueeze(-1),
    )
    check(unit, reference.normalize_rows(X, torch.float16)[0], X.double() / exact.unsqueeze(-1))


@with_dtype
@with_case
def test_scale_rows(shape: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    X, scale = layouts(*shape, dtype)[layout], 100 * rand(2, shape[0])
    exact = X.double() * scale.double().unsqueeze(-1)
    for to in (dtype, torch.float16):
        check(scale_rows(X, scale, to, TILE), reference.scale_rows(X, scale, to), exact)
    assert torch.equal(scale_rows(X, scale, dtype), scale_rows(X, scale, dtype, TILE))


@pytest.mark.parametrize("module", ["triton", "reference"])
@pytest.mark.parametrize("columns", [3, 40], ids=["one tile", "several tiles"])
def test_rows_of_any_magnitude_are_normalized(module: str, columns: int) -> None:
    magnitudes = torch.tensor([0, 1e-44, 1e-38, 1e-30, 1, 1e30, 1e37], device=DEVICE)
    X = randn(1, 7, columns).clamp(0.1, 3) * magnitudes[:, None]
    unit, norm = (
        normalize_rows(X, torch.float32, TILE) if module == "triton" else reference.normalize_rows(X, torch.float32)
    )
    exact = X.double().norm(dim=-1)
    torch.testing.assert_close(norm.double(), exact, rtol=1e-5, atol=1e-44)
    torch.testing.assert_close(unit[:, 1:].double(), (X.double() / exact.unsqueeze(-1))[:, 1:], rtol=1e-5, atol=1e-6)
    assert (unit[:, 0] == 0).all()


def test_a_row_growing_along_the_way_neither_overflows_nor_forgets() -> None:
    """The running maximum rises from 1e-20 to 1e20 and falls again, across tiles."""
    X = torch.cat([torch.full((1, 1, 16), value) for value in (1e-20, 1.0, 1e20, 1e-20)], dim=-1).to(DEVICE)
    for rows in (X, X.flip(-1)):
        torch.testing.assert_close(normalize_rows(rows, torch.float32, TILE)[1].item(), 4e20)


@pytest.mark.parametrize(
    "tile", sorted({*LARGE.values(), *SMALL.values(), *FLOAT32.values()}), ids=lambda t: f"{t.rows}x{t.depth}"
)
def test_shipped_tiles(tile: Tile) -> None:
    X, S = randn(1, 150, 140), symmetric(140, torch.float32, batch=1)
    Y, row_square = apply_symmetric(X, S, 2.0, outputs="both", tile=tile)
    exact = 2 * X.double() + X.double() @ S.double()
    assert error(gram(X, tile=tile), X.double().mT @ X.double()) < 1e-5
    assert error(symmetric_product(S, S, 1.0, 0.5, tile=tile), S.double() @ S.double() + S.double() / 2) < 1e-5
    assert error(Y, exact) < 1e-5
    assert error(row_square, exact.square().sum(dim=-1)) < 1e-5


def test_an_empty_batch_gives_an_empty_batch() -> None:
    X = torch.empty(0, 6, 4, device=DEVICE)
    assert gram(X).shape == (0, 4, 4)
    assert normalize_rows(X, torch.float32)[1].shape == (0, 6)
    assert scale_rows(X, torch.empty(0, 6, device=DEVICE), torch.float16).shape == (0, 6, 4)
    assert apply_symmetric(X, gram(X), 1.0)[0].shape == (0, 6, 4)


# What they promise around the numbers


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda X, S: gram(X[0]), ["gram: X", "(6, 4)", "[B, m, n]"]),
        (lambda X, S: gram(X.double()), ["gram: X", "float64", "float16, bfloat16 or float32"]),
        (lambda X, S: gram(X[:, :0]), ["gram: X", "(2, 0, 4)", ">= 1"]),
        (lambda X, S: apply_symmetric(X, S, 1.0, torch.ones(2, 6, device=DEVICE)), ["scale", "(2, 6)", "(2,)"]),
        (lambda X, S: gram(X, dtype=torch.float16), ["dtype = torch.float16", "torch.float32"]),
        (lambda X, S: symmetric_product(S, S, unrounded_A=S[0]), ["unrounded_A", "(4, 4)", "(2, 4, 4)"]),
        (lambda X, S: gram(X, scale=torch.ones(2, device=DEVICE).double()), ["scale", "float64", "float32"]),
        (lambda X, S: symmetric_product(X, X), ["symmetric_product", "(2, 6, 4)", "[B, n, n]"]),
        (lambda X, S: symmetric_product(S, S[:1]), ["symmetric_product", "(1, 4, 4)"]),
        (lambda X, S: symmetric_product(S, S.half()), ["symmetric_product: B", "float16", "equal"]),
        (lambda X, S: apply_symmetric(X.mT, S), ["S has shape (2, 4, 4)", "(2, 4, 6)", "(2, 6, 6)"]),
        (lambda X, S: apply_symmetric(X, S, outputs="all"), ["outputs = 'all'", "row_square"]),
        (lambda X, S: normalize_rows(X, torch.float64), ["dtype = torch.float64", "float16"]),
        (lambda X, S: scale_rows(X, torch.ones(2, 4, device=DEVICE), X.dtype), ["scale_rows", "(2, 4)", "(2, 6)"]),
        (lambda X, S: scale_rows(X, X[:, :, 0], torch.int64), ["dtype = torch.int64", "float16"]),
    ],
    ids=lambda value: None if callable(value) else value[0],
)
def test_refusals_name_the_argument_and_the_rule(call: Callable[[Tensor, Tensor], object], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        call(randn(2, 6, 4), symmetric(4, torch.float32))
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.skipif(HAS_GPU, reason="a GPU is here")
def test_without_a_gpu_triton_is_refused_and_auto_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.backend("auto", DEVICE).name == "torch"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"'triton' needs a CUDA GPU.*on cpu.*'torch'"):
        kernels.backend("triton", DEVICE)
    with pytest.raises(ValueError, match=r"gram: the matrices are on cpu.*CUDA GPU"):
        gram(randn(1, 3, 3))
    with pytest.raises(ValueError, match=r"kernels = 'cuda' is unknown; choose one of auto, triton, torch"):
        kernels.backend("cuda", DEVICE)


def test_a_device_takes_the_newest_tiles_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in [
        ((8, 0), 80),
        ((8, 6), 80),
        ((8, 9), 89),
        ((9, 0), 90),
        ((10, 3), 100),
        ((12, 0), 100),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert architecture(torch.device("cuda")) == expected
    assert set(ARCHITECTURES) == {80, 89, 90, 100}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("rule", [polar, aurora_polar], ids=["polar", "aurora_polar"])
def test_a_compiled_graph_holds_the_whole_polar_factor(rule: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """torch.compile without graph breaks, the kernels' shapes and strides known beforehand; equal results."""
    torch._dynamo.reset()

    def update(X: Tensor) -> Tensor:
        return rule(X, dtype=dtype, kernels="triton")

    compiled = torch.compile(update, fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager")
    for X in (randn(2, 20, 9), randn(2, 9, 20)):
        result, expected = compiled(X), update(X)
        assert result.stride() == expected.stride()
        assert (result - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="trains through the interpreter")
def test_the_trainer_runs_on_either_kernels_and_says_which(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optim.matrix_optimizer.fast_half_dtype", lambda device_type: torch.float32)
    losses = {}
    for name in ("torch", "triton"):
        result = trainer(f"--kernels={name}", "--train_steps=2", "--val_every=2", "--num_layers=1")
        assert result.returncode == 0, result.stderr
        assert f"{name} kernels" in result.stdout
        losses[name] = [
            float(line.split("val_loss:")[1].split()[0]) for line in result.stdout.splitlines() if "val_loss:" in line
        ]
    assert losses["torch"] == pytest.approx(losses["triton"], abs=2e-4)
    assert losses["torch"][0] - losses["torch"][-1] > 0.05


RELOAD = """
import importlib
import torch
import kernels.gram, kernels.triton_common
X = torch.randn(1, 20, 30, device=DEVICE)
first, operator = kernels.gram.gram(X), kernels.triton_common.operator
for module in (kernels.triton_common, kernels.gram, kernels.gram):
    importlib.reload(module)
    assert torch.equal(first, kernels.gram.gram(X))
doubled = lambda fake, mutates=(): lambda function: operator(fake, mutates)(twice(function))
def twice(function):
    import functools
    return functools.wraps(function)(lambda *arguments: 2 * function(*arguments))
kernels.triton_common.operator = doubled
importlib.reload(kernels.gram)
assert torch.equal(2 * first, kernels.gram.gram(X))  # what is changed, is changed
def gram(X: torch.Tensor) -> torch.Tensor:
    return X
try:
    operator(fake=gram)(gram)
except ValueError as error:
    assert "__main__ and kernels.gram both have an operator gram" in str(error)
else:
    raise AssertionError("another module's operator was replaced")
assert torch.equal(2 * first, kernels.gram.gram(X))
"""


def test_a_module_can_be_loaded_again() -> None:
    """As %autoreload of a notebook does: an operator takes its old one's place. In a process of its own, as it would
    for other tests, too."""
    code = RELOAD.replace("DEVICE", repr(str(DEVICE)))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_the_mark_of_a_constant_is_the_one_that_torch_sets() -> None:
    """kernels.constant sets it by itself, as torch's decorator imports the compiler; it is a private name."""
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked) == vars(kernels.constant(lambda: None)) != {}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is packaged for Linux")
def test_each_kernel_compiles_for_every_architecture_without_spilling(
    tmp_path: Path,
) -> None:
    """As training launches it, in a process without the interpreter and from an empty cache; CI compiles the others."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_resources", "--usual"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if "_kernel" in line]
    for sm in ("80", "89", "90", "100"):
        compiled = {row[6].removesuffix("_kernel") for row in rows if row[5] == sm}
        assert compiled == {
            "momentum", "momentum_rows", "not_finite", "normalize_rows", "scale_rows", "gram",
            "symmetric_product", "apply_symmetric", "apply_update", "cross_entropy",
        }  # fmt: skip
        assert all(0 < int(row[0]) <= 255 and int(row[1]) == 0 for row in rows)


@pytest.mark.skipif(HAS_GPU, reason="the interpreter is off")
def test_resources_are_not_asked_of_the_interpreter() -> None:
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        importlib.import_module("benchmarks.kernel_resources").main([])
