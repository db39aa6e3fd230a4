"""Curves kept from a sweep are those of its runs, and are drawn again from the JSON alone."""

import json
from pathlib import Path

import pytest

from experiments.curves import main
from experiments.sweep import Result, run_sweep
from tests.test_train import metrics


@pytest.fixture
def results(tiny_recipe: Path, tmp_path: Path) -> list[Result]:
    cells = [{"matrix_optimizer": "muon"}, {"matrix_optimizer": "adamw"}]
    return run_sweep(str(tiny_recipe), cells, [0, 1], tmp_path / "sweep", fixed={"train_steps": "20"})


def test_curves_are_kept_and_drawn(results: list[Result], tmp_path: Path) -> None:
    kept = tmp_path / "new" / "kept.json"
    assert main([str(tmp_path / "sweep"), f"--out={kept}"]) == 0
    record = json.loads(kept.read_text(encoding="utf-8"))
    assert len(record["runs"]) == len(results) == 4
    for run, result in zip(record["runs"], results, strict=True):
        assert (run["overrides"], run["seed"]) == (result.overrides, result.seed)
        assert {step: loss for step, _, loss in run["curve"]} == metrics(Path(result.directory), "val_loss")
        assert run["curve"][-1][1] == pytest.approx(run["summary"]["train_time_s"], abs=1e-3)
    figure = kept.with_suffix(".png")
    assert figure.read_bytes().startswith(b"\x89PNG")
    figure.unlink()
    assert main([str(kept)]) == 0
    assert figure.exists()


def test_what_cannot_be_drawn_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "--out" in capsys.readouterr().err
    assert main([str(tmp_path / "missing.json")]) == 2
    assert "missing.json" in capsys.readouterr().err
