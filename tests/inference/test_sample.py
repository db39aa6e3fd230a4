"""./run.sh sample: from what runs leave on the disk to text, and what is told where that cannot be."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.checkpoint import read_checkpoint
from inference import sample
from inference.load import load
from inference.sample import main, pieces, sample_text
from tests.conftest import Trainer
from tests.test_train import summary

TEXT = ("--tokenizer=byte", "--vocab_size=257", "--train_steps=4", "--val_every=2", "--dtype=float32")
Sampled = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sampled(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Sampled:
    """Status, standard output and standard error of the command."""

    def run(*arguments: object, typed: str | None = None) -> tuple[int, str, str]:
        capfd.readouterr()
        for name, stream in (("stdin", io.StringIO(typed or "")), ("stdout", sys.stdout)):
            monkeypatch.setattr(stream, "isatty", lambda: typed is not None, raising=False)
            monkeypatch.setattr(sys, name, stream)
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return status, out, err

    return run


def test_nothing_is_computed_for_nobody(run_directory: Path, sampled: Sampled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample.console, "has_reader", lambda: False)
    status, out, _ = sampled(run_directory, "--tokens=50", "--temperature=0", "--prompt=A")
    assert (status, len(out.strip())) == (0, 2)  # the prompt and one byte


@pytest.fixture
def run_directory(trainer: Trainer, tmp_path: Path) -> Path:
    result = trainer(*TEXT, "--checkpoint_every=2", "--ngrams=2,3", "--average_steps=2", "--average_share=0.5")
    assert result.returncode == 0, result.stderr
    (directory,) = (tmp_path / "runs").iterdir()
    return directory


def test_a_run_directory_is_its_newest_checkpoint_with_the_weights_that_were_validated(run_directory: Path) -> None:
    loaded = load(str(run_directory))
    assert loaded.source.name == "checkpoint_000004.pt"
    state = read_checkpoint(loaded.source)
    weight, mean = state["model"]["head.weight"], state["average"]["head.weight"]
    assert not torch.equal(weight, mean)
    torch.testing.assert_close(loaded.model.head.weight.detach(), weight.lerp(mean.float(), 0.5), rtol=1e-6, atol=1e-7)
    assert load(str(run_directory / "checkpoint_000002.pt")).source.name == "checkpoint_000002.pt"


def test_texts_go_on_from_the_prompt_and_depend_on_the_seed_alone(run_directory: Path, sampled: Sampled) -> None:
    first = sampled(run_directory, "--prompt=Bürger", "--tokens=8", "--seed=3")
    assert first == sampled(run_directory / "checkpoint_000004.pt", "--prompt=Bürger", "--tokens=8", "--seed=3")
    status, out, err = first
    assert (status, err) == (0, "")
    assert out.startswith("Bürger")
    assert len(out.rstrip("\n")) > len("Bürger")
    status, several, _ = sampled(run_directory, "--prompt=Bürger", "--tokens=8", "--seed=2", "--count=2")
    assert status == 0
    assert several.startswith("--- seed 2\nBürger")
    assert several.endswith(f"--- seed 3\n{out}")


def test_a_text_longer_than_a_row_says_what_was_dropped(run_directory: Path, sampled: Sampled) -> None:
    status, _, err = sampled(run_directory, "--tokens=40", "--temperature=0")
    assert status == 0
    assert err.startswith("note: the model knows rows of seq_len = 32 tokens; the oldest 17 were dropped on the way")


def test_in_a_terminal_every_line_is_a_prompt(
    run_directory: Path, sampled: Sampled, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[list[int]] = []

    def fake(model: object, prompt: list[int], *_: object) -> list[int]:
        prompts.append(prompt)
        return [33]

    monkeypatch.setattr(sample, "generate", fake)
    status, out, err = sampled(run_directory, typed="ab\n\n")
    assert (status, out) == (0, "ab!\n!\n")
    assert prompts == [[256, 97, 98], [256]]
    assert err.count("> ") == 3
    sampled(run_directory, "--prompt=x", typed="ab\n")
    assert prompts[2:] == [[256, 120]]


def test_characters_are_whole_and_none_steers_the_terminal() -> None:
    data = "naïve 日本\x1b[2J\r\n".encode() + b"\xff\xe6"
    assert "".join(pieces(data, "byte")) == "naïve 日本\ufffd[2J\ufffd\n\ufffd\ufffd"
    assert [*pieces("é".encode(), "byte")] == ["", "é", ""]


def test_the_trainer_s_sample_is_one_line(run_directory: Path) -> None:
    text = sample_text(load(str(run_directory)).model, "byte", 0)
    assert text == sample_text(load(str(run_directory)).model, "byte", 0)
    assert text.isprintable()
    assert 0 < len(text) <= 200


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda folder: "", [], "name a run directory, checkpoint or export first"),
        (lambda folder: folder / "nowhere", [], "nowhere is no run directory, checkpoint or export"),
        (lambda folder: folder, [], "has no checkpoint; with --checkpoint_every=1000, say"),
        (lambda folder: folder / "text.pt", [], "text.pt is not a checkpoint of this trainer"),
        (lambda folder: folder / "other.pt", [], "other.pt is not a checkpoint of this trainer"),
        (lambda folder: "", ["--tokens=0"], "tokens = 0 must be >= 1"),
    ],
)
def test_what_is_no_model_is_one_line(
    make: Callable[[Path], object], arguments: list[str], message: str, tmp_path: Path, sampled: Sampled
) -> None:
    (tmp_path / "text.pt").write_text("no weights", encoding="utf-8")
    torch.save(dict(step=1, model={}), tmp_path / "other.pt")
    status, out, err = sampled(*filter(None, [make(tmp_path)]), *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        (["--objective=masked"], [], "predicts masked tokens, from both sides; it writes no text"),
        (["--tokenizer=none"], [], "(tokenizer = 'none'), which are no text"),
        ([], ["--top_k=258"], "top_k = 258 must be at most 257, the vocabulary; 0 is all of it"),
        ([], ["--prompt=a\udcffb"], "prompt = 'a\\udcffb' is not UTF-8"),
    ],
)
def test_a_model_that_writes_no_text_is_one_line(
    settings: list[str], arguments: list[str], message: str, trainer: Trainer, sampled: Sampled, tmp_path: Path
) -> None:
    assert trainer(*TEXT, "--checkpoint_every=4", *settings).returncode == 0
    (directory,) = (tmp_path / "runs").iterdir()
    status, out, err = sampled(directory, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_run_that_its_target_stops_leaves_a_checkpoint(trainer: Trainer, tmp_path: Path) -> None:
    stops = ("--checkpoint_every=100", "--target_loss=5.6", "--stop_at_target=true", "--train_steps=40")
    result = trainer(*TEXT, *stops)
    assert "stopped at target" in result.stdout
    (directory,) = (tmp_path / "runs").iterdir()
    (checkpoint,) = directory.glob("checkpoint_*.pt")
    state = read_checkpoint(checkpoint)
    assert 0 < state["step"] == state["summary"]["steps_to_target"] < 40
    again = trainer(*TEXT, *stops, "--resume=auto")  # that run has ended, so another one begins
    assert again.returncode == 0
    assert "resumed from" not in again.stdout
    resumed = trainer(*TEXT, *stops, f"--resume={checkpoint}", f"--run_dir={tmp_path / 'resumed'}")
    assert resumed.returncode == 0, resumed.stderr
    (directory,) = (tmp_path / "resumed").iterdir()
    told = summary(directory)  # it stops where it stopped
    assert (told["status"], told["steps"]) == ("stopped at target", state["step"])
