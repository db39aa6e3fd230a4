"""Options against the plain model for equal time: schedules, statistics, what is run and what is told."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments import arms
from experiments import options as experiment
from experiments.options import ARMS, Options, arm_settings, main, step_seconds, summary
from experiments.sweep import Cell, Result
from tests.clock import FakeClock
from tests.conftest import TINY_VOCAB
from train_gpt import Config


def test_shares_of_a_schedule_become_steps_of_the_arms_own() -> None:
    assert arm_settings(ARMS["tie_head"], 300) == dict(
        train_steps="300", val_every="300", tie_head_steps="200", embed_lr="0.004"
    )
    assert arm_settings(ARMS["small_batch"], 501)["small_batch_steps"] == "250"


def test_every_arm_sets_what_the_trainer_knows() -> None:
    assert {key for arm in ARMS.values() for key in arm} | experiment.FIXED.keys() <= set(Config.__dataclass_fields__)


def result(**losses: list[float | None]) -> dict[str, Any]:
    arms = [dict(arm=name, sets={}, step_s=0.1, steps=100, val_loss=values) for name, values in losses.items()]
    return dict(arms=arms)


def test_the_table_says_what_pays_costs_and_cannot_be_told() -> None:
    rows = summary(
        result(
            worse=[1.31, 1.32, 1.33], plain=[1.21, 1.22, 1.23], better=[1.11, 1.121, 1.13], same=[1.2, 1.23, 1.22],
            broken=[1.1, None, 1.2], alone=[1.202, 1.205, 1.22],
        )
    )  # fmt: skip
    assert [(row["option"], row["pays"]) for row in rows] == [
        ("plain", ""), ("better", "yes"), ("alone", "cannot tell"), ("same", "cannot tell"), ("worse", "costs"),
        ("broken", "no"),
    ]  # fmt: skip
    assert rows[1]["difference"] == "-0.0997"
    assert (rows[2]["p"], rows[2]["p (Holm)"]) == ("0.034", "0.068")  # its interval alone does not hold zero
    assert rows[0]["final loss"] == "1.2200 ± 0.0100"
    assert rows[5]["final loss"] == "diverged"


def test_nothing_can_be_told_from_a_plain_model_that_diverged() -> None:
    rows = summary(result(plain=[1.2, None], other=[1.1, 1.2]))
    assert [(row["final loss"], row["pays"]) for row in rows] == [("diverged", ""), ("1.1500 ± 0.0707", "cannot tell")]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No real steps or runs: arms take their place in ARMS + 1 tenths of a second, losses are of arm and seed."""
    calls: list[Any] = []

    def timed(options: Options, arms: Sequence[str], steps: int) -> dict[str, float]:
        calls.append(("timing", list(arms), steps))
        return {arm: 0.1 * (1 + index) for index, arm in enumerate(arms)}

    def sweep(recipe: str, cells: list[Cell], seeds: list[int], out: Path, jobs: int, fixed: Cell) -> list[Result]:
        calls.append(("runs", [cell["train_steps"] for cell in cells], list(seeds), jobs))
        same = dict(status="finished", device="a machine")
        return [
            Result(cell, seed, jobs, 1, "", same | dict(val_loss=1 + seed + 0.1 * index))
            for seed in seeds
            for index, cell in enumerate(cells)
        ]

    monkeypatch.setattr(experiment, "step_seconds", timed)
    monkeypatch.setattr(arms, "run_sweep", sweep)
    return calls


def test_arms_get_the_steps_that_fit_into_the_plain_ones_time(
    fake: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--arms", "ngrams", "short_rows", "--seeds", "3", "4", "--steps", "600", "--jobs", "2", "--yes"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert fake == [("timing", ["plain", "ngrams", "short_rows"], 600), ("runs", ["600", "300", "200"], [3, 4], 2)]
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert [arm["val_loss"] for arm in found["arms"]] == [[4, 5], [4.1, 5.1], [4.2, 5.2]]
    assert found["arms"][2]["sets"]["short_row_steps"] == "100"
    assert found["device"] == "a machine"
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert [call[0] for call in fake] == ["timing", "runs", "runs"]  # started again: the same schedules
    capsys.readouterr()
    assert main(["--table", str(tmp_path / "result.json")]) == 0
    assert "ngrams" in capsys.readouterr().out


def test_ideas_are_arms_of_their_own(fake: list[Any], tmp_path: Path) -> None:
    command = [
        "--arms",
        "plain",
        "--ideas",
        "wide: model_dim=96 num_heads=3",
        "rate: embed_lr=0.05",
        "--seeds",
        "1",
        "--yes",
    ]
    assert main([*command, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert [arm["arm"] for arm in found["arms"]] == ["plain", "wide", "rate"]
    again = ["--arms", "plain", "--ideas", "wide: model_dim=128", "rate: embed_lr=0.05", "--seeds", "1", "--yes"]
    assert main([*again, "--out", str(tmp_path)]) == 0
    assert [call[0] for call in fake] == ["timing", "runs", "timing", "runs"]  # another idea under an old name
    assert found["arms"][1]["sets"].items() >= dict(model_dim="96", num_heads="3").items()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--arms", "skips"], "arms = 'skips' must be one of plain, value_embeds"),
        (["--jobs", "0"], "jobs = 0 must be >= 1; 1 works"),
        (["--set", "compile"], "--set: 'compile' is not key=value"),
        (["--ideas", "wide"], "--ideas: 'wide' is not a new name and settings"),
        (["--ideas", "plain: seed=1"], "--ideas: 'plain: seed=1' is not a new name"),
        (["--ideas", "other: seed=1"], "--ideas: seed is set by this command itself"),
        (["missing.toml"], "missing.toml"),
        (["--arms", "plain"], "nothing was started"),
    ],
    ids=["arm", "jobs", "set", "idea", "known name", "own", "recipe", "nobody to ask"],
)
@pytest.mark.usefixtures("fake")
def test_mistakes(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_real_steps_are_timed_in_their_first_and_last_kind(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    """A second for each token: small_batch has half as many in the first half of its schedule."""
    genuine = arms.train_step

    def timed(run: Any, inputs: Any, targets: Any) -> Any:
        clock.now += inputs.numel()
        return genuine(run, inputs, targets)

    monkeypatch.setattr(arms, "train_step", timed)
    options = Options(recipe=str(tiny_recipe), set=((f"vocab_size={TINY_VOCAB}",),))
    seconds = step_seconds(options, {arm: ARMS[arm] for arm in ("plain", "small_batch")}, 10)
    assert seconds == {"plain": 192, "small_batch": 0.5 * 96 + 0.5 * 192}
