"""A command's signals and streams, the same for all commands of the repository. A leaf.

A command is stopped by any of STOPS as by Ctrl-C, and by none that its parent chose to ignore (`nohup`, `trap ''`).
What it prints is for whoever is there: a terminal that went away, a closed pipe, or a character that cannot be
shown ends nothing.
"""

import atexit
import contextlib
import errno
import io
import math
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

GOES_ON = "the same command goes on from here"  # what to tell of a command that keeps what it has done
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
ONE_STOP_S = 1.0  # stops that come together are one: a terminal that goes away, or torchrun's own on top
_last_stop_s = -math.inf
_is_held = _was_stopped = False


def run(command: Callable[[], int | None], go_on: str = GOES_ON) -> int:
    """The exit status of a whole command, the work of its main: what it returns (None is 0), 2 for a ValueError or an
    OSError, told in one line, or 130 when it was stopped, with a line that says how to go on."""
    prepare()
    try:
        status = command() or 0
        sys.stdout.flush()
        if isinstance(sys.stdout.buffer, io.BufferedWriter) and isinstance(sys.stdout.buffer.raw, _LastingFile):
            sys.stdout.buffer.raw.raise_if_full()
        return status
    except (ValueError, OSError) as error:
        # A library's may have several lines
        print("error:", " ".join(map(str.strip, str(error).splitlines())), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        ignore_stops()
        print(f"interrupted; {go_on}", file=sys.stderr)
        return 130


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


def has_reader() -> bool:
    """Whether somebody still takes what is printed, as far as printing has told: for a command that only prints."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.has_reader if isinstance(raw, _LastingFile) else True


def prepare() -> None:
    """Called first in a command's main: stops raise KeyboardInterrupt, printing never fails, no stream is None."""
    accept_stops()
    atexit.register(_handle_stops, signal.SIG_IGN)  # lest one ends an interpreter without handlers with another status
    if sys.stdin is None:  # the descriptor is closed, and as the lowest that is free it is the one that is taken
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):  # not where a test or a notebook has put its own
            setattr(sys, name, _lasting(getattr(sys, name), descriptor))


def accept_stops() -> None:
    """A stop raises KeyboardInterrupt, from the start or again after `ignore_stops`."""
    global _last_stop_s
    _last_stop_s = -math.inf
    _handle_stops(_stop)


def ignore_stops() -> None:
    """A run that is ending writes its summary, whatever else is sent: torchrun, say, sends its own on top."""
    _handle_stops(_ignore)  # not SIG_IGN, which would pass for the parent's choice


def _handle_stops(handler: Callable[[int, Any], None] | signal.Handlers) -> None:
    for stop in STOPS:
        if signal.getsignal(stop) != signal.SIG_IGN:
            signal.signal(stop, handler)


def _stop(number: int, frame: Any) -> None:
    """Two at once must not end what the first one sets going; one that was lost in a destructor can be sent again."""
    global _last_stop_s, _was_stopped
    _was_stopped = True
    now_s = time.monotonic()
    if not _is_held and now_s - _last_stop_s >= ONE_STOP_S:
        _last_stop_s = now_s
        raise KeyboardInterrupt


def _ignore(number: int, frame: Any) -> None:
    pass


@contextlib.contextmanager
def stops_held() -> Iterator[None]:
    """Stops wait until the block ends. Processes started in it never see one: they are this one's to kill."""
    global _is_held, _was_stopped
    before, mask = (_is_held, _was_stopped), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        _is_held, _was_stopped = True, False  # a thread that does not block it may still take a stop for all of them
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        yield
    finally:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # those that waited arrive here
        finally:
            was_stopped, (_is_held, _was_stopped) = _was_stopped, before
        if was_stopped:
            _stop(signal.SIGINT, None)


def _lasting(stream: io.TextIOWrapper | None, descriptor: int) -> io.TextIOWrapper:
    """The same stream on a file that takes everything, in characters that it can show."""
    if stream is None:  # the descriptor is closed: taken now, lest the next file that is opened becomes the terminal
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.set_inheritable(descriptor, True)  # and becomes nothing else in a child
        if nowhere != descriptor:
            os.close(nowhere)
    else:
        stream.flush()
    by_lines = stream is None or stream.line_buffering or stream.write_through  # the last with PYTHONUNBUFFERED
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(descriptor, "w", closefd=False)), errors="backslashreplace",
        encoding=stream.encoding if stream else "utf-8", line_buffering=by_lines,
    )  # fmt: skip


class _LastingFile(io.FileIO):
    """A file that drops what its other end no longer takes, and remembers if that was a full disk."""

    full: OSError | None = None
    has_reader = True

    def raise_if_full(self) -> None:
        if self.full:
            raise OSError(self.full.errno, f"{self.full.strerror}: what was printed is not whole")

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # a terminal that another program has set not to wait
                select.select([], [self], [])
            return written
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self.full = error
            self.has_reader &= error.errno != errno.EPIPE
            return len(data)
