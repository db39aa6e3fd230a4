"""A clock on which time passes only where a test lets it: benchmarks' arithmetic, whatever the machine."""

import time
from collections.abc import Callable
from typing import Any

import pytest


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0  # seconds

    def __call__(self) -> float:
        return self.now

    def during(self, seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which takes `seconds`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.now += seconds
            return result

        return timed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """What time.perf_counter, time.monotonic and time.process_time show for the length of a test."""
    fake = FakeClock()
    for name in ("perf_counter", "monotonic", "process_time"):
        monkeypatch.setattr(time, name, fake)
    return fake
