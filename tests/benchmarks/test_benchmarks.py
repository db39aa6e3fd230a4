"""The benchmarks of training: shares of a step add up, ratios are against what they name."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt
from benchmarks import compile_time, loader_speed, neuron_stats_cost, optimizer_step, sample_speed, train_step
from docs import generate
from harness import results
from harness.neuron_stats import NeuronStats
from harness.results import command
from tests.clock import FakeClock
from tests.conftest import Trainer


def test_shares_of_a_step_are_those_of_the_clock(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    """A batch takes 1 ms, a forward pass 2, a backward pass 3, an optimizer's step 2 or 6, and the loop 1."""
    genuine, seconds = train_step.set_up, {"adamw": 2e-3, "muon": 6e-3}

    def slowed(*arguments: Any) -> Any:
        run = genuine(*arguments)
        run.loader.batch = clock.during(1e-3, run.loader.batch)
        run.compiled = clock.during(2e-3, run.compiled)
        run.optimizers[0].step = clock.during(seconds[run.config.matrix_optimizer], run.optimizers[0].step)
        return run

    monkeypatch.setattr(train_step, "set_up", slowed)
    monkeypatch.setattr(torch.Tensor, "backward", clock.during(3e-3, torch.Tensor.backward))
    monkeypatch.setattr(train_gpt.Run, "batch", clock.during(1e-3, train_gpt.Run.batch))
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    rows = timed(train_step.Args(str(tiny_recipe), ("adamw", "muon"), rounds=2, steps=4), tmp_path)["rows"]
    assert [row["matrix_optimizer"] for row in rows] == ["adamw", "muon"]
    for row, step_ms in zip(rows, (9, 13), strict=True):
        shares = {name: value for name, value in row.items() if name.endswith("_%")}
        parts = dict(loader=1, forward=2, backward=3, optimizer=step_ms - 7, logging=0, loop=1)
        assert shares == pytest.approx({f"{name}_%": 100 * part / step_ms for name, part in parts.items()})
        assert row["step_ms"] == pytest.approx(step_ms)
        assert row["tokens_per_s"] == pytest.approx(192 / (step_ms / 1e3))
        assert row["ratio"] == pytest.approx(9 / step_ms)


def timed(arguments: train_step.Args, folder: Path) -> dict[str, Any]:
    train_step.main(arguments)
    (path,) = folder.glob(f"train_step_{arguments.label}*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_variants_are_compared_from_the_same_weights_on_the_same_batches(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: Trainer
) -> None:
    """The micro-batch changes no loss but by rounding; another learning rate does."""
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path / "results"))
    variants = ("plain", "cut: micro_batch_tokens=96", "other: matrix_lr=0.04 adam_betas=0.9:0.95")
    arguments = train_step.Args(
        str(tiny_recipe), ("adamw", "muon"), variants, set=("softcap=20",), rounds=1, steps=3, label="cut"
    )
    result = timed(arguments, tmp_path / "results")
    rows = {(row["variant"], row["matrix_optimizer"]): row for row in result["rows"]}
    assert list(rows) == [(name, rule) for name in ("plain", "cut", "other") for rule in ("adamw", "muon")]
    assert rows["plain", "adamw"]["ratio"] == 1
    for rule in ("adamw", "muon"):
        assert rows["plain", rule]["loss_diff"] == 0
        assert rows["cut", rule]["loss_diff"] < 1e-4
        assert rows["other", rule]["loss_diff"] > 1e-3
    losses = result["settings"]["losses"]["plain muon"]
    assert trainer("--softcap=20", "--matrix_optimizer=muon", "--train_steps=3", "--log_every=1").returncode == 0
    (metrics,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    own = [json.loads(line).get("train_loss") for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert losses[:3] == pytest.approx([loss for loss in own if loss])
    assert len(losses) == 6 and losses[3] < losses[0]  # the same batches again, one turn later


def test_only_the_first_turn_takes_what_comes_once(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    """A model whose first call takes 100 s, as one that is compiled, is as fast as the other. No round begins that
    would end after --max_seconds by what the last one took: of 2 ms each, from 100.001 s on, four."""
    genuine = train_step.set_up

    def slow_at_first(*arguments: Any) -> Any:
        run = genuine(*arguments)
        waits = [] if run.config.num_layers == 2 else [100.0]

        def compiled(*tensors: Any) -> Any:
            clock.now += waits.pop() if waits else 1e-3
            return run.model(*tensors)

        run.compiled = compiled
        return run

    monkeypatch.setattr(train_step, "set_up", slow_at_first)
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    variants = ("plain", "compiled: num_layers=1")
    arguments = train_step.Args(str(tiny_recipe), ("adamw",), variants, rounds=99, steps=1, max_seconds=100.01)
    result = timed(arguments, tmp_path)
    assert [row["step_ms"] for row in result["rows"]] == pytest.approx([1, 1])
    assert result["settings"]["rounds_done"] == 4


def test_a_stop_ends_a_benchmark_as_one(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trainer catches it for its summary; it is no mistake of the arguments."""
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train_step", str(tiny_recipe), "--rounds=1", "--steps=2"])
    monkeypatch.setattr(train_gpt.Run, "follow", raising(KeyboardInterrupt))
    with pytest.raises(SystemExit, match="130"):
        command(train_step.main, train_step.Args, "")
    assert capsys.readouterr().err.endswith("interrupted; nothing was written; the same command starts again\n")
    assert not list(tmp_path.iterdir())


def raising(error: type[BaseException]) -> Any:
    def function(*_: Any) -> None:
        raise error

    return function


def test_a_folder_for_results_is_asked_for_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path / "file/results"))
    monkeypatch.setattr(sys, "argv", ["loader"])
    with pytest.raises(SystemExit, match="2"):
        command(raising(AssertionError), loader_speed.Args, "")
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/file/results cannot be written (Not a directory); BENCHMARK_RESULTS=/tmp/results chooses "
        "another folder\n"
    )


def test_the_results_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BENCHMARK_RESULTS", "~/results")
    assert results.results_folder() == tmp_path / "results"
    monkeypatch.setenv("BENCHMARK_RESULTS", "")
    assert results.results_folder() == results.RESULTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(variants=("plain", "fused: fused")), "variant fused: 'fused' is not key=value with a new key"),
        (dict(variants=("compile=true",)), "variant 'compile=true' has no name of its own"),
        (dict(variants=("a", "a")), "variant 'a' has no name of its own"),
        (dict(variants=("a: trian_steps=3",)), "trian_steps is not a setting; did you mean train_steps?"),
        (dict(set=("seed=3",)), "--set: seed is set by this command itself; leave it out"),
        (dict(variants=()), "there must be an optimizer and a variant"),
        (dict(variants=("a: head_lr=1e20 weight_decay=1e20",)), "a muon: diverged by step 1: the gradient of"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    changes: dict[str, Any], message: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    arguments = dict(recipe=str(tiny_recipe), matrix_optimizers=("muon",), rounds=1, steps=3)
    with pytest.raises(ValueError, match=re.escape(message)):
        train_step.main(train_step.Args(**(arguments | changes)))
    assert not list(tmp_path.iterdir())


def test_a_generated_table_says_what_a_row_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"variant": "fused", "matrix_optimizer": "muon", "tokens_per_s": 5e5, "ratio": 1.5, "MFU": 0.5, "loader_%": 1}
    settings = dict(recipe="r.toml", set=["batch_tokens=64", "train_files=x"], variants=["fused: fused=mlp"])
    result = dict(device="a GPU", settings=settings, rows=[row | {"peak_mib": "", "loss_diff": 0.001}])
    (tmp_path / "train_step_124m_a-gpu.json").write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(generate, "RESULTS", tmp_path)
    assert generate.train_step_section().splitlines() == [
        'a GPU, `r.toml`; `batch_tokens=64`; `"fused: fused=mlp"`:',
        "",
        "| variant | matrix optimizer | tokens/s | of the first's | MFU | losses differ by | loader % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| fused | muon | 500,000 | 1.5 | 0.5 | 0.001 | 1 |",
    ]


class Operations(TorchDispatchMode):
    """Moves a clock by a second for each operation of torch: what is more work takes longer, on every machine alike."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.clock = clock

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.clock.now += 1
        return function(*args, **(kwargs or {}))


def test_optimizer_steps_are_compared_with_adamw_and_muon(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    rules = ("adamw", "torch.optim.Muon", "muon", "aurora release", "riemannian_aurora")
    with Operations(clock):
        optimizer_step.main(optimizer_step.Args(str(tiny_recipe), rules, rounds=3, tokens=64, device="cpu"))
    (path,) = tmp_path.glob("optimizer_step_*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = {row["rule"]: row for row in content["rows"]}
    assert tuple(rows) == rules
    assert rows["adamw"]["step_over_adamw"] == rows["muon"]["matrices_over_muon"] == 1
    assert rows["riemannian_aurora"]["matrices_over_muon"] > 3  # 3 outer steps, each with a polar factor and more
    batch_ms = content["settings"]["forward_backward_ms"] * 192 / 64
    for row in rows.values():
        rest_ms = row["step_ms"] - row["matrices_ms"]
        assert rest_ms == rows["muon"]["step_ms"] - rows["muon"]["matrices_ms"] > 0
        assert row["share_%"] == pytest.approx(100 * row["step_ms"] / (row["step_ms"] + batch_ms))
        assert row["matrices_over_torch.optim.Muon"] == row["matrices_ms"] / rows["torch.optim.Muon"]["matrices_ms"]


def test_steps_are_timed_as_cuda_graphs_too(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    args = optimizer_step.Args(str(tiny_recipe), ("adamw", "muon"), 2, tokens=64, graphs=True, device="cpu")
    with pytest.raises(ValueError, match="needs a GPU"):
        optimizer_step.main(args)
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(optimizer_step, "graphed", lambda step: clock.during(0.25, lambda: None))
    with Operations(clock):
        optimizer_step.main(args)
    (path,) = tmp_path.glob("optimizer_graphs_*.json")
    assert [row["graph_ms"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]] == ["", 250.0]


def test_neuron_statistics_are_timed_beside_their_step(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    """200 ms after the step and 10 before it, and a step of 50."""
    for method, seconds in (("measure", 0.2), ("before_step", 0.01)):
        monkeypatch.setattr(NeuronStats, method, clock.during(seconds, getattr(NeuronStats, method)))
    monkeypatch.setattr(neuron_stats_cost, "train_step", clock.during(0.05, neuron_stats_cost.train_step))
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    neuron_stats_cost.main(neuron_stats_cost.Args(str(tiny_recipe), steps=3, every=10))
    (path,) = tmp_path.glob("neuron_stats_*.json")
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert (row["look_ms"], row["step_ms"]) == pytest.approx((210, 50))
    assert row["cost_%"] == pytest.approx(100 * 4 * 210 / (40 * 50))  # the last look is timed apart


def test_sampling_is_timed_with_and_without_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    """9 tokens in 0.1 s and in 0.3 s, the same ones."""
    monkeypatch.setattr(sample_speed, "cached", clock.during(0.1, sample_speed.cached))
    monkeypatch.setattr(sample_speed, "uncached", clock.during(0.3, sample_speed.uncached))
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    sample_speed.main(sample_speed.Args("configs/sotu_base.toml", lengths=(10,), turns=2))
    (path,) = tmp_path.glob("sample_speed_sotu_base_*.json")
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert (row["kept_tokens_per_s"], row["ratio"]) == pytest.approx((90, 3))
    assert row["equal"] == "9 of 9"
    with pytest.raises(ValueError, match="lengths = 300 must be from 2 to seq_len = 256"):
        sample_speed.main(sample_speed.Args("configs/sotu_base.toml", lengths=(300,)))


def test_compile_time_is_compared_with_the_whole_models(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    """A pass takes 4 ms as one graph and 2 by block, whose first one takes 9 s; a wrong one is refused."""
    factor = 1.0

    def compile_model(model: Any, by_block: bool) -> Any:
        if by_block:
            clock.now += 9
        return clock.during(2e-3 if by_block else 4e-3, lambda *arguments: factor * model(*arguments))

    monkeypatch.setattr(compile_time, "compile_model", compile_model)
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    compile_time.main(compile_time.Args(str(tiny_recipe), rounds=2, passes=3))
    (path,) = tmp_path.glob("compile_time_*.json")
    whole, blocks = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert (whole["compiled"], blocks["compiled"]) == ("whole", "blocks")
    assert (whole["first_s"], whole["pass_ms"], whole["pass_ms_ratio"]) == pytest.approx((8e-3, 4, 1))
    assert (blocks["cached_s"], blocks["pass_ms"], blocks["pass_ms_ratio"]) == pytest.approx((9.004, 2, 0.5))
    factor = 1.01
    with pytest.raises(ValueError, match=r"compiled whole, the loss differs by 0\.01"):
        compile_time.main(compile_time.Args(str(tiny_recipe), rounds=1))
