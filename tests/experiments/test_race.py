"""The race: equal training time within a limit, and times to a target."""

import dataclasses
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

import train_gpt
from experiments import arms, race
from tests.clock import FakeClock
from train_gpt import Run


def test_the_time_to_a_target_is_where_a_line_crosses_it() -> None:
    losses = [(0, 0.0, 4.0), (10, 5.0, 3.0), (20, 9.0, 2.0), (30, 14.0, 2.5)]
    assert [race.seconds_to(target, losses) for target in (3.5, 3.0, 2.25, 1.9)] == [2.5, 5.0, 8.0, None]


@pytest.mark.slow
def test_a_race_trains_each_for_the_same_seconds_and_ends_in_time(
    tiny_recipe: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    """From compressed shards; the first run is the baseline. A step of AdamW takes 1/8 s and one of Muon 1/4, so that
    Muon's 40 steps, its recipe's, are 10 s, in which AdamW does 80."""
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path / "results"))
    train_step, evaluate = train_gpt.train_step, train_gpt.evaluate

    def step(run: Run, *batch: Any) -> Any:
        clock.now += 1 / 8 if run.config.matrix_optimizer == "adamw" else 1 / 4
        return train_step(run, *batch)

    for timing, timing_of_validation in ((train_gpt, train_gpt), (arms, race)):
        monkeypatch.setattr(timing, "train_step", step)
        monkeypatch.setattr(timing_of_validation, "evaluate", clock.during(1 / 16, evaluate))
    (tmp_path / "packed").mkdir()
    for path in tiny_data.glob("*.bin"):
        (tmp_path / "packed" / f"{path.name}.xz").write_bytes(lzma.compress(path.read_bytes()))
    settings = ("softcaps=1",)
    arguments = race.Args(
        (str(tiny_recipe),), ("adamw", "muon"), seconds=40, data=str(tmp_path / "packed"), folder=str(tmp_path / "race")
    )
    with pytest.raises(ValueError, match="softcaps is not a setting"):
        race.main(dataclasses.replace(arguments, set=settings))
    started = clock.now
    race.main(arguments)
    assert clock.now - started < 40
    (path,) = (tmp_path / "results").glob("race_*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    adamw, muon = content["rows"]
    assert (adamw["train_time_s"], adamw["steps"]) == (10, 80)
    assert (muon["train_time_s"], muon["steps"]) == (10, 40)
    assert max(adamw["val_loss"], muon["val_loss"]) <= content["settings"]["target_loss"]
    assert all(0 < row["time_to_target_s"] <= row["train_time_s"] for row in (adamw, muon))
    assert adamw["speedup"] == 1
    assert len(content["settings"]["curves"]["muon"]) > race.VALIDATIONS
    assert path.with_suffix(".png").exists()
    with pytest.raises(ValueError, match="too few for 2 runs of 24 steps or more"):
        race.main(dataclasses.replace(arguments, seconds=1))
