"""The row-norm experiment: it measures what it says, and goes on where it stopped."""

import json
from pathlib import Path

import pytest
import torch

from experiments import row_norms


def test_spread_is_zero_for_equal_rows_and_known_for_unequal_ones() -> None:
    equal = torch.ones(2, 6, 3)
    assert row_norms.spread(equal).tolist() == [0, 0]
    unequal = equal * torch.tensor([1.0, 1, 1, 3, 3, 3])[:, None]
    expected = torch.tensor([1.0, 1, 1, 3, 3, 3]).std() / 2
    torch.testing.assert_close(row_norms.spread(unequal.mT), expected.expand(2))


def test_cells_are_run_once_and_tabled(tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(tiny_recipe), "--out", str(tmp_path / "out.json"), "--every=4", "--seeds", "0"]
    command += ["--cell", "matrix_optimizer=muon", "--cell", "matrix_optimizer=aurora", "polar_method=simple_quintic"]
    assert row_norms.main(command) == 0
    first = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [run["status"] for run in first] == ["finished", "finished"]
    muon, aurora = (run["spreads"]["tall"] for run in first)
    assert len(muon) == len(aurora) == 40 / 4 - 1  # the first update of a new model is zero
    assert sum(aurora) < 0.5 * sum(muon)
    assert capsys.readouterr().out.count("matrix_optimizer") == 2
    (tmp_path / "out.json").write_text(json.dumps(first[:1]), encoding="utf-8")
    assert row_norms.main(command) == 0
    again = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert again[0] == first[0]
    assert again[1]["val_loss"] == first[1]["val_loss"]


def test_a_run_that_was_stopped_is_no_result(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trainer catches the stop for its summary."""
    monkeypatch.setattr(row_norms, "train", lambda *_: dict(status="interrupted", val_loss=1.0, steps=3))
    command = [str(tiny_recipe), "--cell", "matrix_optimizer=muon", "--out", str(tmp_path / "out.json")]
    assert row_norms.main(command) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command goes on from here\n")
    assert not (tmp_path / "out.json").exists()


def test_an_optimizer_without_polar_factor_is_refused(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tiny_recipe), "--cell", "matrix_optimizer=adamw", "--out", str(tmp_path / "out.json")]
    assert row_norms.main(command) == 2
    assert "has no polar factor" in capsys.readouterr().err
