"""The trainer as its users run it: schedules, log, clock, target, exact restore and resume, mistakes."""

import fcntl
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import train_gpt
from data.shards import head_fingerprint, open_shard, write_shard
from harness import checkpoint, machine, runlog
from harness.checkpoint import CheckpointWriter, verify
from harness.runlog import RunLog, run_sources
from inference import sample
from leaderboard.runs import parse_log
from tests.conftest import PATIENCE_S, ROOT, Result, Trainer
from tests.harness.test_checkpoint import files_no_larger_than
from train_gpt import Config, load_config, plan_step, set_up, train_step, warm_up


def only_run(tmp_path: Path) -> Path:
    (directory,) = (tmp_path / "runs").iterdir()
    return directory


def metrics(directory: Path, key: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def summary(directory: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    return values


# Schedules


# A run


def test_a_run_leaves_what_it_promises(trainer: Trainer, tmp_path: Path, tiny_data: Path) -> None:
    result = trainer("--target_loss=3.3", "--matrix_optimizer=muon")
    assert result.returncode == 0, result.stderr
    directory = only_run(tmp_path)
    assert sorted(path.name for path in directory.iterdir()) == [
        "log.txt",
        "metrics.jsonl",
        "summary.json",
        "writer.json",
    ]
    losses, final = metrics(directory, "val_loss"), summary(directory)

    # the log: sources, versions, then lines the field's tools parse
    source, versions, body = (directory / "log.txt").read_text(encoding="utf-8").split("=" * 100)
    for file in ("train_gpt.py", "model.py", "optim/muon.py", "optim/bank.py", "data/loader.py", "harness/settings.py"):
        assert f"# file: {file}\n{(ROOT / file).read_text(encoding='utf-8')}" in source
    assert f'torch": "{torch.__version__}' in versions
    assert '"matrix_optimizer": "muon"' in versions
    parsed = re.findall(r"step:(\d+)/(\d+)\s+val_loss:([0-9.]+) train_time:([0-9.]+)s step_avg:([0-9.]+)ms", body)
    assert [int(step) for step, *_ in parsed] == [0, 10, 20, 30, 40]
    assert all(float(loss) == pytest.approx(losses[int(step)], abs=1e-5) for step, _, loss, *_ in parsed)
    assert body.strip() in result.stdout

    # the target: the first validation at or below it, by the metrics' own numbers
    times = metrics(directory, "train_time_s")
    first = min(step for step, loss in losses.items() if loss <= 3.3)
    assert final["steps_to_target"] == first
    assert final["tokens_to_target"] == first * 192
    assert final["time_to_target_s"] == times[first]
    assert f"3.3 nats reached after {times[first]:.1f} s of training, {first} steps" in result.stdout

    # it learned, the clock only ran forwards, and the rest of the summary is about this run
    assert losses[0] == pytest.approx(np.log(64), rel=1e-5)
    assert losses[40] < 0.75 * losses[0]
    assert list(times.values()) == sorted(times.values())
    assert final["val_loss"] == losses[40]
    assert final["status"] == "finished"
    assert final["config"]["matrix_optimizer"] == "muon"
    assert final["val_fingerprint"] == head_fingerprint([open_shard(tiny_data / "tiny_val_000000.bin")], 3840)
    assert "step:37 epoch 2 of the training data begins" in result.stdout  # 37 * 192 = 7104 >= 7001


@pytest.mark.parametrize(
    ("function", "phase"),
    [("evaluate", "validation"), ("CheckpointWriter.save", "checkpoint"), ("warm_up", "warmup")],
)
def test_the_clock_stops_for_everything_but_training(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, phase: str
) -> None:
    """A clock that stands still but for a second in each call: that second belongs to its own phase alone."""
    now = 0
    place: Any = train_gpt.CheckpointWriter if "." in function else train_gpt
    name, calls = function.split(".")[-1], []
    genuine = getattr(place, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        nonlocal now
        calls.append(function)
        now += 1
        return genuine(*args, **kwargs)

    monkeypatch.setattr(place, name, slow)
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: now))
    assert trainer("--train_steps=4", "--val_every=1", "--checkpoint_every=1", "--log_every=1").returncode == 0
    final = summary(only_run(tmp_path))
    assert len(calls) == {"evaluate": 5, "save": 4, "warm_up": 1}[name]
    assert {name: seconds for name, seconds in final["phase_s"].items() if seconds} == {phase: len(calls)}
    assert final["train_time_s"] == 0


def test_stop_at_target_ends_the_run_there(trainer: Trainer, tmp_path: Path) -> None:
    result = trainer("--target_loss=3.9", "--stop_at_target", "--require_target")
    assert result.returncode == 0, result.stderr
    final = summary(only_run(tmp_path))
    assert final["status"] == "stopped at target"
    assert final["steps"] == final["steps_to_target"] < 40
    assert final["time_to_target_s"] == final["train_time_s"]


def test_a_missed_target_says_by_how_much_and_can_fail(trainer: Trainer, tmp_path: Path) -> None:
    result = trainer("--target_loss=0.5", "--require_target", "--train_steps=3")
    assert result.returncode == 3
    final = summary(only_run(tmp_path))
    assert final["time_to_target_s"] is final["steps_to_target"] is final["tokens_to_target"] is None
    assert f"0.5 nats not reached: {final['val_loss'] - 0.5:.4f} short after 3 steps" in result.stdout


def test_the_same_seed_gives_the_same_curve_and_another_does_not(trainer: Trainer, tmp_path: Path) -> None:
    curves = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert trainer(f"--seed={seed}", f"--run_dir={tmp_path / name}", "--train_steps=10").returncode == 0
        (directory,) = (tmp_path / name).iterdir()
        curves[name] = metrics(directory, "train_loss")
    assert curves["a"] == curves["b"]
    assert curves["a"][10] != curves["c"][10]


@pytest.mark.parametrize("micro_batch_tokens", [32, 96])
def test_the_micro_batch_does_not_change_the_curve(trainer: Trainer, tmp_path: Path, micro_batch_tokens: int) -> None:
    assert trainer(f"--run_dir={tmp_path / 'whole'}").returncode == 0
    assert trainer(f"--run_dir={tmp_path / 'parts'}", f"--micro_batch_tokens={micro_batch_tokens}").returncode == 0
    whole, parts = (metrics(next((tmp_path / name).iterdir()), "val_loss") for name in ("whole", "parts"))
    assert whole == pytest.approx(parts, rel=1e-4)


def tiny_run(tiny_recipe: Path, *arguments: str) -> train_gpt.Run:
    config = load_config([str(tiny_recipe), *arguments])
    return set_up(config, train_gpt.find_machine(config.device, config.dtype))


@pytest.mark.parametrize("micro_batch_tokens", [192, 32])
def test_the_gradient_is_of_the_mean_loss_whatever_the_micro_batch(tiny_recipe: Path, micro_batch_tokens: int) -> None:
    """Curves would not tell a factor: Aurora and AdamW do not feel the scale of a gradient."""
    run = tiny_run(tiny_recipe, f"--micro_batch_tokens={micro_batch_tokens}")
    with torch.no_grad():
        for p in run.model.parameters():  # no zeros, behind which gradients vanish
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / 8)
    inputs, targets = run.batch()
    loss = run.model(inputs.flatten(0, 1), targets.flatten(0, 1)) / targets.numel()
    expected = torch.autograd.grad(loss, list(run.model.parameters()))
    for optimizer in run.optimizers:
        optimizer.step = optimizer.zero_grad = lambda: None  # type: ignore[method-assign, assignment]
    train_step(run, inputs, targets)
    for p, gradient in zip(run.model.parameters(), expected, strict=True):
        assert p.grad is not None
        assert (p.grad - gradient).norm() <= 1e-4 * gradient.norm()


@pytest.mark.parametrize("matrix_optimizer", ["aurora", "adamw"])
def test_warm_up_leaves_no_trace(tiny_recipe: Path, matrix_optimizer: str) -> None:
    """Two runs that start from one seed, one of them warmed up: the same random numbers and bits afterwards."""
    cold, warm = (tiny_run(tiny_recipe, f"--matrix_optimizer={matrix_optimizer}") for _ in range(2))
    torch.manual_seed(1)
    expected_draw = torch.rand(3)
    torch.manual_seed(1)
    warm_up(warm)
    assert torch.equal(torch.rand(3), expected_draw)
    for step in range(3):
        for run in (cold, warm):
            run.follow(plan_step(run.config, step))
            train_step(run, *run.batch())
    for p, q in zip(cold.model.parameters(), warm.model.parameters(), strict=True):
        assert torch.equal(p, q)
    for run in (cold, warm):
        run.loader.close()


@pytest.mark.parametrize("matrix_optimizer", ["aurora", "muon", "adamw"])
def test_resuming_is_the_run_that_was_never_interrupted(
    trainer: Trainer, tmp_path: Path, matrix_optimizer: str
) -> None:
    rule = f"--matrix_optimizer={matrix_optimizer}"
    assert trainer(rule, "--checkpoint_every=20").returncode == 0
    whole = only_run(tmp_path)
    assert sorted(path.name for path in whole.glob("checkpoint*")) == ["checkpoint_000020.pt", "checkpoint_000040.pt"]
    resumed = tmp_path / "resumed"
    result = trainer(rule, f"--resume={whole / 'checkpoint_000020.pt'}", f"--run_dir={resumed}")
    assert result.returncode == 0, result.stderr
    (directory,) = resumed.iterdir()
    for key in ("val_loss", "train_loss"):
        assert metrics(directory, key) == metrics(whole, key)  # those before the checkpoint were taken over
    lines = [
        path.joinpath("log.txt").read_text(encoding="utf-8").rpartition("=" * 100)[2] for path in (whole, directory)
    ]
    steps = [re.findall(r"^step:\d+(?:/\d+ \w+:\S+| epoch.*)", text, flags=re.MULTILINE) for text in lines]
    assert len(steps[0]) == 5 + 8 + 1
    assert steps[0] == steps[1]
    final = summary(directory)
    assert final["train_time_s"] > metrics(whole, "train_time_s")[20]  # time already trained counts
    assert final["resumed_from"] == str(whole / "checkpoint_000020.pt")
    assert sorted(path.name for path in whole.glob("checkpoint*")) == ["checkpoint_000020.pt", "checkpoint_000040.pt"]


def test_divergence_is_one_line_that_names_step_and_checkpoint(trainer: Trainer, tmp_path: Path) -> None:
    result = trainer("--matrix_lr=1e38", "--checkpoint_every=10")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    ended = summary(only_run(tmp_path))
    assert ended["status"] == "diverged"
    assert re.fullmatch(r"by step \d+: .*; last good checkpoint: none", ended["reason"]), ended["reason"]
    assert f"run          diverged {ended['reason']}" in result.stdout
    assert not list(only_run(tmp_path).glob("checkpoint*"))


def test_the_routing_is_told_with_the_rates_of_the_settings(trainer: Trainer) -> None:
    """Not with those of the first step of a warm-up."""
    result = trainer("--warmup_steps=20", "--train_steps=2", "--matrix_lr=0.03")
    rates = re.findall(r"^\w+ +(matrix|embed|head): .*, lr ([0-9.]+), decay", result.stdout, re.MULTILINE)
    assert rates == [("matrix", "0.03"), ("embed", "0.3"), ("head", "0.004")]


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def send_in(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, *stops: signal.Signals, after: bool = False
) -> None:
    """Have a function of the trainer receive signals when it begins, or when it is done."""
    genuine = getattr(place, name)

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if after:
            result = genuine(*args, **kwargs)
        main_thread = threading.main_thread().ident or 0
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)
        for stop in stops:  # os.kill's would go to a thread that does not block it
            signal.pthread_kill(main_thread, stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)  # they arrive together
        return result if after else genuine(*args, **kwargs)

    monkeypatch.setattr(place, name, stopped)


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.name)
def test_every_stop_ends_a_run_with_its_summary(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: signal.Signals
) -> None:
    send_in(monkeypatch, train_gpt, "train_step", stop, signal.SIGTERM)  # the second on top, as torchrun sends it
    result = trainer("--log_every=1")
    assert (result.returncode, result.stderr) == (130, "")
    assert summary(only_run(tmp_path))["status"] == "interrupted"
    assert "run          interrupted" in (only_run(tmp_path) / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.name)
def test_what_the_parent_ignores_ends_nothing(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: signal.Signals
) -> None:
    signal.signal(stop, signal.SIG_IGN)
    send_in(monkeypatch, train_gpt, "train_step", stop)
    assert trainer("--train_steps=2").returncode == 0
    assert signal.getsignal(stop) == signal.SIG_IGN


@pytest.mark.parametrize(
    ("place", "name", "after", "status"),
    [
        (train_gpt, "load_config", False, None),
        (train_gpt, "find_start", False, None),
        (runlog, "run_sources", False, None),
        (runlog, "write_json", False, None),  # of writer.json: the directory is there, and goes again
        (train_gpt.outcome, "first_summary", True, "interrupted"),
        (train_gpt.optim, "routing_table", False, "interrupted"),
        (train_gpt, "warm_up", False, "interrupted"),
        (train_gpt, "evaluate", False, "interrupted"),
        (checkpoint, "to_host", False, "interrupted"),
        (CheckpointWriter, "settle", False, "interrupted"),
        (CheckpointWriter, "_write_file", False, "interrupted"),  # in its thread, while the run waits for it
        (train_gpt, "train", True, "interrupted"),
        (train_gpt.outcome, "finish", False, "finished"),
        (RunLog, "summary", False, "finished"),
        (RunLog, "closing", True, "finished"),
        (sample, "generate", False, "finished"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stop_at_any_moment_leaves_whole_things(
    trainer: Trainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    name: str,
    after: bool,
    status: str | None,
) -> None:
    """status None: there is no run directory."""
    send_in(monkeypatch, place, name, signal.SIGHUP, signal.SIGTERM, after=after)
    in_thread = name == "to_host"
    sampled = ["--tokenizer=byte", "--vocab_size=257", "--train_steps=3", "--val_every=3"]
    result = trainer(*sampled, "--checkpoint_every=2", f"--checkpoint_async={in_thread}")
    assert (result.returncode, result.stderr) == (0 if status == "finished" else 130, "")
    directories = list((tmp_path / "runs").glob("*"))
    if status is None:
        assert not directories
        return
    (directory,) = directories
    assert summary(directory)["status"] == status
    assert not list(directory.glob("*.tmp"))
    for path in directory.glob("*.pt"):
        verify(path)
    if name == "_write_file":  # what was under way is finished first
        assert [path.name for path in directory.glob("*.pt")] == ["checkpoint_000002.pt"]


def test_a_terminal_that_is_gone_ends_nothing(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def isatty(self) -> bool:
            raise ValueError("I/O operation on closed file")

    for stdout, stderr in ((Gone(), Gone()), (None, None)):
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        assert trainer("--train_steps=2", f"--run_dir={tmp_path / str(stdout is None)}").returncode == 0
    for name in ("True", "False"):
        (directory,) = (tmp_path / name).iterdir()
        assert "run          finished" in (directory / "log.txt").read_text(encoding="utf-8")


def test_a_terminal_that_cannot_show_the_sample_ends_nothing(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(sample, "generate", lambda *_: [*"naïve café 日本".encode()])
    result = trainer("--tokenizer=byte", "--vocab_size=257", "--train_steps=2", f"--run_dir={tmp_path}/caf\udce9")
    assert result.returncode == 0
    (log,) = tmp_path.glob("caf*/*/log.txt")
    text = log.read_text(encoding="utf-8")  # its own directory's name, which is not in UTF-8, is told in \x escapes
    assert "sample       naïve café 日本" in text
    assert re.search(r"directory    .*caf\\udce9", text)


def test_an_interrupted_run_leaves_a_whole_directory(tiny_recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tests/warm_trainer.py", str(tiny_recipe), f"--run_dir={tmp_path / 'runs'}"]
    process = subprocess.Popen(
        [*command, "--train_steps=1000000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        encoding="utf-8",
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step:20/1000000 val_loss"):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    final = summary(only_run(tmp_path))
    assert final["status"] == "interrupted"
    assert final["steps"] >= 20
    assert metrics(only_run(tmp_path), "val_loss")[20] > 0
    assert "interrupted" in output


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the pty of Linux")
def test_a_terminal_sees_a_progress_line(tiny_recipe: Path, tmp_path: Path) -> None:
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # rows and columns
    command = [
        sys.executable,
        str(ROOT / "tests/warm_trainer.py"),
        str(tiny_recipe),
        f"--run_dir={tmp_path}",
        "--target_loss=2",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=slave)
    os.close(slave)
    seen = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        seen += chunk
    assert process.wait() == 0
    assert re.search(rb"\d+/40 \[.*val_loss \d\.\d{3}, target 2 in ~\d+s", seen), seen[-2000:]


def test_a_log_opens_with_the_facts_that_its_summary_repeats(trainer: Trainer, tmp_path: Path) -> None:
    assert trainer().returncode == 0
    directory = only_run(tmp_path)
    header = (directory / "log.txt").read_text(encoding="utf-8").split("\n" + "=" * 100 + "\n")[1]
    facts = json.loads(header[header.index("\n{\n") :])
    assert facts.items() <= summary(directory).items()
    assert {"start_utc", "git_commit", "device", "val_fingerprint", "config"} <= facts.keys()


def test_a_run_directory_has_its_name_in_any_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "git_state", lambda: ("", ""))
    monkeypatch.setattr(os, "fsencode", lambda name: str(name).encode("ascii", "surrogateescape"))
    monkeypatch.setattr(os, "fsdecode", lambda name: name.decode("ascii", "surrogateescape"))
    rank = machine.Machine(1, 1, torch.device("cpu"), torch.float32, ())  # one that writes nothing
    log = RunLog(Config(name="é", run_dir="/d"), rank, dict(train_files="", val_files=""))
    assert str(log.directory).startswith("/d/\udcc3\udca9-2")


def test_the_source_in_a_log_is_of_this_repository_alone() -> None:
    sources = run_sources()
    assert {"train_gpt.py", "optim/aurora.py", "data/shards.py"} <= set(sources)
    assert all((ROOT / path).read_text(encoding="utf-8") == source for path, source in sources.items())


def test_source_that_is_no_plain_text_and_what_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "conda"))
    monkeypatch.chdir(tmp_path)
    files = {"latin.py": b"x = '\xe9'\n", "fast.so": b"\x7fELF\xff", ".cache/inductor/ab/cab.py": b"",
             "conda/lib/re.py": b"", "relative.py": b"", "env/site-packages/other.py": b""}  # fmt: skip
    for index, (name, content) in enumerate(files.items()):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        module = types.ModuleType(f"module_{index}")
        module.__file__ = name if name == "relative.py" else str(path)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    gone = types.ModuleType("gone")
    gone.__file__ = str(tmp_path / "gone.py")
    monkeypatch.setitem(sys.modules, "gone", gone)
    assert run_sources() == {
        "gone.py": "# imported, and cannot be read now: No such file or directory\n",
        "latin.py": "x = '\\xe9'\n",
    }


def test_a_log_without_a_commit_says_why(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "git_state", lambda: ("", "a tarball"))
    assert "\nno git commit: a tarball\n" in trainer("--train_steps=1").stdout
    log = parse_log((only_run(tmp_path) / "log.txt").read_text(encoding="utf-8"))
    assert "git (no git commit: a tarball)" in log.machine
    assert not log.broken
    assert log.facts["git_commit"] == summary(only_run(tmp_path))["git_commit"] == ""


# Mistakes: one line, exit status 2, nothing written


def corrupt(tiny_data: Path, tmp_path: Path, change: str) -> str:
    """A copy of the first training shard with one fault; returns its path."""
    content = bytearray((tiny_data / "tiny_train_000001.bin").read_bytes())
    if change == "magic":
        content[0:4] = (1).to_bytes(4, "little")
    elif change == "version":
        content[4:8] = (9).to_bytes(4, "little")
    elif change == "count":
        content[8:12] = (5000).to_bytes(4, "little")
    elif change == "odd":
        content = content[:-1]
    elif change == "token":
        content[1024:1026] = (999).to_bytes(2, "little")
    path = tmp_path / "bad.bin"
    path.write_bytes(content[:500] if change == "short" else content)
    return str(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("magic", ["bad.bin", "magic", "found 1", "20240520"]),
        ("version", ["bad.bin", "version", "found 9", "expected 1"]),
        ("count", ["bad.bin", "truncated", "3001 tokens", "5000"]),
        ("odd", ["bad.bin", "odd"]),
        ("short", ["bad.bin", "500 bytes", "1024"]),
        ("token", ["bad.bin", "token 0", "found 999", "48"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_shard_is_refused(
    trainer: Trainer, tmp_path: Path, tiny_data: Path, change: str, words: list[str]
) -> None:
    assert_refused(trainer(f"--train_files={corrupt(tiny_data, tmp_path, change)}"), tmp_path, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train_files=/nowhere/*.bin"], ["/nowhere/*.bin", "no file"]),
        (["--train_files=data/fineweb10B/none_*.bin"], ["data.prepare fineweb"]),
        (["--batch_tokens=8192", "--micro_batch_tokens=8192"], ["7001 tokens", "8193", "batch_tokens"]),
        (["--val_tokens=6400"], ["4000 validation tokens", "6401", "val_tokens"]),
        (["--batch_tokens=200"], ["batch_tokens", "200", "192"]),
        (["--micro_batch_tokens=100"], ["micro_batch_tokens", "100", "seq_len", "96"]),
        (["--val_tokens=100"], ["val_tokens", "100", "96"]),
        (["--device=cuda"], ["device = 'cuda'", "--device=cpu"]),
        (["--device=tpu"], ["device = 'tpu'", "cpu"]),
        (["--dtype=float8"], ["dtype = 'float8'", "bfloat16"]),
        (["--matrix_optimizer=lion"], ["'lion'", "aurora"]),
        (["--polar_method=qr"], ["'qr'", "polar_express"]),
        (["--aurora_sides=left"], ["'left'", "both"]),
        (["--aurora_variant=hot"], ["'hot'", "warm"]),
        (["--matrix_scale=big"], ["'big'", "match_rms_adamw"]),
        (["--comm_dtype=int8"], ["'int8'", "bfloat16"]),
        (["--resume=nothing.pt"], ["resume = 'nothing.pt'", "No such file"]),
        (["--matrx_lr=1"], ["did you mean matrix_lr?"]),
        (["--train_steps=x"], ["train_steps = 'x' must be a whole number"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_a_mistake_is_one_line(trainer: Trainer, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    if arguments == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert_refused(trainer(*arguments), tmp_path, words)


def test_an_unwritable_run_directory(trainer: Trainer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for place in ("file/runs", "file"):
        assert_refused(
            trainer(f"--run_dir={tmp_path / place}"), tmp_path, ["run_dir", f"{place}'", "cannot be", "Not a"]
        )


def test_a_disk_that_is_full_at_once_is_left_as_it_was(trainer: Trainer, tmp_path: Path) -> None:
    with files_no_larger_than(1000):
        result = trainer()
    assert result.returncode == 2
    assert re.fullmatch(r"error: run_dir = .* cannot be written \(File too large\); choose another.*\n", result.stderr)
    assert not list((tmp_path / "runs").iterdir())


def test_a_validation_shard_is_not_trained_on(trainer: Trainer, tmp_path: Path, tiny_data: Path) -> None:
    words = [f"found {tiny_data}/tiny_val_000000.bin in both", "*_train_*.bin"]
    assert_refused(trainer(f"--train_files={tiny_data}/tiny_*.bin"), tmp_path, words)


def test_a_bad_token_far_into_the_data_ends_the_run_with_its_place(trainer: Trainer, tmp_path: Path) -> None:
    tokens = np.zeros(4000, dtype=np.uint16)
    tokens[3000] = 500
    write_shard(tmp_path / "late.bin", tokens)
    result = trainer(f"--train_files={tmp_path / 'late.bin'}")
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert re.search(r"^error: failed at step \d+: .*late.bin: token 3000: found 500", line)
    ended = summary(only_run(tmp_path))
    assert line == f"error: {ended['status']} {ended['reason']}"


def assert_refused(result: Result, tmp_path: Path, words: list[str]) -> None:
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
    assert not (tmp_path / "runs").exists()
