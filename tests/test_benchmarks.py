"""The benchmarks of training: shares of a step add up, ratios are against what they name."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import neuron_stats, optimizer_step, report, train_step
from neuron_stats import NeuronStats


@pytest.mark.slow
def test_shares_of_a_step_add_up_and_the_loop_costs_little(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    train_step.main(train_step.Args(str(tiny_recipe), ("adamw", "muon"), rounds=3, steps=4))
    (path,) = tmp_path.glob("train_step_*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["matrix_optimizer"] for row in rows] == ["adamw", "muon"]
    assert rows[0]["ratio"] == 1
    for row in rows:
        shares = {name: value for name, value in row.items() if name.endswith("_%")}
        assert sum(shares.values()) == pytest.approx(100)
        assert shares["backward_%"] > shares["loader_%"]
        assert row["tokens_per_s"] == pytest.approx(192 / (row["step_ms"] / 1e3))


def test_optimizer_steps_are_compared_with_adamw_and_muon(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rules = ("adamw", "torch.optim.Muon", "muon", "aurora release", "riemannian_aurora")
    optimizer_step.main(optimizer_step.Args(str(tiny_recipe), rules, rounds=3, tokens=64, device="cpu"))
    (path,) = tmp_path.glob("optimizer_step_*.json")
    rows = {row["rule"]: row for row in json.loads(path.read_text())["rows"]}
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
    (row,) = json.loads(path.read_text())["rows"]
    assert row["look_ms"] > 200 > row["step_ms"]
    assert row["cost_%"] == pytest.approx(100 * row["look_ms"] / (50 * row["step_ms"]))
