"""The kernels around the matrix products of an optimizer step, where they read from, and what a step moves."""

import importlib
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import NAMESPACE, reference

pytest.importorskip("triton", reason="there is no Triton for this platform")

from kernels import scattered as scattered_module
from kernels.normalize_rows import normalize_rows
from kernels.not_finite import mark_not_finite
from kernels.scattered import Scattered, address_table, scattered
from kernels.triton_common import Tile
from optim import Aurora, Muon, MuonPlus, MuonSquared, NorMuon, Soap, UNorMuon
from optim.aurora import aurora_polar
from optim.bank import Placeholder
from optim.matrix_optimizer import MatrixOptimizer
from optim.polar import polar
from optim.unit_rows import UnitRows, takes_unit_rows
from tests.kernels.test_kernels import DEVICE, DTYPES, SHAPES, error, layouts, rand, randn

momentum_module, update_module = (importlib.import_module(f"kernels.{name}") for name in ("momentum", "apply_update"))
momentum, momentum_rows, apply_update = (
    momentum_module.momentum,
    momentum_module.momentum_rows,
    update_module.apply_update,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
with_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
with_few_shapes = pytest.mark.parametrize("shape", [(1, 1), (7, 1), (33, 17), (18, 50)], ids=str)


def flags(*values: bool) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def one_by_one(X: Tensor, offset: int = 0) -> Scattered:
    """The matrices of X as tensors of their own, `offset` numbers after an aligned address."""
    matrices = [torch.cat([each.new_zeros(offset), each.flatten()])[offset:].view(each.shape) for each in X]
    result = scattered(matrices, X.device)
    assert result is not None
    return result


with_active = pytest.mark.parametrize(
    "active", [None, flags(True, False, True), flags(False).expand(3)], ids=["all", "two", "none"]
)
with_nesterov = pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])


def momentum_case(
    shape: tuple[int, int], nesterov: bool, active: Tensor | None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gradient, buffer, what momentum should be, the buffer after it); matrices that are not active have gradients of
    NaN and infinity."""
    gradient, buffer = randn(3, *shape, seed=1).to(dtype), randn(3, *shape, seed=2)
    G, B = gradient.double(), buffer.double()
    if active is not None:
        G[~active] = 0
        gradient[~active] = torch.nan
        gradient[~active, 0, 0] = torch.inf
    moves = 1 if active is None else active.double()[:, None, None]
    new = B + (1 - 0.95) * moves * (G - B)
    return gradient, buffer, 0.95 * new + (1 - 0.95) * G if nesterov else new, new


@with_shape
@with_nesterov
@with_active
def test_momentum(shape: tuple[int, int], nesterov: bool, active: Tensor | None) -> None:
    gradient, buffer, expected, new = momentum_case(shape, nesterov, active)
    for function in (lambda *args: momentum(*args, tile=Tile(1, 64, 0, 4, 1)), momentum, reference.momentum):
        update, after = gradient.clone(), buffer.clone()
        assert function(update, after, 0.95, nesterov, active) is update
        assert error(update, expected) < 1e-6
        assert error(after, new) < 1e-6
        if active is not None:
            assert torch.equal(after[~active], buffer[~active])


@with_few_shapes
@with_nesterov
@pytest.mark.parametrize("active", [None, flags(True, False, True)], ids=["all", "two"])
@pytest.mark.parametrize(
    ("dtype", "offset"), [*((dtype, 0) for dtype in DTYPES), (torch.float32, 1)], ids=lambda of: str(of)
)
def test_momentum_of_gradients_where_they_are(
    shape: tuple[int, int], nesterov: bool, active: Tensor | None, dtype: torch.dtype, offset: int
) -> None:
    gradient, buffer, expected, new = momentum_case(shape, nesterov, active, dtype)
    where, after = one_by_one(gradient, offset), buffer.clone()
    assert error(momentum(where, after, 0.95, nesterov, active), expected) < 1e-6
    assert error(after, new) < 1e-6
    assert torch.equal(torch.stack(where.tensors).nan_to_num(), gradient.nan_to_num())  # they stay


@with_few_shapes
@with_nesterov
@pytest.mark.parametrize("active", [None, flags(True, False, True)], ids=["all", "two"])
@pytest.mark.parametrize("source", ["one tensor", *DTYPES], ids=lambda source: str(source).removeprefix("torch."))
def test_momentum_rows(shape: tuple[int, int], nesterov: bool, active: Tensor | None, source: Any) -> None:
    dtype = torch.float32 if isinstance(source, str) else source
    gradient, buffer, expected, new = momentum_case(shape, nesterov, active, dtype)
    expected = expected if shape[0] >= shape[1] else expected.mT
    norm = torch.linalg.vector_norm(expected, dim=-1)
    gradients = gradient if isinstance(source, str) else one_by_one(gradient)
    kinds = [(partial(momentum_rows, tile=Tile(8, 16, 0, 4, 1)), gradients)]
    if isinstance(source, str):
        kinds.append((reference.momentum_rows, gradient))
    else:
        kinds.append((momentum_rows, gradients))
    for function, gradients in kinds:
        for out in DTYPES if isinstance(source, str) else (torch.float16,):
            after = buffer.clone()
            given = gradients.clone() if isinstance(gradients, Tensor) else gradients
            rows, norms = function(given, after, 0.95, nesterov, active, out)
            assert rows.dtype == out and rows.shape == expected.shape and norms.dtype == torch.float32
            assert error(rows, expected / norm.unsqueeze(-1)) < max(2e-6, torch.finfo(out).eps)
            assert error(norms, norm) < 1e-6
            assert error(after, new) < 1e-6
            if active is not None:
                assert torch.equal(after[~active], buffer[~active])


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (130, 2), (2, 130), (60, 50), (40, 90)], ids=str)
def test_momentum_rows_of_any_size(shape: tuple[int, int]) -> None:
    """From 1e-29 to 1e29 beside each other and over eight decades within a row, and rows of zero, which stay zero."""
    gradient = randn(1, *shape)
    rows = gradient if shape[0] >= shape[1] else gradient.mT
    rows *= 10.0 ** torch.linspace(-25, 25, rows.size(1), device=DEVICE)[:, None]
    rows *= 10.0 ** torch.linspace(-4, 4, rows.size(2), device=DEVICE)
    rows[:, 1] = 0
    where, tile = one_by_one(gradient), Tile(2, 16, 0, 4, 1) if min(shape) - 16 > 0 else None
    unit, norm = momentum_rows(where, torch.zeros_like(gradient), 0.5, False, None, torch.float32, tile)
    exact = torch.linalg.vector_norm(0.5 * rows.double(), dim=-1)
    assert torch.allclose(norm.double(), exact, rtol=1e-5, atol=1e-37)
    assert torch.allclose(unit.double(), 0.5 * rows.double() / exact.clamp_min(1e-99).unsqueeze(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("function", [momentum, momentum_rows])
def test_a_missing_gradient_changes_no_momentum(function: Callable[..., Any]) -> None:
    B = randn(3, 6, 4)
    where, after = scattered([None, randn(6, 4, seed=1), None], B.device), B.clone()
    function(where, after, 0.9, True, flags(False, True, False))
    assert [torch.equal(*pair) for pair in zip(after, B, strict=True)] == [True, False, True]
    everything_missing = scattered([None] * 3, B.device)
    function(everything_missing, B.clone(), 0.9, True, flags(False, False, False))


@with_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_mark_not_finite(shape: tuple[int, int], dtype: torch.dtype, value: float) -> None:
    """Wherever it is; of one that is missing, one whose numbers are the largest there are, and one that is fine."""
    for place in (0, shape[0] * shape[1] // 2, -1):
        bad, largest = randn(*shape).to(dtype), torch.full(shape, torch.finfo(dtype).max, dtype=dtype, device=DEVICE)
        bad.view(-1)[place] = value
        found = torch.zeros(2, 4, device=DEVICE).T[:, 1]  # not next to each other
        matrices = scattered([None, bad, -largest, randn(*shape).to(dtype)], bad.device)
        assert matrices is not None
        mark_not_finite(matrices, found)
        assert found.tolist() == [0, 1, 0, 0]
        found.zero_()
        mark_not_finite(matrices, found, Tile(1, 16, 0, 4, 1))
        assert found.tolist() == [0, 1, 0, 0]


def test_what_cannot_be_read_where_it_is() -> None:
    X = randn(6, 4)
    device = X.device
    for other in (
        torch._neg_view(X),
        torch._efficientzerotensor(X.shape, device=device),
        X.mT,
        X.double(),
        X.half(),
        X[:, :3],
        X.as_subclass(Placeholder),
        X.to("meta"),
    ):
        assert scattered([X, other], device) is None
    assert scattered([X.double()], device) is None
    assert scattered([X, None, nn.Parameter(X)], device) is not None


def test_tables_are_kept_by_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many at most; while a graph is captured no new ones are made, and those in use stay."""
    X = randn(6, 4)
    device = X.device
    monkeypatch.setattr(scattered_module, "_tables", {})
    monkeypatch.setattr(scattered_module, "_captured", {})
    monkeypatch.setattr(scattered_module, "MOST_TABLES", 2)
    first, second = (address_table(((i, 16),), device) for i in (1, 2))
    assert first.tolist() == [[1, 16]] and address_table(((1, 16),), device) is first
    address_table(((3, 16),), device)
    assert address_table(((1, 16),), device) is first
    assert address_table(((2, 16),), device) is not second  # the longest unused
    known, odd = scattered([X], device), scattered([X.view(-1)[1:]], device)
    assert odd is not None and known is not None and (known.is_aligned, odd.is_aligned) == (True, False)
    assert known is not None and known.table.tolist() == [[X.data_ptr()]]
    monkeypatch.setattr(scattered_module, "is_capturing", lambda device: True)
    assert scattered([X.clone()], device) is None
    with pytest.raises(RuntimeError, match="ordinary step first"):
        address_table(((5, 16),), device)
    assert (((5, 16),), device) not in scattered_module._tables
    again = scattered([X], device)
    assert again is not None and again.table is scattered_module._captured[((X.data_ptr(),),), device]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", list(layouts(2, 2, torch.float32)))
@pytest.mark.parametrize("cautious", [False, True], ids=["steady", "cautious"])
def test_apply_update(layout: str, dtype: torch.dtype, cautious: bool) -> None:
    """Of weights that are parameters, views of one, one with an odd address and one of four dimensions; rate as a
    number and on the device; one matrix of U is for nobody."""
    shape = (18, 33)
    U = layouts(*shape, dtype)[layout].repeat(3, 1, 1)[:5]
    U = U.mT.contiguous().mT if layout == "transposed" else U
    places, scale, decay = [4, 0, 3, 1], 1.5, 0.3

    def weights() -> list[Tensor]:
        stack, odd = randn(2, *shape, seed=4), randn(1 + 18 * 33, seed=5)[1:]
        return [nn.Parameter(randn(*shape, seed=3)), stack[1], odd.view(shape), randn(18, 3, 1, 11, seed=6)]

    before = [W.detach().clone().view(shape).double() for W in weights()]
    exact = []
    for W, place in zip(before, places, strict=True):
        u = U[place].double()
        exact.append(W - 0.1 * (decay * (W * (W * u > 0) if cautious else W) + scale * u))
    for rate in (0.1, torch.tensor(0.1, device=DEVICE)):
        for function in (apply_update, reference.apply_update):
            moved = weights()
            versions = [W._version for W in moved]
            with torch.no_grad():
                assert function(moved, U, places, rate, scale, decay, cautious)
            for W, expected in zip(moved, exact, strict=True):
                assert error(W.detach().view(shape), expected) < 1e-7
            assert all(W._version > version for W, version in zip(moved, versions, strict=True))  # autograd is told


@pytest.mark.parametrize("shape", [(1, 7), (33, 17)], ids=["1x7", "33x17"])
def test_a_rate_of_zero_on_the_device_leaves_weights_as_they_are(shape: tuple[int, int]) -> None:
    W, zero = randn(2, *shape), torch.zeros((), device=DEVICE)
    for U in (randn(2, *shape, seed=1), randn(2, *shape[::-1], seed=1).mT):
        moved = W.clone()
        apply_update(list(moved), U, [1, 0], zero, 2.0, 0.1, tile=Tile(16, 16, 0, 4, 1))
        assert torch.equal(moved, W)
        apply_update(list(moved), U, [1, 0], 0.1, 2.0, tile=Tile(16, 16, 0, 4, 1))
        assert error(moved, W.double() - 0.1 * 2.0 * U.flip(0).double()) < 1e-6


def test_nothing_to_do() -> None:
    assert momentum(randn(0, 3, 4), randn(0, 3, 4), 0.9, True).shape == (0, 3, 4)
    assert apply_update([], randn(2, 3, 4), [], 0.1, 1.0)


def test_weights_that_apply_update_cannot_change_are_left_alone() -> None:
    """As are those beside them."""
    X, fine = randn(2, 3, 4), randn(3, 4)
    before = fine.clone()
    for other in (X[0].double(), X[0].mT, X[0, :, :3].contiguous(), X[0].as_subclass(Placeholder)):
        assert not apply_update([fine, other], X, [0, 1], 0.1, 1.0)
    assert not apply_update([fine], X.double(), [0], 0.1, 1.0)
    assert torch.equal(fine, before)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda X: momentum(X.mT, X, 0.9, True), ["gradient", "float32", "contiguous"]),
        (lambda X: momentum(X, X.half(), 0.9, True), ["buffer is torch.float16", "float32"]),
        (lambda X: momentum(X, X, 0.9, True, flags(True)), ["active is torch.bool (1,)", "bool [2]"]),
        (
            lambda X: momentum(one_by_one(X[:1]), X, 0.9, True),
            ["1 gradients of [12] numbers each", "(2, 3, 4)", "one for each"],
        ),
        (
            lambda X: momentum_rows(one_by_one(X[:, :2]), X, 0.9, True),
            ["gradients of [8] numbers each", "as many numbers"],
        ),
        (lambda X: momentum_rows(X, X, 0.9, True, None, torch.int8), ["dtype = torch.int8", "float16"]),
        (lambda X: mark_not_finite(one_by_one(X), X[0, 0]), ["flags are torch.float32 (4,)", "[2]"]),
        (lambda X: apply_update([X[0]], X, [2], 0.1, 1.0), ["[2]", "from 0 to 1"]),
        (lambda X: apply_update([X[0]], X, [], 0.1, 1.0), ["one for each of 1"]),
    ],
)
def test_refusals(call: Callable[[Tensor], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        call(randn(2, 3, 4))
    for word in words:
        assert word in str(refusal.value)


# A step


class Signs(MatrixOptimizer):
    """A rule without matrix products, which the interpreter takes long for; its wide updates are transposed views."""

    def orthogonalize(self, update: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        signs = update.sign() * update.abs().sqrt()
        return signs.half() if update.size(1) >= update.size(2) else signs.mT.contiguous().mT


def make(rule: type[MatrixOptimizer], kernels: str, **options: Any) -> MatrixOptimizer:
    """Over two tall matrices, two wide ones in a stack, three heads in a fused one, and one without a gradient."""
    params = [nn.Parameter(randn(*shape)) for shape in [(24, 8), (24, 8), (2, 8, 24), (24, 8)]]
    heads = nn.Parameter(randn(24, 16))
    for p in (*params[:-1], heads):
        p.grad = randn(*p.shape, seed=7)
    groups = [{"params": params}, {"params": [heads], "row_blocks": 3}]
    return rule(groups, lr=0.05, weight_decay=0.3, kernels=kernels, **options)


@pytest.mark.parametrize(
    ("rule", "options"),
    [(Signs, {}), (Signs, dict(nesterov=False, cautious=True)), (Signs, dict(update_floor=0.3)),
     (Muon, dict(polar_method="svd")), (MuonSquared, dict(polar_method="svd")), (Soap, {}),
     (Muon, dict(polar_steps=1))],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value),
)  # fmt: skip
def test_a_rule_moves_weights_alike_by_either_kernels(
    rule: type[MatrixOptimizer], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps, the second with a gradient of NaN under a deferred check: it changes nothing, to the bit."""
    monkeypatch.setattr("optim.matrix_optimizer.fast_half_dtype", lambda device_type: torch.float32)
    weights = {}
    for kernels in ("torch", "triton"):
        optimizer = make(rule, kernels, defer_check=True, **options)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        start, bad = [p.detach().clone() for p in params], params[1]
        optimizer.step()
        before = [p.detach().clone() for p in params]
        good, bad.grad = bad.grad, torch.full_like(bad, torch.nan)
        kept = {id(p): {name: value.clone() for name, value in state.items()} for p, state in optimizer.state.items()}
        optimizer.step()
        assert all(map(torch.equal, params, before))
        for p, state in optimizer.state.items():
            assert all(torch.equal(value, kept[id(p)][name]) for name, value in state.items())
        bad.grad = good
        optimizer.step()
        moved = [not torch.equal(p, old) for p, old in zip(params, start, strict=True)]
        assert moved == [p.grad is not None for p in params]
        weights[kernels] = params
    for plain, ours in zip(weights["torch"], weights["triton"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


class Wrapped(Muon):
    """With the mark of what it stands in for, as functools.wraps copies it, and with a helper of its own."""

    @wraps(Muon.orthogonalize)
    def orthogonalize(self, *arguments: Any) -> Tensor:
        assert isinstance(arguments[0], Tensor)
        return super().orthogonalize(*arguments)


class Helped(Muon):
    def polar(self, update: Any, group: dict[str, Any]) -> Tensor:
        return super().polar(update / update.norm(), group)


class Doubled(Muon):
    """As someone's own rule might build on one of ours."""

    def orthogonalize(self, update: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        assert update.dtype == torch.float32
        return super().orthogonalize(2 * update, state, group)


UNIT_ROWS: list[tuple[type[MatrixOptimizer], dict[str, Any]]] = [
    (Muon, {}), (Muon, dict(nesterov=False)), (Aurora, dict(variant="release")), (Aurora, dict(variant="warm")),
    (Aurora, dict(variant="paper", iterations=1)), (Aurora, dict(iterations=1, sides="tall")), (NorMuon, {}),
    (UNorMuon, {}), (MuonPlus, {}),
]  # fmt: skip
WHOLE = [
    (Doubled, {}),
    (Wrapped, {}),
    (Helped, {}),
    (Muon, dict(polar_method="aol")),
    (Muon, dict(polar_method="deepseek_v4", polar_steps=10)),
]


@pytest.mark.parametrize(("rule", "options"), UNIT_ROWS + WHOLE, ids=str)
def test_rules_that_take_unit_rows_move_as_from_whole_momenta(
    rule: type[MatrixOptimizer], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same momentum to the bit, and updates that differ by less than half precision does; gradients stay as they
    are. What was made of whole momenta alone still is."""
    monkeypatch.setattr("optim.matrix_optimizer.fast_half_dtype", lambda device_type: torch.float16)
    moved, momenta, calls, steps = [], [], [], 2 if "variant" in options else 1
    genuine = momentum_module.momentum_rows
    monkeypatch.setattr(momentum_module, "momentum_rows", lambda *all: (calls.append(all), genuine(*all))[1])
    for takes_rows in (True, False):
        if not takes_rows:
            monkeypatch.setattr("optim.matrix_optimizer.dtype_of_unit_rows", lambda *_: None)
        optimizer = make(rule, "triton", **{"polar_steps": 2, **options})  # which the interpreter takes long for
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        before, gradients = [p.detach().clone() for p in params], [p.grad.clone() for p in params]
        for _ in range(steps):
            optimizer.step()
        assert all(map(torch.equal, [p.grad for p in params], gradients))
        moved.append([p.detach() - old for p, old in zip(params, before, strict=True)])
        momenta.append([optimizer.state[p]["momentum_buffer"] for p in params])
    assert len(calls) == (3 * steps if (rule, options) in UNIT_ROWS else 0)  # of three banks
    assert all(map(torch.equal, *momenta))
    for ours, whole in zip(*moved, strict=True):
        assert error(ours, whole.double()) < 4e-3


class Halved(MatrixOptimizer):
    def direction(self, batch: Any) -> Tensor:
        batch.gradient.mul_(0.5)
        momentum: Tensor = batch.momentum()
        return momentum


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_what_a_rule_makes_of_the_gradient_is_what_momentum_is_made_of(kernels: str) -> None:
    optimizer = make(Halved, kernels, momentum=0.5)
    optimizer.step()
    for p, state in optimizer.state.items():
        if p.grad is not None:
            assert torch.equal(state["momentum_buffer"], (0.25 * p.grad).view(state["momentum_buffer"].shape))


class Marked(MatrixOptimizer):
    @takes_unit_rows
    def orthogonalize(self, update: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        return update.sign()


class Late(MatrixOptimizer):
    def direction(self, batch: Any) -> Tensor:
        return batch.momentum() + batch.gradient  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("rule", "error", "words"),
    [(Marked, AttributeError, "UnitRows have no sign.*without the mark"), (Late, RuntimeError, "read it before")],
)
def test_mistakes_in_rules_are_explained(
    rule: type[MatrixOptimizer], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optim.matrix_optimizer.fast_half_dtype", lambda device_type: torch.float16)
    with pytest.raises(error, match=words):
        make(rule, "triton").step()


@pytest.mark.parametrize(
    ("method", "rows"), [("svd", torch.float16), ("aol", torch.float16), ("quintic", torch.bfloat16)]
)
@pytest.mark.parametrize("function", [polar, aurora_polar])
def test_unit_rows_that_polar_cannot_take(function: Callable[..., Tensor], method: str, rows: torch.dtype) -> None:
    X = UnitRows(randn(2, 6, 4).to(rows), rand(2, 6), torch.Size((2, 6, 4)))
    with pytest.raises(ValueError, match="give it the matrices themselves"):
        function(X, method=method, dtype=torch.float16)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_what_p_grad_becomes_after_its_reduction_does_not_count(kernels: str) -> None:
    weights = []
    for late in (1.0, 5.0):
        p = nn.Parameter(torch.ones(24, 8, device=DEVICE))
        p.grad = randn(24, 8)
        optimizer = Muon([p], kernels=kernels)
        (gradient,) = optimizer.finish_reduction()
        p.grad[0] *= late
        gradient[:, 1] = 0
        optimizer.step()
        assert not optimizer.state[p]["momentum_buffer"][1].any()
        weights.append(p.detach())
    assert torch.equal(*weights)


def test_a_bad_gradient_is_named_and_nothing_moves() -> None:
    """Of all banks, as the last one's gradient is bad."""
    optimizer = make(Signs, "triton")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.step()
    before = [p.detach().clone() for p in params] + [value.clone() for value in momenta_of(optimizer)]
    params[-1].grad[5, 5] = torch.inf
    with pytest.raises(FloatingPointError, match="parameter 0 of group 1 holds NaN or infinity; nothing was updated"):
        optimizer.step()
    assert all(map(torch.equal, before, [*params, *momenta_of(optimizer)]))


def momenta_of(optimizer: MatrixOptimizer) -> list[Tensor]:
    return [state["momentum_buffer"] for state in optimizer.state.values()]


def test_what_the_kernel_cannot_take_moves_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit weights, and weights in another order of memory."""
    monkeypatch.setattr(update_module, "_apply_update", lambda *_: pytest.fail("by the kernel"))
    for p in (nn.Parameter(randn(24, 8).half()), nn.Parameter(randn(8, 24).mT)):
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        Signs([p], kernels="triton").step()
        assert not torch.equal(p, before)


class Bytes(TorchDispatchMode):
    """Counts what operators read and write, as their arguments say: each tensor read once, one that is changed in place
    read and written, each result written. Views and uninitialised memory are free, what copy_ and zero_ overwrite is
    not read. Of the kernels the matrix products are left out; of the others their schema says what they change."""

    FREE = ("empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided")
    OVERWRITING = ("copy_", "zero_", "fill_", "_foreach_copy_")
    PRODUCTS = ("gram", "symmetric_product", "apply_symmetric")

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, schema = func._schema.name.split("::")[1], func._schema
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if is_view or name in self.FREE or (func.namespace == NAMESPACE and name.lstrip("_") in self.PRODUCTS):
            return result
        total = 0
        for argument, value in zip(schema.arguments, args, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            times = 1 if not is_written or name in self.OVERWRITING else 2
            total += times * size_of(value)
        if not any(r.alias_info is not None for r in schema.returns):
            total += size_of(result)
        self.by_operator[name] = self.by_operator.get(name, 0) + total
        return result


def size_of(value: Any) -> int:
    return sum(x.numel() * x.itemsize for x in tree_leaves(value) if isinstance(x, Tensor))


def test_bytes_of_a_step_around_the_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per element, with defer_check and updates in half precision: 4 for the check of gradients, 14 for momentum_rows,
    4 for scale_rows, 10 for apply_update; the rest is the polar factor's, on small matrices. With torch's operators in
    place of all others but normalize_rows and scale_rows it is nearly three times as much."""
    monkeypatch.setattr("optim.matrix_optimizer.fast_half_dtype", lambda device_type: torch.float16)
    params = [nn.Parameter(randn(160, 32, seed=i)) for i in range(2)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = Muon(params, kernels="triton", defer_check=True, weight_decay=0.1)

    def bytes_of_step() -> float:
        with Bytes() as counted:
            optimizer.step()
        return sum(counted.by_operator.values()) / sum(p.numel() for p in params)

    with monkeypatch.context() as without:
        without.setattr(update_module, "apply_update", lambda *_: False)
        without.setattr(scattered_module, "scattered", lambda *_: None)

        def separately(*arguments: Any) -> tuple[Tensor, Tensor]:
            return normalize_rows(reference.momentum(*arguments[:-1]), arguments[-1])

        without.setattr(momentum_module, "momentum_rows", separately)
        before = bytes_of_step()
    assert 93 < before < 95
    assert 33 < bytes_of_step() < 0.37 * before


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # in the interpreter, of the product that is not used
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_a_bad_gradient_leaves_an_infinite_weight_alone(kernels: str, value: float) -> None:
    """Zero times infinity would be NaN; and without decay nothing multiplies the weight at all."""
    p = nn.Parameter(torch.ones(24, 8, device=DEVICE))
    with torch.no_grad():
        p[0, 0] = value
    p.grad = torch.full_like(p, float("nan"))
    before = p.detach().clone()
    Muon([p], lr=0.05, weight_decay=0.3, kernels=kernels, defer_check=True).step()
    assert torch.equal(p, before)
    p.grad = torch.ones_like(p)
    Muon([p], lr=0.05, kernels=kernels).step()
    assert p[0, 0] == value
