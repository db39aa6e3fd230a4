"""The kernels around the matrix products of an optimizer step: momentum and apply_update, and what a step moves."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import NAMESPACE, reference

pytest.importorskip("triton", reason="there is no Triton for this platform")

from kernels.triton_common import Tile
from optim import Muon, MuonSquared, Soap
from optim.bank import Placeholder
from optim.matrix_optimizer import MatrixOptimizer
from tests.kernels.test_kernels import DEVICE, DTYPES, SHAPES, error, layouts, randn

momentum_module, update_module = (importlib.import_module(f"kernels.{name}") for name in ("momentum", "apply_update"))
momentum, apply_update = momentum_module.momentum, update_module.apply_update

pytestmark = pytest.mark.usefixtures("poisoned_memory")
with_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def flags(*values: bool) -> Tensor:
    return torch.tensor(values, device=DEVICE)


@with_shape
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("active", [None, flags(True, False, True), flags(False).expand(3)], ids=["all", "two", "none"])
def test_momentum(shape: tuple[int, int], nesterov: bool, active: Tensor | None) -> None:
    """Matrices that are not active have gradients of NaN and infinity."""
    gradient, buffer = randn(3, *shape, seed=1), randn(3, *shape, seed=2)
    G, B = gradient.double(), buffer.double()
    if active is not None:
        G[~active] = 0
        gradient[~active] = torch.nan
        gradient[~active, 0, 0] = torch.inf
    moves = 1 if active is None else active.double()[:, None, None]
    new = B + (1 - 0.95) * moves * (G - B)
    expected = 0.95 * new + (1 - 0.95) * G if nesterov else new
    for function in (lambda *args: momentum(*args, tile=Tile(1, 64, 0, 4, 1)), momentum, reference.momentum):
        update, after = gradient.clone(), buffer.clone()
        assert function(update, after, 0.95, nesterov, active) is update
        assert error(update, expected) < 1e-6
        assert error(after, new) < 1e-6
        if active is not None:
            assert torch.equal(after[~active], buffer[~active])


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
    """Per element, with defer_check and updates in half precision: 8 for the copy into the bank, 4 for its check, 16
    for momentum, 6 for normalize_rows, 10 for apply_update; the rest is the polar factor's, on small matrices. In
    operators of their own momentum and its mask are 32, what follows the polar factor is 34."""
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
        without.setattr(momentum_module, "momentum", reference.momentum)
        assert bytes_of_step() > 80
    assert 44 < bytes_of_step() < 50


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
