"""Times of work that is handed over: whole calls that take turns, and the phases inside a call."""

import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

Name = TypeVar("Name", bound=Hashable)


class Seconds(NamedTuple):
    wall: float
    cpu: float  # of this process and of the children it waited for: what other users of the machine hardly change


def take_turns(
    work: Mapping[Name, Callable[[], object]], turns: int, warmups: int = 0, device: torch.device | None = None,
    until: float = math.inf,
) -> dict[Name, list[Seconds]]:  # fmt: skip
    """Seconds of every call of each function. Functions take turns, so that a slow moment of a shared machine does not
    fall on one alone. What they start on a GPU, given as `device`, is waited for. `warmups` more turns come first.

    until: begin no turn that would end later than this by time.monotonic and by what the last turn took; one is always
    timed.
    """
    seconds: dict[Name, list[Seconds]] = {name: [] for name in work}
    begun = time.monotonic()
    for turn in tqdm(range(warmups + turns), desc="timing", unit="turn", leave=False, disable=None):
        begun, last_s = time.monotonic(), time.monotonic() - begun
        if turn > warmups and begun + last_s > until:
            break
        for name, function in work.items():
            start = _now()
            function()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= warmups:
                seconds[name].append(Seconds(*(b - a for a, b in zip(start, _now(), strict=True))))
    return seconds


def _now() -> Seconds:
    return Seconds(time.perf_counter(), time.process_time() + sum(os.times()[2:4]))


def median_seconds(
    work: Mapping[Name, Callable[[], object]], turns: int, warmups: int = 0, device: torch.device | None = None
) -> dict[Name, Seconds]:
    """Medians of `take_turns`."""
    seconds = take_turns(work, turns, warmups, device)
    return {name: Seconds(*map(statistics.median, zip(*times, strict=True))) for name, times in seconds.items()}


class PhaseTimer:
    """Seconds spent inside wrapped functions, by phase: of the host on a CPU; on a GPU of the device's stream, by
    events, which make nothing wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._intervals: list[tuple[str, Any, Any]] = []  # phase, start, end

    def wrap(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._mark()
            result = function(*args, **kwargs)
            self._intervals.append((phase, start, self._mark()))
            return result

        return timed

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """Totals by phase; the device must have finished."""
        totals = defaultdict[str, float](float)
        for phase, start, end in self._intervals:
            totals[phase] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
        return dict(totals)
