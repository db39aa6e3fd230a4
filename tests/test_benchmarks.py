"""The training-step benchmark: its shares are of the real loop and add up."""

import json
from pathlib import Path

import pytest

from benchmarks import report, train_step


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
        assert sum(shares.values()) == pytest.approx(100, abs=10)  # medians of shares, not shares of one turn
        assert shares["backward_%"] > shares["loader_%"]
        assert row["tokens_per_s"] == pytest.approx(192 / (row["step_ms"] / 1e3))
