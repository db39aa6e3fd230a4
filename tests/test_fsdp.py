"""The trainer's model in shards: what one process makes of it, with a share of the memory."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import optim
from harness.checkpoint import read_checkpoint
from harness.compiling import compile_model
from harness.fsdp import cut_dim, place, unsharded
from harness.machine import Machine
from inference.generate import generate
from model import GPT, ModelConfig
from optim import OptimizerConfig
from optim.shards import flat_ranges, gathered, local
from tests.conftest import Trainer, python, torchrun
from tests.optim.test_sharding import float64
from tests.test_train import metrics
from train_gpt import load_config

MODEL = ModelConfig(
    vocab_size=60, num_layers=1, num_heads=2, head_dim=4, model_dim=10, mlp_hidden=14, seq_len=8, embed_skip=True,
    init_out=0.02, init_down=0.02, init_head=0.02,
)  # fmt: skip
RULES = [*optim.RULES, "adamw", "sgd"]  # rmsprop divides rounding by rounding where a gradient vanishes
SHORT: dict[str, Any] = {"riemannian_aurora_outer_steps": 1, "riemannian_aurora_cg_steps": 5}
AT_3_RANKS_ALONE = set(RULES) - {"muon", "aurora", "adamw"}
STEPS, ROWS = 20, 12
pytestmark = pytest.mark.filterwarnings("ignore:PolarGrad")


def train(
    rule: str, rank: int, ranks: int, dtype: torch.dtype, steps: int, is_compiled: bool = False
) -> dict[str, Any]:
    """The weights after some steps on this rank's share of the rows, and how many numbers the rank held."""
    torch.manual_seed(0)
    model = GPT(MODEL, dtype)
    machine = Machine(rank, ranks, torch.device("cpu"), dtype, ())
    place(model, model.blocks, machine, is_sharded=True)
    compiled = compile_model(model, by_block=True, backend="aot_eager") if is_compiled else model
    config = OptimizerConfig(matrix_optimizer=rule, adam_eps=1e-3, **SHORT)
    optimizers = optim.build_optimizers(model, config)
    generator = torch.Generator().manual_seed(1)
    gathered_as = set()
    model.blocks[0].register_forward_pre_hook(lambda block, _: gathered_as.add(block.mlp.down.dtype))
    held: dict[str, int] = {}
    for _ in range(steps):
        tokens = torch.randint(60, (ROWS, 9), generator=generator)[rank * ROWS // ranks : (rank + 1) * ROWS // ranks]
        loss = compiled(tokens[:, :-1], tokens[:, 1:].contiguous())
        (loss / (ROWS // ranks * 8)).backward()
        params = list(model.parameters())
        held["gradients"] = sum(local(p.grad).numel() for p in params)
        norm = optim.clip_gradients(optimizers, 5.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    banks = [bank for bank, _ in getattr(optimizers[0], "_banks", [])]
    held["weights"] = sum(local(p).numel() for p in params)
    held["momentum"] = sum(bank.state["momentum_buffer"].numel() for bank in banks)
    adam = [entry["exp_avg"] for optimizer in optimizers[len(optimizers) - 1 - (rule == "adamw") :]
            for entry in optimizer.state.values()]  # fmt: skip
    held["adam"] = sum(local(moment).numel() for moment in adam)
    with unsharded(model):
        sample = [*generate(model, [1, 2, 3], 5, torch.Generator().manual_seed(2))]
    weights = gathered(dict(model.state_dict()))
    return dict(weights=weights, norm=norm, held=held, gathered_as=gathered_as, sample=sample)


def worker(rank: int, folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.save(trained(rank, ranks), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def trained(rank: int, ranks: int) -> dict[str, Any]:
    out = {}
    with mock.patch("optim.matrix_optimizer.fast_half_dtype", lambda device_type: torch.float32):
        for rule in RULES:
            if ranks in (2, 4) and rule in AT_3_RANKS_ALONE:
                continue
            with float64():
                out[rule] = train(rule, rank, ranks, torch.float64, STEPS)
        out["bfloat16"] = train("muon", rank, ranks, torch.bfloat16, 5)
        if ranks == 1:
            out["eager"] = train("adamw", rank, ranks, torch.float32, 3)
        if ranks == 2:
            out["compiled"] = train("adamw", rank, ranks, torch.float32, 3, is_compiled=True)
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, list[dict[str, Any]]]]:
    found = {1: [trained(0, 1)]}
    preload = [__name__, "torch._dynamo", "torch.distributed.fsdp"]
    mp.get_context("forkserver").set_forkserver_preload(preload)  # loaded once, not by every rank
    for ranks in (2, 3, 4):
        folder = tmp_path_factory.mktemp("ranks")
        with mock.patch.dict(os.environ, {"PYTHONWARNINGS": "ignore"}):
            mp.start_processes(worker, (str(folder), ranks), ranks, start_method="forkserver")  # type: ignore[no-untyped-call]
        found[ranks] = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    yield found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "ranks"), [(rule, n) for rule in RULES for n in ([3] if rule in AT_3_RANKS_ALONE else [2, 3, 4])]
)
def test_any_number_of_ranks_is_one_process(results: dict[int, Any], rule: str, ranks: int) -> None:
    expected = results[1][0][rule]
    for found in (result[rule] for result in results[ranks]):
        assert found["norm"] == pytest.approx(float(expected["norm"]), rel=1e-8)
        for name, weight in expected["weights"].items():
            assert weight.dtype == torch.float64
            assert found["sample"] == expected["sample"]
            assert (found["weights"][name] - weight).abs().max() < 1e-8 * weight.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_rank_holds_its_share(results: dict[int, Any], ranks: int) -> None:
    """Weights, gradients and Adam's state in shards, of which the first are the longest; momentum by owners."""
    with torch.device("meta"):
        model = GPT(MODEL)
    (muon, _), params = optim.build_optimizers(model, OptimizerConfig(matrix_optimizer="muon")), [*model.parameters()]
    assert isinstance(muon, optim.MatrixOptimizer)
    momentum = sum(bank.num_slots * bank.m * bank.n for bank, _ in muon.plan_banks(0, ranks))
    for rank, result in enumerate(results[ranks]):
        share = sum(sum(map(len, flat_ranges(p.shape, cut_dim(p, ranks), rank, ranks))) for p in params)
        whole, held = results[1][0]["muon"]["held"], result["muon"]["held"]
        assert held["weights"] == held["gradients"] == share
        assert share < 1.2 * whole["weights"] / ranks
        assert result["adamw"]["held"]["adam"] == share
        assert held["momentum"] == momentum


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_blocks_are_gathered_in_the_dtype_of_products(results: dict[int, Any], ranks: int) -> None:
    alone = results[1][0]["bfloat16"]
    for found in (result["bfloat16"] for result in results[ranks]):
        assert (alone["gathered_as"], found["gathered_as"]) == ({torch.float32}, {torch.bfloat16})
        for name, weight in alone["weights"].items():
            assert found["weights"][name].dtype == torch.float32
            if name.startswith("blocks"):  # a scale that starts at zero is mostly rounding
                assert (found["weights"][name] - weight).norm() < 0.05 * weight.norm()


@pytest.mark.slow
def test_blocks_may_be_compiled(results: dict[int, Any]) -> None:
    alone = results[1][0]["eager"]["weights"]
    for found in (result["compiled"]["weights"] for result in results[2]):
        assert found.keys() == alone.keys()
        for name, weight in alone.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5 * float(weight.abs().max()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--neuron_stats=5"], ["neuron_stats = 5 needs whole weights", "fsdp = false"]),
        (["--ngrams=2", "--ngram_sparse=true"], ["ngram_sparse = true makes sparse ones", "set one to false"]),
        (["--compile", "--compile_blocks=false"], ["compile_blocks = false", "leave it on"]),
    ],
)
def test_settings_that_do_not_go_with_shards(tiny_recipe: Path, settings: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        load_config([str(tiny_recipe), "--fsdp", *settings])
    assert all(word in str(refusal.value) for word in words)


EVERYTHING = (
    "--fsdp", "--micro_batch_tokens=32", "--checkpoint_every=20", "--checkpoint_async", "--average_steps=5",
    "--lookahead=0.2", "--adamw_cautious", "--weight_decay=0.1", "--grad_clip=1", "--update_floor=0.1", "--window=8",
    "--tie_head_steps=30", "--embed_lr=0.01", "--head_lr=0.01", "--tokenizer=byte", "--vocab_size=257",
    "--polar_method=svd",  # exact on every machine
)  # fmt: skip


@pytest.mark.slow
def test_a_run_in_shards_is_the_run_of_one_process_and_each_goes_on_from_the_other(
    trainer: Trainer, tiny_recipe: Path, tmp_path: Path
) -> None:
    """`fsdp` on one rank shards nothing."""

    def run(name: str, ranks: int, *arguments: str) -> Path:
        words = [*EVERYTHING, *arguments, f"--run_dir={tmp_path / name}"]
        result = trainer(*words) if ranks == 1 else python(torchrun(ranks), tiny_recipe, *words)
        assert result.returncode == 0, result.stderr
        (directory,) = (tmp_path / name).iterdir()
        return directory

    alone, shards = run("alone", 1), run("shards", 3)
    from_shards = run("from_shards", 1, f"--resume={shards / 'checkpoint_000020.pt'}")
    from_alone = run("from_alone", 2, f"--resume={alone / 'checkpoint_000020.pt'}")
    expected = metrics(alone, "val_loss")
    assert expected[40] < 0.9 * expected[0]
    for directory in (shards, from_shards, from_alone):
        assert metrics(directory, "val_loss") == pytest.approx(expected, rel=1e-4)
    ours, theirs = (read_checkpoint(each / "checkpoint_000040.pt") for each in (shards, alone))
    assert ours["model"].keys() == theirs["model"].keys()
    assert [*ours["average"]] == [*theirs["average"]]
    for name, weight in theirs["model"].items():
        assert (ours["model"][name] - weight).norm() < 1e-3 * weight.norm()


def test_a_rank_lost_while_a_sample_is_made_leaves_the_run_complete(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: Any) -> str:
        raise RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")

    monkeypatch.setattr("train_gpt.sample_text", lose)
    result = trainer("--fsdp", "--tokenizer=byte", "--vocab_size=257", "--train_steps=1")
    assert (result.returncode, result.stderr) == (0, "")
    assert "sample" not in result.stdout
