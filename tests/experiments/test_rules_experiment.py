"""Equal tuning of rules, polar coefficients and sides: the search, what is run, what is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import arms
from experiments import rules as experiment
from experiments.rules import ARMS, FIXED, MOST_TRIED, Options, best_rate, main, measured, next_rate, summary
from experiments.sweep import Cell, Result
from tests.conftest import TINY_VOCAB
from train_gpt import Config, load_config


def test_every_arm_is_a_config_that_the_trainer_takes() -> None:
    for arm in (arm for of_question in ARMS.values() for arm in of_question.values()):
        load_config([f"--{key}={value}" for key, value in (FIXED | arm).items()])
    assert {key for of_question in ARMS.values() for arm in of_question.values() for key in arm} <= set(
        Config.__dataclass_fields__
    )


@pytest.mark.parametrize(
    ("tried", "following"),
    [
        ({1: 3.0, 2: 2.0, 4: 2.5}, None),
        ({1: 2.0, 2: 3.0, 4: 4.0}, 0.5),
        ({1: 4.0, 2: 3.0, 4: 2.0}, 8),
        ({1: 2.0, 2: None, 4: None}, 0.5),
        ({1: None, 2: None, 4: None}, 0.5),
        ({2.0**i: -float(i) for i in range(MOST_TRIED)}, None),
    ],
    ids=["inside", "low end", "high end", "others diverged", "all diverged", "enough"],
)
def test_the_search_follows_a_best_rate_at_an_end(tried: dict[float, float | None], following: float | None) -> None:
    assert next_rate(tried) == following


def test_a_rate_that_diverged_never_wins() -> None:
    assert best_rate({0.1: None, 0.2: 5.0, 0.4: None}) == 0.2


Sweeps = list[tuple[str, list[Cell], list[int], Cell]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    """No steps and no runs: losses are least at a rate of 0.01 for tall and 0.16 for all others."""
    calls: Sweeps = []

    def loss(cell: Cell, seed: int) -> float:
        best = 0.01 if cell["aurora_sides"] == "tall" else 0.16
        return 1 + 0.01 * (seed % 10) + abs(float(cell["matrix_lr"]) / best - 1)

    def sweep(recipe: str, cells: list[Cell], seeds: list[int], out: Path, jobs: int, fixed: Cell) -> list[Result]:
        calls.append((out.name, cells, list(seeds), fixed))
        facts = dict(status="finished", device="a machine", git_commit="abc")
        return [
            Result(cell, seed, jobs, 1, "", facts | dict(val_loss=loss(cell, seed))) for seed in seeds for cell in cells
        ]

    def costs(options: Options) -> dict[str, dict[str, float]]:
        return {arm: dict(step_s=0.1 * (1 + i), state_per_weight=1.0 + i) for i, arm in enumerate(options.arms)}

    monkeypatch.setattr(experiment, "measured", costs)
    monkeypatch.setattr(arms, "run_sweep", sweep)
    return calls


def test_every_arm_is_searched_alike_and_runs_at_its_best_rate(
    fake: Sweeps, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--question", "sides", "--arms", "both", "tall", "--seeds", "3", "4", "--steps", "60", "--yes"]
    assert main([*words, "--tuning_steps", "20", "--out", str(tmp_path)]) == 0
    asked = [
        (name, [(cell["aurora_sides"], cell["matrix_lr"]) for cell in cells], seeds) for name, cells, seeds, _ in fake
    ]
    assert asked == [
        ("tuning", [(arm, rate) for arm in ("both", "tall") for rate in ("0.01", "0.02", "0.04")], [100]),
        ("tuning", [("both", "0.08"), ("tall", "0.005")], [100]),
        ("tuning", [("both", "0.16")], [100]),
        ("tuning", [("both", "0.32")], [100]),
        ("runs", [("both", "0.16"), ("tall", "0.01")], [3, 4]),
    ]  # fmt: skip
    assert [fixed["train_steps"] for *_, fixed in fake] == ["20"] * 4 + ["60"]
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert [arm["val_loss"] for arm in found["arms"]] == [[1.03, 1.04], [1.03, 1.04]]
    assert [len(arm["tried"]) for arm in found["arms"]] == [6, 4]
    assert "2.00x" in capsys.readouterr().out
    assert main(["--table", str(tmp_path / "result.json")]) == 0
    assert "tall" in capsys.readouterr().out


def test_a_rate_that_is_given_is_not_searched(fake: Sweeps, tmp_path: Path) -> None:
    words = ["--question", "sides", "--arms", "tall", "--seeds", "3", "--steps", "60", "--rate", "0.03", "--yes"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert [(name, [cell["matrix_lr"] for cell in cells]) for name, cells, *_ in fake] == [("runs", ["0.03"])]


def test_the_table_gives_paired_differences_from_the_first_arm_and_marks_ends() -> None:
    def arm(name: str, losses: list[float | None], tried: list[float]) -> dict[str, Any]:
        of_rates = [[rate, 1.0] for rate in tried]
        return dict(arm=name, sets={}, step_s=0.2, state_per_weight=1.0, tried=of_rates, rate=2.0, val_loss=losses)

    rows = summary(dict(question="rules", arms=[
        arm("muon", [1.3, 1.4, 1.5], [1, 2, 4]), arm("new", [1.2, 1.31, 1.39], [1, 2]),
        arm("wild", [1.1, None, 1.2], [2, 4]), arm("lower", [1.20, 1.34, 1.41], [1, 2, 4]),
    ]))  # fmt: skip
    assert [(row["rules"], row["rate"]) for row in rows] == [
        ("new", "2*"), ("lower", "2"), ("muon", "2"), ("wild", "2*")
    ]  # fmt: skip
    assert (rows[0]["from muon"], rows[0]["95% interval"]) == ("-0.1000", "-0.1248 to -0.0752")
    assert [row["p (Holm)"] for row in rows] == ["0.0066", "0.02", "", ""]  # of two arms: twice the lowest p
    assert rows[2]["from muon"] == ""
    assert rows[3]["final loss"] == "diverged"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--arms", "nuon"], "'nuon' is unknown"),
        (["--seeds", "100"], "100, which is for tuning"),
        (["--set", "matrix_lr=1"], "matrix_lr is set by this command itself"),
        (["--arms", "muon"], "nothing was started"),
    ],
    ids=["arm", "seed", "set", "nobody to ask"],
)
@pytest.mark.usefixtures("fake")
def test_mistakes(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_state_is_counted_and_steps_are_timed_on_the_real_thing(tiny_recipe: Path) -> None:
    options = Options(recipe=str(tiny_recipe), arms=("muon", "muon_squared", "adamw"), steps=10,
                      set=((f"vocab_size={TINY_VOCAB}",),))  # fmt: skip
    found = measured(options)
    assert [round(found[arm]["state_per_weight"], 1) for arm in options.arms] == [1.0, 2.0, 2.0]
    assert all(arm["step_s"] > 0 for arm in found.values())
