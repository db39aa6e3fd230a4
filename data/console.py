"""A command's signals and streams, the same for all commands of the repository. A leaf.

A command is stopped by any of STOPS as by Ctrl-C, and by none that its parent chose to ignore (`nohup`, `trap ''`).
What it prints is for whoever is there: a terminal that went away, a closed pipe, or a character that cannot be
shown ends nothing.
"""

import io
import os
import select
import signal
import sys
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def prepare() -> None:
    """Called first in a command's main: stops raise KeyboardInterrupt, printing never fails."""
    for stop in STOPS:
        if signal.getsignal(stop) != signal.SIG_IGN:
            signal.signal(stop, signal.default_int_handler)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):  # not where a test or a notebook has put its own
            setattr(sys, name, _lasting(getattr(sys, name), descriptor))


def ignore_stops() -> None:
    """A run that is ending writes its summary, whatever else is sent: torchrun, say, sends its own on top."""
    for stop in STOPS:
        signal.signal(stop, signal.SIG_IGN)


def _lasting(stream: io.TextIOWrapper | None, descriptor: int) -> io.TextIOWrapper:
    """The same stream on a file that takes everything, in characters that it can show."""
    if stream is None:  # the descriptor is closed: taken now, lest the next file that is opened becomes the terminal
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    else:
        stream.flush()
    by_lines = stream is None or stream.line_buffering or stream.write_through  # the last with PYTHONUNBUFFERED
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(descriptor, "w", closefd=False)), errors="backslashreplace",
        encoding=stream.encoding if stream else "utf-8", line_buffering=by_lines,
    )  # fmt: skip


class _LastingFile(io.FileIO):
    """A file that drops what its other end no longer takes."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # a terminal that another program has set not to wait
                select.select([], [self], [])
            return written
        except OSError:
            return len(data)
