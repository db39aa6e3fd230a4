"""The routing that is printed: every matrix has an owner, and ranks share state. Its bytes: test_dry_run.py."""

from pathlib import Path

import pytest
import torch

from benchmarks import optimizer_plan
from harness.memory_plan import state_bytes
from model import GPT
from optim import build_optimizers
from tests.conftest import ROOT
from train_gpt import load_config


@pytest.mark.parametrize("rule", ["muon", "adamw"])
def test_matrices_have_owners_and_adamw_has_none(tiny_recipe: Path, rule: str) -> None:
    config = load_config([str(tiny_recipe), f"--matrix_optimizer={rule}"])
    with torch.device("meta"):
        model = GPT(config)
    lines = optimizer_plan.routing(build_optimizers(model, config), 1)
    names = [
        f"blocks.{i}.{part}" for part in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down") for i in (0, 1)
    ]
    assert sorted(line[0] for line in lines if line[4] != "all") == (sorted(names) if rule == "muon" else [])


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_rank_s_share_shrinks_with_the_number_of_ranks(ranks: int) -> None:
    """The 124M recipe: momentum is 4 bytes for each of 84,934,656 entries, over R, and at most 10% of padding; it is
    the rest, on AdamW, that every rank keeps whole."""
    config = load_config([str(ROOT / "configs/classics_124m_muon.toml"), "--device=cpu"])
    with torch.device("meta"):
        optimizers = build_optimizers(GPT(config), config)
    lines, parts = optimizer_plan.routing(optimizers, ranks), state_bytes(optimizers, ranks, fsdp=False)
    matrices = 84_934_656 * 4 / ranks
    assert matrices <= parts["momentum of matrices"] <= 1.1 * matrices
    assert parts["state of AdamW"] == sum(int(line[5].replace(",", "")) for line in lines if line[4] == "all")
    owners = [line[4].split(",") for line in lines if line[3] != "-"]
    assert sorted({int(rank) for each in owners for rank in each}) == list(range(ranks))


def test_in_shards_a_rank_keeps_its_share_of_everything(capsys: pytest.CaptureFixture[str]) -> None:
    """The 124M recipe on eight ranks, which divide all of its dimensions."""
    recipe = str(ROOT / "configs/classics_124m_adamw.toml")
    assert optimizer_plan.main([recipe, "--device=cpu", "--ranks=8", "--fsdp"]) == 0
    numbers = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    params, weights, state = int(numbers[0][0].replace(",", "")), float(numbers[0][2]), float(numbers[1][2])
    assert weights == pytest.approx(4 * params / 8 / 2**20, abs=0.06)
    assert state == pytest.approx(2 * weights, abs=0.12)


def test_the_table_and_mistakes(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert optimizer_plan.main([str(tiny_recipe), "--ranks=3"]) == 0
    output = capsys.readouterr().out
    assert "blocks.1.mlp.down" in output
    assert "0,1,2" in output
    assert "on each of 3 ranks" in output
    for arguments, word in (
        (["--ranks=none"], "ranks = 'none' must be a whole number"),
        (["--matrx_lr=1"], "did you mean matrix_lr?"),
    ):
        assert optimizer_plan.main([str(tiny_recipe), *arguments]) == 2
        assert word in capsys.readouterr().err
