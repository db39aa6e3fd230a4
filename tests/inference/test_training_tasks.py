"""eval_every: the numbers of ./run.sh evaluate, off the clock, on any number of ranks; and what is no task."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt
from inference.load import load
from inference.tasks import read_tasks, run_task
from inference.training_tasks import numbers
from tests.conftest import Trainer, python, torchrun
from tests.test_train import only_run, summary

TEXT = ["--tokenizer=byte", "--vocab_size=257", "--train_steps=6", "--val_every=6", "--dtype=float32"]
CHOICES = [
    dict(query=f"Question: how many, {number}?", choices=["one", "two and more"], gold=number % 2)
    for number in range(7)
]  # fmt: skip
WORDS = [dict(context=f"a text, the {number}th", continuation="word") for number in range(3)]


@pytest.fixture
def tasks(tmp_path: Path) -> list[str]:
    for name, rows in (("choices", CHOICES), ("words", WORDS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return [f"--eval_tasks={tmp_path / 'choices.jsonl'},{tmp_path / 'words.jsonl'}"]


def measured(directory: Path) -> dict[int, Any]:
    rows = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["tasks"] for row in rows if "tasks" in row}


@pytest.mark.parametrize("options", [[], ["--average_steps=3"], ["--window=12", "--window_start=4"]])
def test_results_are_those_of_evaluate(options: list[str], tasks: list[str], trainer: Trainer, tmp_path: Path) -> None:
    result = trainer(*TEXT, *tasks, *options, "--eval_every=4", "--checkpoint_every=6")
    assert result.returncode == 0, result.stderr
    run = only_run(tmp_path)
    found = measured(run)
    assert [*found] == [0, 4, 6]
    loaded = load(str(run), "cpu", "float32")
    files = [tmp_path / "choices.jsonl", tmp_path / "words.jsonl"]
    expected = [numbers(run_task(loaded, task, 4096)) for path in files for task in read_tasks(path)]
    for name, values in zip(("choices", "words"), expected, strict=True):
        assert found[6][name] == pytest.approx(values, rel=1e-5)
    told = summary(run)
    assert told["tasks"] == found[6]
    assert told["phase_s"]["tasks"] > 0
    assert f"step:4/6 choices acc:{found[4]['choices']['acc']:.4g}" in result.stdout


def test_a_resumed_run_has_each_result_once(tasks: list[str], trainer: Trainer, tmp_path: Path) -> None:
    words = [*TEXT, *tasks, "--eval_every=2", "--checkpoint_every=4"]
    assert trainer(*words, "--name=whole").returncode == 0
    whole = only_run(tmp_path)
    checkpoint = whole / "checkpoint_000004.pt"
    assert trainer(*words, f"--resume={checkpoint}", "--name=later").returncode == 0
    (later,) = (tmp_path / "runs").glob("later-*")
    assert measured(later) == measured(whole)
    steps = [json.loads(line)["step"] for line in (later / "metrics.jsonl").read_text().splitlines() if "tasks" in line]
    assert steps == [0, 2, 4, 6]
    lines = (later / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in lines if line.startswith("step:") and " words acc:" in line] == [
        f"step:{step}/6" for step in steps
    ]
    assert summary(later)["tasks_step"] == 6
    without = [*TEXT, "--checkpoint_every=4", f"--resume={checkpoint}", "--name=without"]
    assert trainer(*without).returncode == 0
    (last,) = (tmp_path / "runs").glob("without-*")
    assert "tasks" not in summary(last)


def test_a_perplexity_beyond_all_numbers_and_weights_that_are_none(
    tasks: list[str], trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tmp_path / "words.jsonl"
    words.write_text(json.dumps(dict(context="a", continuation="b " * 300)) + "\n", encoding="utf-8")
    result = trainer(*TEXT, f"--eval_tasks={words}", "--eval_every=6", "--name=first")
    assert result.returncode == 0, result.stderr
    run = only_run(tmp_path)
    assert measured(run)[0]["words"]["perplexity"] is None
    assert "step:0/6 words acc:0 perplexity:inf" in result.stdout
    genuine = train_gpt.Run.follow

    def follow(run: train_gpt.Run, plan: train_gpt.StepPlan) -> None:
        if run.summary.get("steps") == 4:
            torch.nn.init.constant_(run.model.head.weight, float("nan"))
        genuine(run, plan)

    monkeypatch.setattr(train_gpt.Run, "follow", follow)
    result = trainer(*TEXT, *tasks, "--eval_every=4", "--name=second")
    assert result.returncode == 1
    assert "log-probabilities of choices are not finite" in result.stdout


@pytest.mark.parametrize("options", [[], ["--fsdp=true"]])
def test_ranks_share_the_items(
    options: list[str], tasks: list[str], trainer: Trainer, tiny_recipe: Path, tmp_path: Path
) -> None:
    words = [*TEXT, *tasks, "--eval_every=6", "--micro_batch_tokens=32"]
    assert trainer(*words).returncode == 0
    result = python(torchrun(2), tiny_recipe, *words, *options, f"--run_dir={tmp_path / 'two'}")
    assert result.returncode == 0, result.stderr
    (two,) = (tmp_path / "two").iterdir()
    one, of_two = measured(only_run(tmp_path)), measured(two)
    assert [(step, [*results]) for step, results in of_two.items()] == [
        (0, ["choices", "words"]),
        (6, ["choices", "words"]),
    ]
    for step, results in of_two.items():
        for name, values in results.items():
            assert values == pytest.approx(one[step][name], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_every=2"], "eval_every = 2, eval_tasks = '': set both"),
        (["--eval_tasks=piqa.jsonl"], "eval_every = 0, eval_tasks = 'piqa.jsonl': set both"),
        (
            ["--eval_every=2", "--eval_tasks=nowhere.jsonl"],
            "nowhere.jsonl is no file of tasks (No such file or directory)",
        ),
        (["--eval_every=2", "--eval_tasks=tests"], "tests is no file of tasks (Is a directory)"),
        (["--eval_every=2", "--eval_tasks=words.jsonl,words.jsonl"], "eval_tasks has two tasks called 'words'"),
        (["--eval_every=2", "--eval_tasks=README.md"], "is not an item of a task"),
        (
            ["--eval_every=2", "--eval_tasks=README.md", "--objective=masked"],
            "eval_every needs a model of the next token",
        ),
        (
            ["--eval_every=2", "--eval_tasks=README.md", "--tokenizer=none"],
            "eval_every needs a model of the next token",
        ),
    ],
)
def test_what_cannot_be_evaluated(
    words: list[str], message: str, tasks: list[str], trainer: Trainer, tmp_path: Path
) -> None:
    words = [word.replace("words.jsonl", str(tmp_path / "words.jsonl")) for word in words]
    result = trainer(*TEXT, *words)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
