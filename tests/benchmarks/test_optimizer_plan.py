"""The routing printed by optim.info: what it counts is what a step really allocates, and every matrix has an owner."""

from pathlib import Path

import pytest
import torch

from benchmarks import optimizer_plan
from model import GPT
from optim import RULES, MatrixOptimizer, build_optimizers
from tests.conftest import ROOT
from train_gpt import load_config


@pytest.mark.filterwarnings("ignore:PolarGrad")
@pytest.mark.parametrize("settings", [*RULES, "aurora --aurora_variant=warm", "adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_counted_state_is_the_state_of_a_real_step(tiny_recipe: Path, settings: str, dtype: torch.dtype) -> None:
    noise = ["--init_out=0.02", "--init_down=0.02"]  # some rules keep norms
    config = load_config([str(tiny_recipe), *noise, *f"--matrix_optimizer={settings}".split()])
    with torch.device("meta"):
        planned = GPT(config).to(dtype)
    lines, counted = optimizer_plan.routing(build_optimizers(planned, config), 1)
    model = GPT(config).to(dtype)
    optimizers = build_optimizers(model, config)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    held = 0
    for optimizer in optimizers:
        optimizer.step()
        held += sum(optimizer_plan.nbytes(entry.values()) for entry in optimizer.state_dict()["state"].values())
    assert counted == held
    assert [line[0] for line in lines if line[4] != "all"] == (
        [name for name, _ in model.blocks.named_parameters(prefix="blocks") if "attention" in name]
        + [name for name, _ in model.blocks.named_parameters(prefix="blocks") if "gate_up" in name]
        + [name for name, _ in model.blocks.named_parameters(prefix="blocks") if "down" in name]
        if isinstance(optimizers[0], MatrixOptimizer)
        else []
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_rank_s_share_shrinks_with_the_number_of_ranks(ranks: int) -> None:
    """The 124M recipe: momentum is 4 bytes for each of 84,934,656 entries, over R, and at most 10% of padding; it is
    the rest, on AdamW, that every rank keeps whole."""
    config = load_config([str(ROOT / "configs/classics_124m_muon.toml"), "--device=cpu"])
    with torch.device("meta"):
        optimizers = build_optimizers(GPT(config), config)
    _, alone = optimizer_plan.routing(optimizers[1:], ranks)
    lines, held = optimizer_plan.routing(optimizers, ranks)
    matrices = 84_934_656 * 4 / ranks
    assert matrices <= held - alone <= 1.1 * matrices
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
