"""The GPU suite: limits that hold, nothing left behind, and a killed suite that goes on where it was."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import gpu_suite, suite_parts
from benchmarks.suite_parts import NOWHERE, Facts, make_parts
from data.shards import write_shard
from harness.overrides import arguments, assignments
from tests.clock import FakeClock
from tests.conftest import ROOT
from tests.fake_suite import GOOD, fake, run_fakes
from train_gpt import load_config

H100 = Facts("NVIDIA H100 80GB HBM3", "h100", True, 79.2, 989e12, "c0ffee", {})


def runs(folder: Path, name: str) -> int:
    path = folder / f"{name}.runs"
    return len(path.read_text(encoding="utf-8")) if path.exists() else 0


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], bool]) -> None:
    """Of what is certain to come; a minute or two, so that a test that would hang fails."""
    for _ in range(2400):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("waited in vain")


STUBBORN = (  # with a child of its own; neither minds SIGTERM
    "import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    "(p / 'pids').write_text(f'{os.getpid()} {child.pid}'); print('busy', flush=True); time.sleep(60)"
)


def test_a_failure_and_a_part_over_its_time_are_said_and_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    genuine = subprocess.Popen.wait

    def wait(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        """The slow part is over its time once it is busy, whatever the machine's."""
        if timeout == 12.5:
            wait_for(lambda: "busy" in (tmp_path / "slow.txt").read_text(encoding="utf-8"))
            raise subprocess.TimeoutExpired("slow", timeout)
        return genuine(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    monkeypatch.setattr(gpu_suite, "GRACE_S", 0.3)
    parts = [
        fake("broken", "print('the reason'); sys.exit(3)"), fake("slow", STUBBORN, limit_s=12.5), fake("good", GOOD),
        fake("mute", ""), fake("elsewhere", GOOD, skip="there is no such thing here"),
    ]  # fmt: skip
    status, records = run_fakes(tmp_path, *parts)
    assert status == 1
    assert {name: record["status"] for name, record in records.items()} == {
        "broken": "failed", "slow": "out of time", "good": "done", "mute": "failed", "elsewhere": "skipped",
    }  # fmt: skip
    assert records["broken"]["last_lines"] == ["the reason"] and records["broken"]["why"] == "exit status 3"
    assert records["slow"]["last_lines"] == ["busy"] and records["slow"]["limit_s"] == 12.5
    assert records["good"]["found"] == {"said": "well"}
    assert "no result that can be read" in records["mute"]["why"]
    wait_for(lambda: not any(is_alive(int(pid)) for pid in (tmp_path / "pids").read_text(encoding="utf-8").split()))
    printed = capsys.readouterr().out
    for words in ("the reason", "OUT OF TIME", "there is no such thing here", "said well"):
        assert words in printed


def test_what_is_done_is_not_run_again_and_what_is_not_is(tmp_path: Path) -> None:
    parts = [fake("good", GOOD), fake("bad", "sys.exit((p / 'mended').exists() - 1)"), fake("skipped", GOOD, skip="no")]
    assert run_fakes(tmp_path, *parts)[0] == 1
    (tmp_path / "mended").touch()
    mended = fake("bad", "print('mended'); sys.exit((p / 'mended').exists() - 1)")
    status, records = run_fakes(tmp_path, parts[0], mended, fake("skipped", GOOD))
    assert status == 0
    assert (runs(tmp_path, "good"), runs(tmp_path, "bad"), runs(tmp_path, "skipped")) == (1, 2, 1)
    assert records["good"]["earlier"] and records["good"]["found"] == {"said": "well"}
    run_fakes(tmp_path, parts[0], commit="another")
    assert runs(tmp_path, "good") == 2


def test_a_part_gets_what_time_is_left_and_none_is_begun_in_vain(tmp_path: Path, clock: FakeClock) -> None:
    parts = [fake("first", GOOD, limit_s=40), dataclasses.replace(fake("second", GOOD, limit_s=90), least_s=50)]
    status, records = run_fakes(tmp_path, *parts, minutes=0.5)
    assert records["first"]["limit_s"] == 30 - gpu_suite.GRACE_S
    assert status == 0 and records["second"]["status"] == "not begun" and runs(tmp_path, "second") == 0
    status, records = run_fakes(tmp_path, *parts, minutes=1)
    assert records["second"]["status"] == "done" and runs(tmp_path, "first") == 1
    assert dataclasses.replace(parts[0], command=("--seconds", "{seconds}")).command_within(40) == ["--seconds", "32"]


def test_results_of_done_parts_alone_are_published(tmp_path: Path) -> None:
    """Neither a failed part's, nor what an earlier try left in the folder that parts write to."""
    write = "(pathlib.Path(os.environ['BENCHMARK_RESULTS']) / f'{sys.argv[2]}_x.json').write_text('{}');"
    parts = [fake(name, write + code, files=f"{name}_*") for name, code in (("a", GOOD), ("b", "sys.exit(1)"))]
    (tmp_path / "results").mkdir()
    (tmp_path / "results/a_old.json").write_text("{}", encoding="utf-8")
    run_fakes(tmp_path, *parts)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_x.json", "gpu_suite_a-gpu.json"]


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_suite_leaves_no_process_and_goes_on(stop: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import signal, sys, pathlib, tests.fake_suite as t; signal.signal(15, signal.default_int_handler);"
        "sleep = '(p / \"pids\").write_text(str(os.getpid())); time.sleep(60)';"
        f"sys.exit(t.run_fakes(pathlib.Path({str(tmp_path)!r}), t.fake('one', t.GOOD), t.fake('two', sleep))[0])"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL) as suite:
        wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text(encoding="utf-8") != "")
        pid = int((tmp_path / "pids").read_text(encoding="utf-8"))
        assert is_alive(pid)
        os.kill(suite.pid, stop)
        assert suite.wait(120) == (130 if stop == signal.SIGTERM else -stop)
    wait_for(lambda: not is_alive(pid))
    status, records = run_fakes(tmp_path, fake("one", GOOD), fake("two", GOOD))
    assert status == 0 and records["one"]["earlier"] and records["two"]["status"] == "done"
    assert (runs(tmp_path, "one"), runs(tmp_path, "two")) == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "polar_speed", "kernels"], "error: --only: no part kernels; parts: kernel_tests, train_step_124m"),
        (["--skip", "polar_tile"], "error: --skip: no part polar_tile; parts: kernel_tests, train_step_124m"),
        (["--minutes", "0"], "error: command line: minutes = 0 must be > 0; 9.0 works"),
        (["--minute", "1"], "error: command line: minute is not a setting; did you mean minutes?"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert gpu_suite.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


def test_a_missing_package_or_gpu_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_suite, "NEEDED", ("torch", "tyr0"))
    assert gpu_suite.main(["--tiny"]) == 2
    assert "tyr0 cannot be imported; install it, or carry it in a folder on PYTHONPATH" in capsys.readouterr().err
    monkeypatch.setattr(gpu_suite, "NEEDED", ())
    answer = subprocess.CompletedProcess([], 0, json.dumps(vars(NOWHERE)), "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    assert gpu_suite.main([]) == 2
    assert "torch finds no CUDA GPU; --tiny runs the whole suite" in capsys.readouterr().err


def test_fresh_forgets_the_parts_and_deletes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that the user has named, which has more in it; on a file system without locks."""

    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    monkeypatch.setattr(gpu_suite, "find_facts", lambda tiny: NOWHERE)
    monkeypatch.setattr(gpu_suite, "run_suite", lambda *_: 0)
    for name in ("polar_speed.json", "mine.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert gpu_suite.main(["--tiny", "--fresh", "--folder", str(tmp_path), "--only", "polar_quality"]) == 0
    assert (tmp_path / "mine.json").exists() and not (tmp_path / "polar_speed.json").exists()
    assert "there are no locks here" in capsys.readouterr().err


@pytest.mark.parametrize("commit", ["", "c0ffee-dirty"])
def test_what_was_done_before_by_an_unknown_commit_is_said(
    commit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert run_fakes(tmp_path, fake("good", GOOD), commit=commit)[0] == 0
    assert capsys.readouterr().out.count("what was done before may be of other code") == 1


@pytest.mark.parametrize("memory_gib", [79.2, 39.4, 22.0])
@pytest.mark.parametrize("peak_flops", [989e12, 125e12, 0.0])
def test_the_real_commands_are_ones_the_trainer_takes(memory_gib: float, peak_flops: float, tmp_path: Path) -> None:
    facts = dataclasses.replace(H100, memory_gib=memory_gib, peak_flops=peak_flops)
    write_shard(tmp_path / "x_train_000001.bin", [1])
    write_shard(tmp_path / "x_val_000000.bin", [1])
    parts = {part.name: part for part in make_parts(facts, tmp_path, tmp_path, tiny=False)}
    for name in ("train_step_124m", "train_step_355m", "classics"):
        assert not parts[name].skip
        command = parts[name].command_within(100)
        settings = arguments(assignments(command[command.index("--set") + 1 :]))
        config = load_config([command[2], *settings])
        assert config.batch_tokens % config.micro_batch_tokens == 0 and config.micro_batch_tokens % config.seq_len == 0
        assert config.seq_len == 1024 and config.compile
    assert config.batch_tokens == 65536  # the classics recipes' own
    assert "--matrix_optimizers adamw muon aurora" in " ".join(parts["train_step_124m"].command) or memory_gib < 30


def test_the_tiny_commands_are_too(tmp_path: Path) -> None:
    suite_parts.make_inputs(tmp_path, tiny=True)
    for part in make_parts(H100, tmp_path, tmp_path, tiny=True):
        if "--set" in part.command:
            config = load_config(
                [part.command[2], *arguments(assignments(part.command[part.command.index("--set") + 1 :]))]
            )
            assert config.model_dim == 32


def test_without_shards_the_race_says_what_to_put_where(tmp_path: Path) -> None:
    parts = {part.name: part for part in make_parts(H100, tmp_path, tmp_path / "classics", tiny=False)}
    assert f"no shards in {tmp_path / 'classics'}: put classics_train_000001.bin" in parts["classics"].skip


def test_training_steps_are_held_to_the_targets() -> None:
    """Shares are those of a step of 524,288 tokens, whatever batch was timed."""
    rows = [
        {"variant": variant, "matrix_optimizer": "muon", "tokens_per_s": rate, "MFU": mfu, "optimizer_%": 4.0,
         "loss_diff": diff, "peak_mib": 2048}
        for variant, rate, mfu, diff in (("plain", 4e5, 0.4, 0), ("all", 5e5, 0.52, 1e-3))
    ]  # fmt: skip
    content = {"settings": {"batch_tokens": 65536, "rounds_done": 4}, "rows": rows}
    found = suite_parts.find_train_step(content, with_targets=True)
    assert found.figures["rates"] == {"muon": {"plain": 4e5, "all": 5e5}}
    verdicts = {each.name: (each.value, each.verdict) for each in found.targets}
    assert verdicts["muon: MFU, all on (%)"] == (52, "met by 2.00")
    assert verdicts["muon: tokens/s, all on over plain"] == (1.25, "NOT MET by 0.05")
    share, verdict = verdicts["muon: optimizer's share at 524288 tokens per step (%)"]
    assert share == pytest.approx(100 * 4 / (4 + 96 * 8)) and verdict.startswith("met by 0.98")
    assert verdicts["muon: losses of all on and plain differ by at most (nats)"] == (1e-3, "")


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("==== 3 failed, 30 passed, 2 skipped in 5.02s ====", {"failed": 3, "passed": 30, "skipped": 2}),
        ("15 passed, 372 deselected in 2.51s", {"passed": 15, "deselected": 372}),
    ],
)
def test_tests_are_counted(line: str, counts: dict[str, int]) -> None:
    assert suite_parts.find_tests(["FAILED tests/x.py::y - 1 failed", line, ""], {}).figures == counts


@pytest.mark.slow
def test_a_tiny_suite_runs_for_real(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--tiny", "--only", "train_step_355m", "polar_tiles"]
    command += ["--folder", str(tmp_path / "state"), "--out", str(tmp_path / "out")]
    before = sorted((ROOT / "benchmarks/results").iterdir())
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100, encoding="utf-8"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    names = sorted(path.name.partition("_intel")[0] for path in (tmp_path / "out").iterdir())
    assert len(names) == 3 and sorted((ROOT / "benchmarks/results").iterdir()) == before
    (path,) = (tmp_path / "out").glob("gpu_suite_*.json")
    steps, tiles = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert (steps["status"], tiles["status"]) == ("done", "skipped")
    assert set(steps["found"]["rates"]) == {"adamw", "muon", "aurora"}
    assert path.with_suffix(".png").exists()
