"""The benchmarks of training: shares of a step add up, ratios are against what they name."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import neuron_stats, optimizer_step, readme, report, train_step
from neuron_stats import NeuronStats
from tests.conftest import Trainer


@pytest.mark.slow
def test_shares_of_a_step_add_up_and_the_loop_costs_little(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rows = timed(train_step.Args(str(tiny_recipe), ("adamw", "muon"), rounds=3, steps=4), tmp_path)["rows"]
    assert [row["matrix_optimizer"] for row in rows] == ["adamw", "muon"]
    assert rows[0]["ratio"] == 1
    for row in rows:
        shares = {name: value for name, value in row.items() if name.endswith("_%")}
        assert sum(shares.values()) == pytest.approx(100)
        assert shares["backward_%"] > shares["loader_%"]
        assert row["tokens_per_s"] == pytest.approx(192 / (row["step_ms"] / 1e3))


def timed(arguments: train_step.Args, folder: Path) -> dict[str, Any]:
    assert train_step.main(arguments) == 0
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
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose first call sleeps, as one that is compiled, is as fast as the other."""
    genuine = train_step.set_up

    def slow_at_first(*arguments: Any) -> Any:
        run = genuine(*arguments)
        calls, model = [], run.model

        def compiled(*tensors: Any) -> Any:
            calls.append(time.sleep(0 if calls or run.config.num_layers == 2 else 1))
            return model(*tensors)

        run.compiled = compiled
        return run

    monkeypatch.setattr(train_step, "set_up", slow_at_first)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    variants = ("plain", "compiled: num_layers=1")
    arguments = train_step.Args(str(tiny_recipe), ("adamw",), variants, rounds=99, steps=1, max_seconds=1.5)
    result = timed(arguments, tmp_path)
    assert all(row["step_ms"] < 500 for row in result["rows"])
    assert 1 <= result["settings"]["rounds_done"] < 99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(variants=("plain", "fused: fused")), "variant fused: 'fused' is not key=value; try compile=true"),
        (dict(variants=("compile=true",)), "variant 'compile=true' has no name of its own"),
        (dict(variants=("a", "a")), "variant 'a' has no name of its own"),
        (dict(variants=("a: trian_steps=3",)), "trian_steps is not a setting; did you mean train_steps?"),
        (dict(set=("seed=3",)), "--set: seed is this benchmark's own to set"),
        (dict(rounds=0), "rounds and steps must be 1 or more"),
        (dict(variants=("a: head_lr=1e20 weight_decay=1e20",)), "a muon: diverged by step 1: the gradient of"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    changes: dict[str, Any], message: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    arguments = dict(recipe=str(tiny_recipe), matrix_optimizers=("muon",), rounds=1, steps=3)
    assert train_step.main(train_step.Args(**(arguments | changes))) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_readme_says_what_a_row_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"variant": "fused", "matrix_optimizer": "muon", "tokens_per_s": 5e5, "ratio": 1.5, "MFU": 0.5, "loader_%": 1}
    settings = dict(recipe="r.toml", set=["batch_tokens=64", "train_files=x"], variants=["fused: fused_mlp=true"])
    result = dict(device="a GPU", settings=settings, rows=[row | {"peak_mib": "", "loss_diff": 0.001}])
    (tmp_path / "train_step_124m_a-gpu.json").write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.train_step_section().splitlines() == [
        'a GPU, `r.toml`; `batch_tokens=64`; `"fused: fused_mlp=true"`:',
        "",
        "| variant | matrix optimizer | tokens/s | of the first's | MFU | losses differ by | loader % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| fused | muon | 500,000 | 1.5 | 0.5 | 0.001 | 1 |",
    ]


def test_optimizer_steps_are_compared_with_adamw_and_muon(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rules = ("adamw", "torch.optim.Muon", "muon", "aurora release", "riemannian_aurora")
    optimizer_step.main(optimizer_step.Args(str(tiny_recipe), rules, rounds=3, tokens=64, device="cpu"))
    (path,) = tmp_path.glob("optimizer_step_*.json")
    rows = {row["rule"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    assert tuple(rows) == rules
    assert rows["adamw"]["step_over_adamw"] == rows["muon"]["matrices_over_muon"] == 1
    assert rows["riemannian_aurora"]["matrices_over_muon"] > 3
    assert all(0 < row["share_%"] < 100 for row in rows.values())


def test_a_look_at_neurons_is_timed_beside_its_step(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that sleeps costs what it sleeps, and the step beside it does not."""
    genuine = neuron_stats.NeuronStats.look

    def slow(stats: NeuronStats, *arguments: Any) -> Any:
        time.sleep(0.2)
        return genuine(stats, *arguments)

    monkeypatch.setattr(neuron_stats.NeuronStats, "look", slow)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    neuron_stats.main(neuron_stats.Args(str(tiny_recipe), steps=3, every=50))
    (path,) = tmp_path.glob("neuron_stats_*.json")
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert row["look_ms"] > 200 > row["step_ms"]
    assert row["cost_%"] == pytest.approx(100 * row["look_ms"] / (50 * row["step_ms"]))
