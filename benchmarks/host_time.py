"""How long Python takes to launch an optimizer step on a GPU that is not here.

    python -m benchmarks.host_time

A step is at least this long, however fast the GPU and however many of them share the work: with 8 of them the polar
factors of a 124 M model take about half a millisecond of each.

Everything from `step` to the launch of a kernel is as with a GPU: torch's operators, this repository's, Triton's search
for the compiled kernel (for sm_90; a second or so each, the first time), its making of arguments and descriptors. The
driver at the end of it does nothing. Matrices are as many as the 124 M model's, but tiny, so that what torch computes
here takes a tenth of the time. Left out are the driver itself, some microseconds for each launch, and collectives.

launches     of Triton kernels
descriptors  that they are given: each is made anew
operators    of torch's own that would launch something: all but views and empty tensors
calls        of functions, Python's and C's: what a change does to the host, without the noise of a clock
ms           the median step, CPU time of its thread
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from harness.results import command, report
from harness.tables import Row
from optim.config import RULES

SHAPES = {(32, 32): 48, (96, 32): 24, (32, 96): 12}  # of the matrices; 768 and 2048 there
FREE = ("view", "select", "unbind", "split", "slice", "t.", "transpose", "unsqueeze", "squeeze", "expand", "detach")


@dataclass(frozen=True)
class Args:
    rules: tuple[str, ...] = ("muon", "aurora", "normuon")
    steps: Annotated[int, ">= 1"] = 50  # that are timed, of each rule in turn


class Launcher:
    """Of one kernel: makes its descriptors, as Triton's own does, and leaves out what that has compiled C for."""

    def __init__(self, source: Any, metadata: Any) -> None:
        from triton.backends.nvidia.driver import wrap_handle_tensordesc

        utils = triton.runtime.driver.active.utils
        self.launch = wrap_handle_tensordesc(utils.launch, source.signature, metadata.tensordesc_meta)

    def __call__(self, *arguments: Any) -> None:
        self.launch(*arguments[:9], arguments[9:])  # before the kernel's come grid, stream, function and hooks


class Driver:
    """Of an H100, as far as Triton asks; counts what would have been launched, and the descriptors for it."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        self.launches = self.descriptors = 0
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, *arguments: Any) -> tuple[int, ...]:
        return 1, 1, 128, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def fill_tma_descriptor_tiled(self, *arguments: Any) -> int:
        self.descriptors += 1
        return 0

    def launch(self, *arguments: Any) -> None:
        self.launches += 1


class Operators(TorchDispatchMode):
    """Counts those that would take a launch of their own."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        is_ours_or_free = not name.startswith("aten.") or name[5:].startswith((*FREE, "empty", "new_empty"))
        self.count += not is_ours_or_free
        return func(*args, **(kwargs or {}))


@contextmanager
def no_gpu() -> Iterator[Driver]:
    """Kernels are compiled for a GPU and launched nowhere; tensors are on the CPU and pass for being on it."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):  # whose launchers take their arguments otherwise
        raise ValueError(f"Triton is {triton.__version__} here, and this needs 3.7 or later")
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set, and nothing would be compiled; unset it")
    driver = Driver()
    with ExitStack() as stack:
        for name, result in (("can_launch", True), ("architecture", 90)):
            stack.enter_context(mock.patch(f"kernels.triton_common.{name}", lambda device, result=result: result))
        stack.enter_context(mock.patch("optim.matrix_optimizer.fast_half_dtype", lambda device_type: torch.float16))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        yield driver


def calls_of(step: Callable[[], Any]) -> int:
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def make_step(rule: str) -> Callable[[], Any]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape, count in SHAPES.items() for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return RULES[rule](params, kernels="triton", defer_check=True).step


def main(args: Args) -> None:
    if unknown := [rule for rule in args.rules if rule not in RULES]:
        raise ValueError(f"rules: {unknown[0]!r} is unknown; choose from {', '.join(RULES)}")
    torch.set_num_threads(1)
    rows: list[Row] = []
    with no_gpu() as driver:
        work = {rule: make_step(rule) for rule in args.rules}
        for rule, step in work.items():
            step()  # makes the banks, compiles the kernels
            driver.launches = driver.descriptors = 0
            with Operators() as operators:
                step()
            row: Row = dict(rule=rule, launches=driver.launches, descriptors=driver.descriptors)
            rows.append(row | dict(operators=operators.count, calls=calls_of(step)))
        seconds: dict[str, list[float]] = {rule: [] for rule in args.rules}
        for _ in range(args.steps):
            for rule, step in work.items():
                start = time.thread_time()
                step()
                seconds[rule].append(time.thread_time() - start)
    for row in rows:
        row["ms"] = 1e3 * statistics.median(seconds[str(row["rule"])])
    report("host_time", rows, "cpu", matrices=sum(SHAPES.values()), steps=args.steps)


if __name__ == "__main__":
    command(main, Args, __doc__)
