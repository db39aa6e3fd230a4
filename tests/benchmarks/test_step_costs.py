"""The benchmarks of a step's products and parts: FLOPs against the model's own count, and that parts do go."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step_bound, step_parts


def test_products_are_those_of_model_and_optimizer(tiny_recipe: Path) -> None:
    """With AdamW there are no others than the model's."""
    run = step_bound.prepared(str(tiny_recipe), ["--matrix_optimizer=adamw"], "none")
    tokens = run.config.batch_tokens
    flops = step_bound.product_flops(run)
    assert flops == run.model.flops_per_token() * tokens
    muon = step_bound.prepared(str(tiny_recipe), ["--matrix_optimizer=muon"], "none")
    assert step_bound.product_flops(muon) > flops


def test_time_inside_operations_is_sorted_by_kind() -> None:
    table, a = torch.zeros(10, 4), torch.ones(3, 4)
    rows = torch.tensor([1, 2, 3])
    found = step_bound.shares(lambda: table.index_add_(0, rows, a @ torch.ones(4, 4) + 1), 3)
    assert set(found) == {"products", "lookups", "elementwise"}
    assert all(ms > 0 for ms in found.values())


@pytest.mark.parametrize("part", [part for part in step_parts.PARTS if part != "nothing"])
def test_a_model_without_a_part_computes_something_else(part: str, tiny_recipe: Path) -> None:
    def loss(name: str) -> float:
        run: Any = step_parts.prepared(step_parts.Args(str(tiny_recipe)), *step_parts.PARTS[name])
        torch.manual_seed(1)
        for p in run.model.parameters():
            torch.nn.init.normal_(p)
        inputs, targets = run.batch()
        run.loader.close()
        return run.compiled(inputs[0], targets[0]).item()

    assert loss(part) != pytest.approx(loss("nothing"), rel=1e-4)
