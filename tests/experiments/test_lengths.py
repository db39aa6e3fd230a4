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
    FURTHEST,
    MOST_LENGTHS,
    SIGNIFICANCE,
    Losses,
    commands,
    main,
    next_length,
    pooled_spread,
    rounded,
    steps_to,
    wanted_loss,
)
from experiments.sweep import Cell, Result
from leaderboard import stats, tracks
from train_gpt import load_config

Calls = list[tuple[str, int, int]]


def loss(rule: str, steps: int, seed: int) -> float | None:
    """1.3 after 400 steps of Muon's and 200 of Aurora's, in the mean of seeds 100 to 103; diverged (None): SGD, and
    RMSProp beyond 400 steps."""
    if rule == "sgd" or (rule == "rmsprop" and steps > 400):
        return None
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
                told = dict(
                    val_loss=loss(rule, steps, seed), device="a machine", dtype="torch.float32", git_commit="abc"
                )
                told["status"] = "finished" if told["val_loss"] else "diverged"
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
    assert 200 < fast[0] < 300  # shorter was tried, too
    assert [(rule, steps) for rule, steps, seed in fake[:4]] == [
        ("aurora", 400), ("aurora", 340), ("muon", 300), ("muon", 255)
    ]  # fmt: skip
    losses = {steps: [loss("muon", steps, seed) for seed in (100, 101, 102, 103)] for steps in slow}
    wanted = wanted_loss(0.01 * np.std(range(4), ddof=1), 4, 1.3, 5)
    needed = steps_to(wanted, losses)
    assert needed == pytest.approx(400 * math.exp((1.3 - wanted) / 0.2))
    assert slow[-1] >= needed
    out = capsys.readouterr().out
    assert out.index("fast") < out.index("slow")
    assert str(math.ceil(needed)) in out.split()

    # The commands train entries: the trainer takes their words, and the seeds are a record's
    for line, idea in zip(commands(result), result["ideas"], strict=True):
        assert line.startswith("for seed in {1000..1004}; do ./run.sh ")
        words = shlex.split(line.partition("./run.sh ")[2].partition(";")[0].replace("$seed", "1000"))
        config = load_config(words)
        assert (config.stop_at_target, config.author, config.description) == (False, "You", idea["idea"])
        assert (config.seed, config.num_seeds, config.name) == (1000, 5, idea["idea"])
        assert config.matrix_optimizer == idea["sets"]["matrix_optimizer"]
    assert f"--train_steps={math.ceil(needed)}" in commands(result)[0]
    assert main(["--table", str(tmp_path / "result.json")]) == 0
    assert capsys.readouterr().out in out


def test_a_length_that_diverges_is_not_tried_again(fake: Calls, tmp_path: Path) -> None:
    result = run(tmp_path, "some: matrix_optimizer=rmsprop train_steps=350")
    tried = result["ideas"][0]["val_loss"]
    assert list(tried)[:2] == ["298", "350"]
    assert [None in losses for losses in tried.values()] == [False, False, True]
    assert len(commands(result)) == 1  # by the line through the first two


def test_what_diverges_has_no_length(fake: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, "lost: matrix_optimizer=sgd train_steps=300")
    assert list(result["ideas"][0]["val_loss"]) == ["255", "300"]
    assert commands(result) == []
    assert "diverged" in capsys.readouterr().out


def test_lengths_are_rounded_up_by_less_than_four_percent() -> None:
    assert [rounded(steps) for steps in (71.4, 84, 309.5, 442.0, 1751, 4020)] == [72, 84, 310, 450, 1760, 4100]
    assert rounded(0.85 * 600) == 510  # 510.00000000000006 would be 520 by floats
    assert rounded(0.7 * 100) == 70


def test_what_never_gets_there_is_given_up() -> None:
    for last in (2.0, 1.9, 1.89999999):
        flat: Losses = {300: [last, last + 0.1], 260: [1.9, 2.0]}
        assert steps_to(1.3, flat) == math.inf
        assert next_length(flat, 1.3, flat) == 450
        assert next_length(flat, 1.3, range(MOST_LENGTHS)) is None
        assert next_length(flat, 1.3, {450, *flat}) is None


def test_what_is_there_before_the_shortest_length_goes_shorter() -> None:
    for last in (1.26, 1.25, 1.24999999):
        flat: Losses = {300: [last, last + 0.1], 260: [1.2, 1.3]}
        assert steps_to(1.3, flat) == 0
        assert next_length(flat, 1.3, flat) == rounded(260 / FURTHEST)


def test_the_nearest_two_lengths_say_where_a_loss_is() -> None:
    """The slope halves after 400 steps."""
    losses: Losses = {
        steps: [1.3 - (0.2 if steps < 400 else 0.1) * math.log(steps / 400)] for steps in (300, 400, 500, 600)
    }
    for steps in (280, 350, 450, 550, 700):
        loss = 1.3 - (0.2 if steps < 400 else 0.1) * math.log(steps / 400)
        assert steps_to(loss, losses) == pytest.approx(steps)


def test_two_of_three_entries_pass() -> None:
    """Simulated: a recipe is tried with four seeds, and an entry of five is trained at the length that came out."""
    rng, passed, tries = np.random.default_rng(0), 0, 2000
    for _ in range(tries):
        spread, text = 0.012, rng.normal(size=4)  # the seeds' text, which every length meets
        tried = {steps: 1.3 - 0.2 * np.log(steps / 400) + spread * text for steps in (400, 480, 560)}
        measured = pooled_spread([dict(val_loss=tried)])
        steps = steps_to(wanted_loss(measured, 4, 1.3, 5), tried)
        entry = 1.3 - 0.2 * math.log(steps / 400) + spread * rng.normal(size=5)
        assert steps
        passed += stats.p_below(entry.tolist(), 1.3) < SIGNIFICANCE
    assert 0.63 < passed / tries < 0.71


def test_a_record_is_what_the_leaderboard_says() -> None:
    assert SIGNIFICANCE == tracks.SIGNIFICANCE
    assert tracks.load_tracks()["sotu-steps"].first_seed == FIRST_SEED


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--seeds", "100", "1000"], "seeds: name two or more below 1000"),
        (["--seeds", "100", "100"], "seeds: name two or more below 1000"),
        (["--ideas", ": matrix_lr=0.03"], "is not a new name and settings"),
        (["--ideas", "a/b: matrix_lr=0.03"], "name = 'a/b' must begin with a letter"),
        (["--ideas", "a b: matrix_lr=0.03", "a_b: matrix_lr=0.04"], "'a b' and 'a_b' have one name"),
        (["--ideas", "a: matrix_lr=0.03", "b: matrix_lr=0.03 train_steps=9"], "'a' and 'b' have one name or the same"),
        (["--ideas", "a: val_every=25"], "--ideas: val_every is set by this command itself"),
        (["--ideas", "avg: average_steps=20 average_start=550"], "avg: average_start = 550 must be"),
        (["configs/sotu_base.toml"], "sotu_base: an entry has num_seeds of 2 or more; try --ideas 'sotu_base: num"),
        (["--ideas", "wide"], "--ideas: 'wide' is not a new name and settings"),
        (["--ideas", "other: seed=1"], "--ideas: seed is set by this command itself"),
        (["--ideas", "one: num_seeds=1"], "one: an entry has num_seeds of 2 or more"),
        (["missing.toml"], "missing.toml"),
        ([], "nothing was started"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("fake")
def test_mistakes(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [{}, [], dict(ideas=[]), {"x": [1, 2]}, {"1": [1], "2": [1]}], ids=str)
def test_another_file_is_no_table(content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    if content and "ideas" not in content:  # losses
        content = dict(recipe="r", ideas=[dict(idea="a", sets={}, target=1, num_seeds=5, val_loss=content)])
    path.write_text(json.dumps(content), encoding="utf-8")
    assert main(["--table", str(path)]) == 2
    assert "is not a result of this experiment" in capsys.readouterr().err
