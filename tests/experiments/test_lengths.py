"""How long a schedule has to be for a record: which lengths are tried, and what a line through their losses says."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import arms
from experiments.lengths import (
    FIRST_SEED,
    MOST_LENGTHS,
    SIGNIFICANCE,
    Losses,
    commands,
    main,
    next_length,
    rounded,
    steps_to,
    wanted_loss,
)
from experiments.sweep import Cell, Result
from leaderboard import stats, tracks
from train_gpt import load_config

Calls = list[tuple[str, int, int]]


def loss(rule: str, steps: int, seed: int) -> float:
    """1.3 after 400 steps of Muon's and 200 of Aurora's, in the mean of seeds 100 to 103."""
    return 1.3 - 0.2 * math.log(steps / (200 if rule == "aurora" else 400)) + 0.01 * (seed - 101.5)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """No runs: results appear as if they had been."""
    calls = Calls()

    def sweep(recipe: str, cells: list[Cell], seeds: list[int], out: Path, jobs: int, fixed: Cell) -> list[Result]:
        out.mkdir(parents=True, exist_ok=True)
        results = []
        for seed in seeds:
            for cell in cells:
                rule, steps = cell["matrix_optimizer"], int(cell["train_steps"])
                assert int(cell["val_every"]) == steps
                calls.append((rule, steps, seed))
                told = dict(status="finished", val_loss=loss(rule, steps, seed), device="a machine", git_commit="abc")
                if rule == "sgd":
                    told["status"] = "diverged"
                results.append(Result(cell, seed, jobs, 1, "", told))
        return results

    monkeypatch.setattr(arms, "run_sweep", sweep)
    return calls


def run(out: Path, *ideas: str) -> dict[str, Any]:
    assert main([f"--out={out}", "--yes=true", "--ideas", *ideas]) == 0
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def test_longer_schedules_are_tried_until_the_wanted_loss_is_enclosed(
    fake: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ideas = ("slow: matrix_optimizer=muon train_steps=300", "fast: matrix_optimizer=aurora train_steps=400")
    result = run(tmp_path, *ideas)
    slow, fast = (list(map(int, idea["val_loss"])) for idea in result["ideas"])
    assert {(rule, steps) for rule, steps, seed in fake if seed == 100} == {
        *(("muon", steps) for steps in slow),
        *(("aurora", steps) for steps in fast),
    }
    assert slow[:2] == [255, 300]
    assert 400 < slow[-1] <= 600
    assert fast[-2:] == [340, 400]
    losses = {steps: [loss("muon", steps, seed) for seed in (100, 101, 102, 103)] for steps in slow}
    needed = steps_to(wanted_loss(losses, 1.3, 5), losses)
    assert needed == pytest.approx(400 * math.exp((1.3 - wanted_loss(losses, 1.3, 5)) / 0.2))
    assert slow[-1] >= needed
    out = capsys.readouterr().out
    assert out.index("fast") < out.index("slow")
    assert f"{needed:.0f}" in out.split()

    # The commands train entries: the trainer takes their words, and the seeds are a record's
    for line, idea in zip(commands(result), result["ideas"], strict=True):
        assert line.startswith("for seed in {1000..1004}; do ./run.sh ")
        words = shlex.split(line.partition("./run.sh ")[2].partition(";")[0].replace("$seed", "1000"))
        config = load_config(words)
        assert (config.seed, config.num_seeds, config.name) == (1000, 5, idea["idea"])
        assert config.matrix_optimizer == idea["sets"]["matrix_optimizer"]
    assert f"--train_steps={rounded(needed)}" in commands(result)[0]
    assert main(["--table", str(tmp_path / "result.json")]) == 0
    assert capsys.readouterr().out in out


def test_what_diverges_has_no_length(fake: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, "lost: matrix_optimizer=sgd train_steps=300")
    assert list(result["ideas"][0]["val_loss"]) == ["255", "300"]
    assert commands(result) == []
    assert "diverged" in capsys.readouterr().out


def test_lengths_are_rounded_up_by_less_than_four_percent() -> None:
    assert [rounded(steps) for steps in (71.4, 84, 309.5, 442.0, 1751, 4020)] == [72, 84, 310, 450, 1760, 4100]


def test_what_never_gets_there_is_given_up() -> None:
    flat: Losses = {300: [2.0, 2.1], 260: [1.9, 2.0]}
    assert steps_to(1.3, flat) == math.inf
    assert next_length(flat, 1.3) == 450
    assert next_length({n: [2.0, 2.1] for n in range(MOST_LENGTHS)}, 1.3) is None


def test_two_of_three_entries_pass() -> None:
    """Simulated: a recipe is tried with four seeds, and an entry of five is trained at the length that came out."""
    rng, passed, tries = np.random.default_rng(0), 0, 2000
    for _ in range(tries):
        spread, text = 0.012, rng.normal(size=4)  # the seeds' text, which every length meets
        tried = {steps: 1.3 - 0.2 * np.log(steps / 400) + spread * text for steps in (400, 480, 560)}
        steps = steps_to(wanted_loss(tried, 1.3, 5), tried)
        entry = 1.3 - 0.2 * math.log(steps / 400) + spread * rng.normal(size=5)
        passed += stats.p_below(entry.tolist(), 1.3) < SIGNIFICANCE
    assert 0.63 < passed / tries < 0.71


def test_a_record_is_what_the_leaderboard_says() -> None:
    assert SIGNIFICANCE == tracks.SIGNIFICANCE
    assert tracks.load_tracks()["sotu-steps"].first_seed == FIRST_SEED


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--seeds", "100", "1000"], "seeds: name two or more below 1000"),
        (["--ideas", "wide"], "--ideas: 'wide' is not a new name and settings"),
        (["--ideas", "other: seed=1"], "--ideas: seed is set by this command itself"),
        (["--ideas", "one: num_seeds=1"], "one: an entry has a target_loss and num_seeds of 2 or more"),
        (["missing.toml"], "missing.toml"),
        ([], "nothing was started"),
    ],
    ids=["seeds", "idea", "own", "no entry", "recipe", "nobody to ask"],
)
@pytest.mark.usefixtures("fake")
def test_mistakes(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
