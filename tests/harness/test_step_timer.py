"""The step timer on a clock that moves where the test says so."""

import time
from functools import partial

import pytest
import torch

from harness.step_timer import PhaseTimer, Seconds, median_seconds, take_turns
from tests.clock import FakeClock

CPU = torch.device("cpu")


def test_functions_take_turns_and_the_first_turns_are_not_timed(clock: FakeClock) -> None:
    order: list[str] = []
    takes = {"a": iter((9, 1, 5, 2)), "b": iter((99, 30, 10, 20))}

    def work(name: str) -> None:
        order.append(name)
        clock.now += next(takes[name])

    seconds = take_turns({name: partial(work, name) for name in takes}, turns=3, warmups=1)
    assert order == ["a", "b"] * 4
    assert [one.wall for one in seconds["a"]] == [1, 5, 2]
    takes = {"a": iter((1, 5, 2)), "b": iter((30, 10, 20))}
    medians = median_seconds({name: partial(work, name) for name in takes}, turns=3)
    assert (medians["a"].wall, medians["b"].wall) == (2, 20)


def test_no_turn_begins_that_would_end_too_late_but_one_is_timed(clock: FakeClock) -> None:
    work = {"a": clock.during(2, int)}
    assert len(take_turns(work, turns=9, until=clock.now + 6)["a"]) == 3
    assert len(take_turns(work, turns=9, warmups=1, until=clock.now)["a"]) == 1


def test_time_of_the_cpu_and_of_the_clock_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = dict(perf_counter=iter((10.0, 13.0)), process_time=iter((1.0, 1.5)))
    for name, times in clocks.items():
        monkeypatch.setattr(time, name, partial(next, times))
    monkeypatch.setattr("os.times", lambda: (0.0, 0.0, 0.0, 0.0, 0.0))
    assert take_turns({"a": int}, turns=1)["a"] == [Seconds(3.0, 0.5)]


def test_phases_add_up_and_results_pass_through(clock: FakeClock) -> None:
    timer = PhaseTimer(CPU)
    forward, backward = timer.wrap("forward", clock.during(2, max)), timer.wrap("backward", clock.during(3, min))
    assert [forward(1, 2), backward(1, 2), forward(3, 4)] == [2, 1, 4]
    assert timer.seconds() == {"forward": 4, "backward": 3}
