"""Processes that a command starts: a stop is for the command to act on, and whatever ends it ends them. And whether a
process of a given id is still the one it was."""

import contextlib
import ctypes
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from data.console import STOPS, stops_held

GRACE_S = 60.0  # for a run to write its summary in


def pid_scope() -> str:
    """Where a process id means something: host, boot and container. Empty where that cannot be told."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return "/".join([platform.node(), boot, str(Path("/proc/self/ns/pid").readlink())])
    return ""


def start_ticks(pid: int) -> str:
    """Clock ticks from boot to the start of a process of this scope, so that a pid used again is another; empty where
    that cannot be told."""
    stat = _proc_stat(pid)
    return stat[19] if stat else ""


def is_alive(pid: int, ticks: str) -> bool:
    """Whether the process of this scope that has this id and these start ticks still runs; True if in doubt."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    stat = _proc_stat(pid)
    return not stat or (stat[0] not in ("Z", "X") and stat[19] == ticks)  # Z: it ended and waits for its parent


def _proc_stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the third on, which is the state; none where they cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def die_with_parent() -> None:
    """In a child: end when its parent is killed outright. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def leave_stops() -> None:
    """In a child of multiprocessing.Pool, which ends its children by SIGTERM: the other stops are its parent's."""
    for stop in STOPS:
        signal.signal(stop, signal.SIG_DFL if stop == signal.SIGTERM else signal.SIG_IGN)


def end_group(process: subprocess.Popen[Any], grace_s: float = GRACE_S) -> None:
    """End a process that was started as a group of its own: first asked, then, as a whole, told."""
    with stops_held():
        try:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace_s)
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # nothing is left of it
        process.wait()


class Workers(ProcessPoolExecutor):
    """A pool of processes that no stop reaches and that end with the pool's block, however that is left."""

    def __init__(
        self, number: int, prepare: Callable[..., Any] | None = None, *arguments: Any, start: str = "spawn"
    ) -> None:
        """prepare: called with `arguments` in each process first."""
        super().__init__(number, multiprocessing.get_context(start), _prepare_worker, (prepare, *arguments))

    def submit(self, *call: Any, **options: Any) -> Future[Any]:
        with stops_held():  # it starts processes
            return super().submit(*call, **options)

    def __exit__(self, kind: Any, *_: Any) -> None:
        for process in list((self._processes or {}).values()) if kind else ():
            process.kill()  # SIGTERM, the executor's own, does not reach them
        self.shutdown(cancel_futures=bool(kind))  # its thread joins them: of two at once, one misses the other's


def _prepare_worker(prepare: Callable[..., Any] | None, *arguments: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare:
        prepare(*arguments)


def _end_with_parent() -> None:
    """A parent that was killed leaves nobody to hand the result to."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
