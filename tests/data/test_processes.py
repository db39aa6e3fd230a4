"""Commands and the processes they start: what ends them, and how that is said."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data import console
from data.processes import Workers, end_group, is_alive, pid_scope, start_ticks


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "status", "line"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raising(ValueError("steps = 0 must be 1 or more")), 2, "error: steps = 0 must be 1 or more\n"),
        (raising(FileNotFoundError(2, "No such file", "x")), 2, "error: [Errno 2] No such file: 'x'\n"),
        (raising(KeyboardInterrupt()), 130, "interrupted; start again\n"),
    ],
    ids=["nothing", "status", "value", "file", "stop"],
)
def test_a_command_ends_with_a_status_and_one_line(
    command: Callable[[], int | None], status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run(command, "start again") == status
    assert capsys.readouterr().err == line


def test_a_stop_waits_until_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    done = []
    with pytest.raises(KeyboardInterrupt):
        with console.stops_held():
            signal.raise_signal(signal.SIGHUP)
            done.append("in the block")
        done.append("after it")
    assert done == ["in the block"]


def blocked_stops() -> set[int]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(console.STOPS)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_no_stop_reaches_a_worker_and_none_outlives_an_error(start: str) -> None:
    """The second of two tasks would take an hour."""
    with pytest.raises(ZeroDivisionError), Workers(2, start=start) as pool:
        assert pool.submit(blocked_stops).result() == set(console.STOPS)
        pool.submit(time.sleep, 3600)
        pool.submit(divmod, 1, 0).result()
    assert not multiprocessing.active_children()
    assert not blocked_stops()


def test_a_group_that_does_not_end_when_asked_is_ended(tmp_path: Path) -> None:
    """Neither the process nor its child minds SIGTERM."""
    code = (
        "import os, pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); pid = os.fork();"
        "pid and pathlib.Path(sys.argv[1]).write_text(str(pid)); time.sleep(3600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "child")], start_new_session=True)
    for _ in range(2400):
        if (tmp_path / "child").exists() and (tmp_path / "child").read_text(encoding="utf-8"):
            break
        time.sleep(0.05)
    end_group(process, grace_s=0.1)
    assert process.returncode == -signal.SIGKILL
    child = int((tmp_path / "child").read_text(encoding="utf-8"))
    for _ in range(2400):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child goes on")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_process_is_told_from_a_later_one_of_the_same_id() -> None:
    assert pid_scope() == pid_scope() != ""
    process = subprocess.Popen(["sleep", "60"])
    ticks = start_ticks(process.pid)
    assert ticks.isdecimal()
    assert is_alive(process.pid, ticks)
    assert not is_alive(process.pid, "1")
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(process.pid, ticks)  # it ended, and nobody has asked how
    process.wait()
    assert not is_alive(process.pid, ticks)
