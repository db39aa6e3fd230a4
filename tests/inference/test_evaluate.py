"""./run.sh evaluate: against a loop over tokens, the trainer's own validation, and texts of known length."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.loader import TokenStream
from data.shards import write_shard
from data.tokenizer import end_of_text, get_tokenizer
from harness.log_format import bits_per_byte
from inference import evaluate as module
from inference.evaluate import evaluate, main
from inference.load import load
from leaderboard.runs import read_run
from leaderboard.verify_run import of_files
from tests.conftest import Trainer
from tests.test_train import metrics, only_run, summary

TEXTS = ["Bürger, hört!", "", "A second text; 日本.", "and a third one, " * 4]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tokens = [token for text in TEXTS for token in (256, *text.encode())]
    for kind in ("train", "val"):
        write_shard(tmp_path / f"text_{kind}_0.bin", tokens if kind == "val" else [*tokens, 65] * 4)
    return tmp_path


@pytest.fixture
def run(trainer: Trainer, shards: Path, tmp_path: Path) -> Path:
    arguments = [f"--{kind}_files={shards}/text_{kind}_*.bin" for kind in ("train", "val")]
    arguments += ["--tokenizer=byte", "--vocab_size=257", "--seq_len=16", "--val_tokens=96", "--micro_batch_tokens=48"]
    arguments += ["--train_steps=8", "--val_every=4", "--checkpoint_every=8", "--dtype=float32"]
    result = trainer(*arguments)
    assert result.returncode == 0, result.stderr
    return only_run(tmp_path)


def test_sums_are_those_of_a_loop_over_tokens(run: Path, shards: Path) -> None:
    loaded, stream = load(str(run), dtype="float32"), TokenStream([shards / "text_val_0.bin"], 257)
    tokens, model = torch.tensor(stream.read(0, 97).astype(np.int64)), loaded.model
    nats, separators = [], []
    for start in range(0, 96, 16):
        with torch.no_grad():
            log_p = model.logits(model.hidden(tokens[None, start : start + 16]))[0].log_softmax(-1)
        for place in range(16):
            target = int(tokens[start + place + 1])
            (separators if target == 256 else nats).append(-float(log_p[place, target]))
    for micro_batch_tokens in (16, 48, 100, 10_000):
        found = evaluate(loaded, stream, 96, micro_batch_tokens)
        assert found.nats == pytest.approx(sum(nats) + sum(separators), rel=1e-5)
        assert found.separator_nats == pytest.approx(sum(separators), rel=1e-5)
        assert (found.num_separators, found.num_bytes) == (len(separators), len(nats)) == (3, 93)
        assert found.bits_per_byte == pytest.approx((sum(nats) + sum(separators)) / 93 / math.log(2), rel=1e-5)
        assert found.bits_per_byte_of_text == pytest.approx(sum(nats) / 93 / math.log(2), rel=1e-5)


def test_the_defaults_are_the_run_s_own_validation(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = summary(run)
    assert told["bits_per_byte"] == pytest.approx(told["val_loss"] * 96 / 93 / math.log(2), rel=1e-12)
    assert told["val_bytes"] == 93
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert ("bits_per_byte" in row) == ("val_loss" in row)
    assert rows[-1]["bits_per_byte"] == told["bits_per_byte"]
    shown = f"nats a token, {told['bits_per_byte']:.4f} bits per byte after"
    assert shown in (run / "log.txt").read_text(encoding="utf-8")
    assert main([str(run), "--dtype=float32"]) == 0
    loss, bits, alone = capfd.readouterr().out.splitlines()
    assert float(loss.split()[1]) == pytest.approx(told["val_loss"], rel=1e-5)
    assert "per token over the first 96 of" in loss
    assert float(bits.split()[3]) == pytest.approx(told["bits_per_byte"], rel=1e-5)
    assert "over 93 bytes of text, with the loss of 3 separators" in bits
    assert alone.endswith("without it")


def test_other_shards_and_all_of_them(run: Path, shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_shard(shards / "other.bin", [256, *("words and more words. " * 5).encode()])  # 111 tokens
    assert main([str(run), f"--files={shards}/other.bin", "--num_tokens=0"]) == 0
    assert "the first 96 of 111 tokens" in capfd.readouterr().out
    for arguments, message in (
        (["--num_tokens=100"], "num_tokens = 100 must be whole rows of seq_len = 16; 96 works"),
        (["--num_tokens=160"], "found 111 validation tokens"),
        ([f"--files={shards}/nothing_*.bin"], "nothing_*.bin"),
    ):
        assert main([str(run), f"--files={shards}/other.bin", *arguments]) == 2
        error = capfd.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_text_of_gpt2_tokens_is_measured_in_bytes(gpt2_vocabulary: Path, trainer: Trainer, tmp_path: Path) -> None:
    tokens = [token for text in TEXTS for token in (end_of_text("gpt2"), *get_tokenizer("gpt2").encode_ordinary(text))]
    for kind in ("train", "val"):
        write_shard(tmp_path / f"bpe_{kind}_0.bin", tokens if kind == "val" else [*tokens, 11] * 20)
    files = [f"--{kind}_files={tmp_path}/bpe_{kind}_*.bin" for kind in ("train", "val")]
    sizes = ["--seq_len=8", f"--val_tokens={(len(tokens) - 1) // 8 * 8}", "--micro_batch_tokens=16"]
    gpt2 = ["--tokenizer=gpt2", "--vocab_size=50257", "--train_steps=1", "--val_every=1"]
    result = trainer(*files, *sizes, *gpt2, "--batch_tokens=64")
    assert result.returncode == 0, result.stderr
    told, num_tokens = summary(only_run(tmp_path)), (len(tokens) - 1) // 8 * 8
    num_bytes = len(get_tokenizer("gpt2").decode_bytes([t for t in tokens[1 : num_tokens + 1] if t != 50256]))
    assert told["val_bytes"] == num_bytes
    assert told["bits_per_byte"] == pytest.approx(told["val_loss"] * num_tokens / num_bytes / math.log(2))


def test_what_is_no_text_has_no_bits_per_byte(
    trainer: Trainer, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for settings in (["--tokenizer=none"], ["--tokenizer=byte", "--vocab_size=257", "--objective=masked"]):
        folder = tmp_path / settings[-1]
        result = trainer(*settings, "--train_steps=4", "--checkpoint_every=4", "--dtype=float32", f"--run_dir={folder}")
        assert result.returncode == 0, result.stderr
        (directory,) = folder.iterdir()
        told = summary(directory)
        assert told["bits_per_byte"] is None
        assert main([str(directory), "--dtype=float32"]) == 0
        out = capfd.readouterr().out
        assert float(out.split()[1]) == pytest.approx(told["val_loss"], rel=1e-5)
        assert "bits" not in out
    assert "of which a part is hidden" in out


def test_a_window_that_grows_is_the_checkpoint_s(trainer: Trainer, run: Path, tmp_path: Path) -> None:
    """In the dtype that the run asked for."""
    config = load(str(run)).settings
    same = [f"--{key}={config[key]}" for key in ("train_files", "val_files", "tokenizer", "vocab_size", "seq_len")]
    same += [f"--{key}={config[key]}" for key in ("val_tokens", "micro_batch_tokens")]
    grows = ["--window=16", "--window_start=2", "--train_steps=16", "--val_every=4", "--checkpoint_every=4"]
    arguments = [*same, *grows, "--dtype=float32", "--init_head=0.5", "--checkpoint_keep=9", "--init_out=0.5"]
    result = trainer(*arguments, f"--run_dir={tmp_path / 'grows'}")
    assert result.returncode == 0, result.stderr
    (directory,) = (tmp_path / "grows").iterdir()
    losses = metrics(directory, "val_loss")
    for step, window in ((4, 6), (8, 10), (16, 16)):
        loaded = load(str(directory / f"checkpoint_{step:06d}.pt"))
        assert (loaded.model.config.window, loaded.machine.dtype) == (window, torch.float32)
        stream = TokenStream([Path(config["val_files"].replace("*", "0"))], 257)
        assert evaluate(loaded, stream, 96, 48).loss == pytest.approx(losses[step], rel=1e-6)


def test_no_loss_or_no_bytes_is_no_number() -> None:
    assert bits_per_byte(None, 10, 10) is None
    assert bits_per_byte(1.0, 10, 0) is None
    assert bits_per_byte(1.0, 10, None) is None
    assert bits_per_byte(math.log(2), 12, 10) == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "a.jsonl", "--files=x"], "leave out either --tasks or --files and --num_tokens"),
        (["--tasks", "a.jsonl", "--num_tokens=0"], "leave out either --tasks or --files and --num_tokens"),
        (["--limit=2"], "limit = 2 is of --tasks; of the loss it is --num_tokens"),
        (["--num_tokens=99999999999"], "must be whole rows of seq_len = 16; 96 works"),
        (["another"], "'another' is a word too many; all but the run is written --key=value"),
    ],
)
def test_options_that_do_not_go_together(
    words: list[str], message: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), *words]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_run_may_come_last(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--dtype=float32", str(run)]) == 0
    assert "nats per token over the first 96" in capfd.readouterr().out


def test_too_large_a_batch_is_one_line(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nand much more")

    monkeypatch.setattr(module, "evaluate", full)
    assert main([str(run)]) == 2
    assert "error: out of memory with micro_batch_tokens = 16384; a smaller one" in capfd.readouterr().err


def test_a_run_of_before_gets_them_when_it_goes_on(run: Path, trainer: Trainer, tmp_path: Path, shards: Path) -> None:
    checkpoint = next(run.glob("checkpoint_*.pt"))
    state = torch.load(checkpoint, weights_only=True)
    del state["summary"]["val_bytes"]
    torch.save(state, checkpoint)
    config: dict[str, Any] = state["config"]
    same = [f"--{key}={config[key]}" for key in ("train_files", "val_files", "tokenizer", "vocab_size", "seq_len")]
    same += [f"--{key}={config[key]}" for key in ("val_tokens", "micro_batch_tokens", "val_every", "dtype")]
    result = trainer(*same, "--train_steps=12", f"--resume={checkpoint}", f"--run_dir={tmp_path / 'on'}")
    assert result.returncode == 0, result.stderr
    (directory,) = (tmp_path / "on").iterdir()
    assert summary(directory)["val_bytes"] == 93


def test_the_leaderboard_checks_them_against_the_losses(run: Path) -> None:
    honest = read_run(run)
    assert [line for line in of_files(honest) if "bits" in line] == []
    honest.metrics[-1]["bits_per_byte"] *= 0.9
    assert any("bits per byte, its loss is" in line for line in of_files(honest))
    honest.summary["val_bytes"] = 10**400
    assert any("bits per byte, its loss is None" in line for line in of_files(honest))
    claimed = read_run(run)
    claimed.summary["bits_per_byte"] *= 0.9
    assert any("summary.json says bits_per_byte" in line for line in of_files(claimed))
