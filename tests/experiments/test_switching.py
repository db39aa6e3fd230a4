"""The rule that switches between Muon and Aurora is each of them in its turn, and goes on through a checkpoint."""

import copy
from typing import Any

import pytest
import torch

from experiments.switching import Switching
from optim import Aurora, MatrixOptimizer, Muon


def take(optimizer: MatrixOptimizer, generator: torch.Generator) -> list[torch.Tensor]:
    """What a step with a random gradient moves."""
    params = optimizer.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * torch.logspace(-2, 0, p.size(0))[:, None]
    optimizer.step()
    return [p.detach() - old for p, old in zip(params, before, strict=True)]


@pytest.mark.parametrize("first", ["muon", "aurora"])
def test_each_rule_has_its_turn_and_a_checkpoint_keeps_the_place(first: str) -> None:
    def optimizer(rule: type[MatrixOptimizer], **options: Any) -> MatrixOptimizer:
        shapes = (12, 5), (12, 5), (4, 9)
        return rule([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes], polar_method="svd", **options)

    found, muon, aurora = optimizer(Switching, first=first, after=3), optimizer(Muon), optimizer(Aurora)
    generators = [torch.Generator().manual_seed(1) for _ in range(3)]
    for step in range(6):
        moved, by_muon, by_aurora = map(take, (found, muon, aurora), generators)
        expected, other = (by_muon, by_aurora) if (step < 3) == (first == "muon") else (by_aurora, by_muon)
        torch.testing.assert_close(moved, expected)
        assert not torch.allclose(moved[0], other[0], rtol=0.01, atol=0)
        if step in (1, 4):
            again = optimizer(Switching, first=first, after=3)
            again.load_state_dict(copy.deepcopy(found.state_dict()))
            found = again
