"""A command's signals, and its output where nobody takes it or some of it cannot be shown."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data import console
from data.console import STOPS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):  # closed by the test
            os.close(end)


def text_file(descriptor: int, **options: object) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.name)
def test_every_stop_is_a_ctrl_c_unless_the_parent_ignores_it(stop: signal.Signals) -> None:
    signal.signal(stop, signal.SIG_DFL)
    console.prepare()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(stop)
    signal.signal(stop, signal.SIG_IGN)
    console.prepare()
    assert signal.getsignal(stop) == signal.SIG_IGN


def test_a_run_that_is_ending_hears_no_more_stops() -> None:
    console.prepare()
    console.ignore_stops()
    for stop in STOPS:
        signal.raise_signal(stop)


def test_a_pipe_that_is_closed_ends_nothing(pipe: tuple[int, int]) -> None:
    stream = console._lasting(text_file(pipe[1], encoding="utf-8"), pipe[1])
    os.close(pipe[0])
    print("x" * 100_000, file=stream, flush=True)


def test_a_command_that_only_prints_can_tell_that_nobody_reads(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = console._lasting(text_file(pipe[1], encoding="utf-8"), pipe[1])
    monkeypatch.setattr(sys, "stdout", stream)
    print("x", flush=True)
    assert console.has_reader()
    os.close(pipe[0])
    print("x", flush=True)
    assert not console.has_reader()
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a notebook's
    assert console.has_reader()


def test_what_cannot_be_shown_is_spelled_out(pipe: tuple[int, int]) -> None:
    stream = console._lasting(text_file(pipe[1], encoding="ascii"), pipe[1])
    print("naïve \udce9", file=stream, flush=True)
    assert os.read(pipe[0], 100) == b"na\\xefve \\udce9\n"


@pytest.mark.parametrize("option", ["line_buffering", "write_through"])
def test_lines_come_at_once_where_they_did(pipe: tuple[int, int], option: str) -> None:
    """The second is what PYTHONUNBUFFERED makes of a stream."""
    stream = console._lasting(text_file(pipe[1], encoding="utf-8", **{option: True}), pipe[1])
    print("now", file=stream)
    os.set_blocking(pipe[0], False)
    assert os.read(pipe[0], 100) == b"now\n"


def test_a_stream_that_was_closed_takes_its_descriptor(pipe: tuple[int, int]) -> None:
    """Or the next file that is opened would get what is meant for the terminal."""
    os.close(pipe[1])
    stream = console._lasting(None, pipe[1])
    print("x", file=stream, flush=True)
    assert os.fstat(pipe[1]).st_rdev == Path(os.devnull).stat().st_rdev


def test_a_terminal_set_not_to_wait_loses_nothing(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    stream, received = console._lasting(text_file(pipe[1], encoding="utf-8"), pipe[1]), bytearray()

    def read() -> None:
        while len(received) < 300_001:
            received.extend(os.read(pipe[0], 4096))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    print("x" * 300_000, file=stream, flush=True)
    reader.join()
    assert received == b"x" * 300_000 + b"\n"


def test_a_command_with_all_streams_closed_ends_as_ever() -> None:
    program = (
        "import sys; from data import console; console.prepare(); print(1); print(2, file=sys.stderr); sys.exit(7)"
    )
    command = ["bash", "-c", '"$0" -c "$1" >&- 2>&- <&-', sys.executable, program]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 7


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is Linux's")
def test_a_command_says_that_the_disk_its_words_went_to_is_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    stream = console._lasting(text_file(descriptor, encoding="utf-8"), descriptor)
    monkeypatch.setattr(sys, "stdout", stream)
    assert console.run(lambda: print("a table"), "start again") == 2
    assert "No space left on device: what was printed is not whole" in capsys.readouterr().err
    os.close(descriptor)
