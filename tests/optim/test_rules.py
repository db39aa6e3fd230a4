"""What update rules say of themselves (state, scale), and what those that need the momentum alone promise."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from optim import Aurora, MatrixOptimizer, MuonEq, MuonPlus, NorMuon, OptimizerConfig, PolarGrad, build_optimizers
from optim.checks import OWN_STATE
from tests.matrices import randn, uneven
from tests.optim import rules
from tests.optim.rules import Make

pytestmark = [pytest.mark.usefixtures("float32_products"), pytest.mark.filterwarnings("ignore:PolarGrad")]
SHAPES = pytest.mark.parametrize("shape", [(14, 5), (5, 14), (6, 6)], ids=["tall", "wide", "square"])

# Numbers beside the momentum, of an m x n matrix
STATE: dict[str, Callable[[int, int], int]] = {
    **dict.fromkeys(rules.RULES, lambda m, n: 0),
    "normuon": lambda m, n: m,
    "normuon, long": lambda m, n: max(m, n),
    "aurora, warm": lambda m, n: max(m, n) if m != n else 0,
    "adamuon": lambda m, n: m * n,
    "muon_squared": lambda m, n: m * n,
    "adamh": lambda m, n: m * n + 1,
    "muown": lambda m, n: 4 * m + 1,
    **dict.fromkeys(("soap", "soap_muon"), lambda m, n: m * n + 2 * (m**2 + n**2) + 1),
}


def moved(make: Make, gradients: torch.Tensor, **options: object) -> torch.Tensor:
    """How far weights [..., m, n] go by steps with `gradients` [steps, ..., m, n], from zero."""
    weight = nn.Parameter(torch.zeros(gradients.shape[1:]))
    optimizer = make([weight], **options)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@SHAPES
@pytest.mark.parametrize("rule", rules.RULES)
def test_a_rule_keeps_as_much_as_it_says(rule: str, shape: tuple[int, int]) -> None:
    """After a step as without memory, which is what optimizer_plan counts."""
    weight = nn.Parameter(randn(3, *shape))
    optimizer = rules.RULES[rule]([weight])
    weight.grad = randn(3, *shape, seed=1)
    optimizer.step()
    (state,) = optimizer.state_dict()["state"].values()
    kept = {name: value for name, value in state.items() if name not in OWN_STATE}
    planned = optimizer.rule_state(*shape, optimizer.param_groups[0])
    assert {name: value[:1].shape for name, value in kept.items()} == {name: v.shape for name, v in planned.items()}
    for values, matrices in ((kept, 3), (planned, 1)):
        assert sum(value.nbytes for value in values.values()) == matrices * 4 * STATE[rule](*shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", rules.RULES)
def test_state_that_torch_makes_before_the_first_step_changes_no_step(rule: str, dtype: torch.dtype) -> None:
    """Torch takes a step with zero gradients at rate 0, which AdamH and Muown count, as torch's AdamW does."""
    weights = []
    for is_made_before in (False, True):
        module = nn.Linear(5, 14, bias=False, dtype=dtype)
        module.load_state_dict({"weight": randn(14, 5)})
        optimizer = rules.RULES[rule]([module.weight])
        if is_made_before:
            (made,) = get_optimizer_state_dict(module, optimizer)["state"].values()
            assert torch.equal(module.weight, randn(14, 5).to(dtype))
        for step in range(4):
            module.weight.grad = randn(14, 5, seed=1 + step).to(dtype)
            optimizer.step()
        weights.append(module.weight.detach())
    if rule in ("adamh", "muown"):
        assert made["steps"] == 1 + 4  # shown as it is now
    else:
        assert torch.equal(*weights)


@SHAPES
@pytest.mark.parametrize("rule", ["normuon, long", "muon_eq", "muon_eq, both", "muon_plus", "adamuon", "polar_grad"])
def test_rows_and_columns_that_have_no_gradient_stay_where_they_are(rule: str, shape: tuple[int, int]) -> None:
    gradients = randn(4, *shape)
    gradients[:, 1], gradients[:, :, 2] = 0, 0
    change = moved(rules.RULES[rule], gradients)
    assert torch.equal(change != 0, gradients[0] != 0)


@pytest.mark.parametrize("shape", [(3, 14, 5), (3, 6, 6)], ids=["tall", "square"])
def test_muon_eq_takes_batches_in_pieces(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    """And on tall matrices is Aurora with one iteration."""
    gradients = torch.stack([randn(*shape, seed=step) * torch.logspace(-3, 3, shape[1])[:, None] for step in range(3)])
    whole = moved(MuonEq, gradients)
    if shape == (3, 14, 5):
        assert torch.equal(whole, moved(Aurora, gradients, iterations=1))
    pieces: list[int] = []
    monkeypatch.setattr("optim.polar.PIECE_BYTES", 4 * 2 * shape[1] * shape[2])
    normalize = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda X, **how: pieces.append(len(X)) or normalize(X, **how))
    torch.testing.assert_close(moved(MuonEq, gradients), whole, rtol=1e-5, atol=1e-6)
    assert set(pieces) == {2, 1}


@SHAPES
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_muon_eq_balances_gradients_of_any_size(shape: tuple[int, int], scale: float) -> None:
    """The row and column sizes of a gradient are gone before the polar factor, tiny ones too."""
    even = randn(1, *shape)
    rows, columns = torch.logspace(-6, 6, shape[0])[:, None], torch.logspace(6, -6, shape[1])
    for axis, factor in (("rows", rows), ("columns", columns)):
        expected = moved(MuonEq, even, axis=axis, polar_method="svd")
        found = moved(MuonEq, scale * factor * even, axis=axis, polar_method="svd")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("order", "norms"), [("col_row", "rows"), ("row_col", "columns"), ("row", "rows")])
def test_muon_plus_gives_norm_1_to_what_comes_last(order: str, norms: str) -> None:
    for shape in ((14, 5), (5, 14)):
        change = moved(MuonPlus, uneven(*shape)[None], lr=1.0, order=order, scale="none")
        lengths = change.norm(dim=1 if norms == "rows" else 0)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-5, atol=0)
        aspect = moved(MuonPlus, uneven(*shape)[None], lr=1.0, order=order, scale="aspect")
        torch.testing.assert_close(aspect, (shape[0] / shape[1]) ** 0.5 * change)


def test_normuon_s_rows_are_long_in_tall_and_square_matrices_and_its_columns_in_wide_ones() -> None:
    for shape in ((14, 5), (6, 6), (5, 14)):
        gradients = torch.stack([uneven(*shape, seed=2 * step) for step in range(3)])
        paper, long = (moved(NorMuon, gradients, axis=axis) for axis in ("rows", "long"))
        assert torch.equal(paper, long) == (shape != (5, 14))
        turned = moved(NorMuon, gradients.mT, axis="rows", scale="none")
        if shape == (5, 14):
            torch.testing.assert_close(long, turned.mT)  # of scale 1 either way


def test_polar_grad_warns_whoever_makes_it_of_summed_gradients() -> None:
    def made() -> MatrixOptimizer:
        return PolarGrad([nn.Parameter(torch.ones(2, 2))])

    with pytest.warns(UserWarning, match=r"PolarGrad: .*proportional.*divide lr by the number of tokens") as told:
        made()
    (warning,) = told
    assert Path(warning.filename) == Path(__file__)
    assert warning.lineno == made.__code__.co_firstlineno + 1
    with pytest.warns(UserWarning, match="PolarGrad") as told:
        build_optimizers(nn.Linear(2, 2, bias=False), OptimizerConfig(matrix_optimizer="polar_grad"))
    assert Path(told[0].filename) == Path(__file__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, make in rules.RULES.items():
            if name != "polar_grad":
                make([nn.Parameter(torch.ones(2, 2))])
