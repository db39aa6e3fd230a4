"""`profile = true`: where the time of a training step goes, on the first rank's device.

A trace for https://ui.perfetto.dev or chrome://tracing in the run directory, and the ten largest costs as lines of the
log. The profiled step is slower than others and counts on the clock; what is then written is a phase of its own.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from harness.machine import Clock
from harness.runlog import RunLog

STEP = 5  # the profiled one of those this process trains, from 0; earlier ones still fill caches
TRACE = "trace.json.gz"


class StepProfiler:
    """`with profiler.step(): ...` around each of the `num_steps` training steps to come."""

    def __init__(self, log: RunLog, clock: Clock, num_steps: int) -> None:
        self.log, self.clock, self.is_cuda, self.done = log, clock, clock.device.type == "cuda", 0
        if num_steps <= STEP:
            log.line(f"profile: none, as it is of the {STEP + 1}th step to come, and {num_steps} are left")

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        self.done += 1
        if self.done != STEP + 1:
            yield
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_cuda else [])]
        with profile(activities=activities) as found:
            yield
            self.clock.switch("profile")  # waits for the device, whose kernels are then in the profile
        path = self.log.directory / TRACE
        try:
            found.export_chrome_trace(str(path))
        except BaseException:  # a stop too: no half of it
            path.unlink(missing_ok=True)
            raise
        self.log.line(f"profile of a step, the ten largest costs; the whole: {path}")
        for line in largest_costs(found.key_averages(), self.is_cuda):
            self.log.line(line)


def largest_costs(events: Any, is_cuda: bool) -> list[str]:
    """Milliseconds and calls of what took longest by itself, without what it called: kernels on a GPU, operators on a
    CPU."""
    costs = [((event.self_device_time_total if is_cuda else event.self_cpu_time_total) / 1e3, event.count, event.key)
             for event in events if (event.device_type != DeviceType.CPU) == is_cuda]  # fmt: skip
    whole_ms = sum(time_ms for time_ms, _, _ in costs) or 1.0
    return [f"{time_ms:10.3f} ms  {time_ms / whole_ms:6.1%}  {count:6} calls  {name[:80]}"
            for time_ms, count, name in sorted(costs, reverse=True)[:10]]  # fmt: skip
