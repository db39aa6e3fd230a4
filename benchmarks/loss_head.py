"""Head, soft cap and cross-entropy, forward and backward: the fused operator beside plain torch, time and memory.

    python -m benchmarks.loss_head --shapes 16384x50304x64 2048x320x128

A shape is tokens x vocabulary x width. `plain` is what one writes down: logits by F.linear in `dtype`, float32 from
there on, tanh, F.cross_entropy; `float8` is the fused operator with logits from operands in 8 bits. Loss and gradients
of each are compared with float64 first; what is further off than the plain way's own rounding, or with 8 bits than
COARSE, is not timed. Memory is the most that one forward and backward pass takes beyond the
inputs and what the libraries hold after a small pass: on a GPU what torch allocated, on a CPU the process's resident
memory, each variant in a process of its own.
"""

import math
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.processes import Workers
from harness.machine import find_machine
from harness.results import command, report
from harness.step_timer import median_seconds
from harness.tables import Row
from kernels.linear import has_float8
from kernels.linear_cross_entropy import linear_cross_entropy

SOFTCAP = 15.0
DEFAULT_SHAPES = {"cpu": ("16384x50304x64", "2048x320x128"), "cuda": ("32768x50304x768",)}
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Args:
    shapes: tuple[str, ...] = ()  # tokens x vocabulary x width, each; by default what the device is meant for
    dtype: str = "bfloat16"  # format of the hidden state and the products; weights are float32
    device: str = "auto"  # auto, cuda or cpu
    passes: int = 5  # turns of each variant; the table has medians


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in nats as it is usually written."""
    logits = F.linear(x, weight.to(x.dtype)).float()
    return F.cross_entropy(SOFTCAP * torch.tanh(logits / SOFTCAP), targets, ignore_index=-1, reduction="sum")


def fused(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(x, weight, targets, softcap=SOFTCAP)


def float8(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(x, weight, targets, softcap=SOFTCAP, float8=True)


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": plain, "fused": fused, "float8": float8}
COARSE = 0.2  # error that 8 bits may have, of loss and gradients


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x of norm sqrt(D) a row as after RMSNorm, weights that give logits of size 5, uniform targets."""
    N, V, D = shape
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, D, generator=generator, device=device).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, device=device).mul_(5 / D**0.5).to(dtype).float().requires_grad_()
    return x, weight, torch.randint(V, (N,), generator=generator, device=device)


def forward_backward(variant: str, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradients in x and weight."""
    loss = VARIANTS[variant](x, weight, targets)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


def exact(x: Tensor, weight: Tensor, targets: Tensor, rows: int = 256) -> tuple[Tensor, ...]:
    """The same in float64, some rows at a time."""
    loss, dx, W = torch.zeros((), dtype=torch.float64), [], weight.detach().double().requires_grad_()
    dW = torch.zeros_like(W)
    for part, wanted in zip(x.detach().double().split(rows), targets.split(rows), strict=True):
        part.requires_grad_()
        part_loss = F.cross_entropy(SOFTCAP * torch.tanh(part @ W.mT / SOFTCAP), wanted, reduction="sum")
        part_dx, part_dW = torch.autograd.grad(part_loss, (part, W))
        loss += part_loss.detach().cpu()
        dx.append(part_dx)
        dW += part_dW
    return loss, torch.cat(dx), dW


def errors(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    pairs = zip(results, expected, strict=True)
    return [float((result.double() - e.to(result.device)).norm() / e.norm()) for result, e in pairs]


def peak_bytes(variant: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> int:
    """The most memory that a forward and backward pass of `variant` takes beyond its inputs."""
    if device.type == "cuda":
        inputs = make_inputs(shape, dtype, device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        forward_backward(variant, *inputs)
        return torch.cuda.max_memory_allocated(device) - before
    with Workers(1) as pool:
        return pool.submit(grown_resident_bytes, variant, shape, dtype).result()


def grown_resident_bytes(variant: str, shape: Shape, dtype: torch.dtype) -> int:
    """For a fresh process: by how much one pass raises the most that was ever resident."""
    cpu = torch.device("cpu")
    forward_backward(variant, *make_inputs((2, 64, shape[2]), dtype, cpu))  # what libraries keep for themselves
    inputs = make_inputs(shape, dtype, cpu)
    before = peak_resident_bytes()
    forward_backward(variant, *inputs)
    return peak_resident_bytes() - before


def peak_resident_bytes() -> int:
    """The most memory this process ever held. On Linux not by getrusage, which counts what the parent held too."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def measure(shape: Shape, dtype: torch.dtype, device: torch.device, passes: int) -> Iterator[Row]:
    variants = [variant for variant in VARIANTS if variant != "float8" or has_float8(device)]
    peaks = {variant: peak_bytes(variant, shape, dtype, device) for variant in variants}
    inputs = make_inputs(shape, dtype, device)
    expected = exact(*inputs)
    found = {variant: errors(forward_backward(variant, *inputs), expected) for variant in variants}
    del expected
    rounding = [min(1.05 * error + 1e-6, 0.02) for error in found["plain"]]
    allowed = {variant: [COARSE] * 3 if variant == "float8" else rounding for variant in variants}
    wrong = {
        variant: ", ".join(f"{name} {e:.2g}" for name, e in zip(("loss", "dx", "dW"), found[variant], strict=True))
        for variant in variants
        if not all(e <= a for e, a in zip(found[variant], allowed[variant], strict=True))
    }
    timed = {v: (lambda v=v: forward_backward(v, *inputs)) for v in variants if v not in wrong}
    seconds = {variant: time.wall for variant, time in median_seconds(timed, passes, device=device).items()}
    for variant in variants:
        row: Row = {"tokens": shape[0], "vocabulary": shape[1], "width": shape[2], "variant": variant}
        row |= dict(check=f"errors {wrong[variant]}" if variant in wrong else "right", ms="", of_plain="", tflops="")
        if time_s := seconds.get(variant):
            row |= dict(ms=1e3 * time_s, of_plain=time_s / seconds["plain"] if "plain" in seconds else "")
            row["tflops"] = 6 * math.prod(shape) / time_s / 1e12
        yield row | dict(peak_mib=peaks[variant] / 2**20, peak_of_plain=peaks[variant] / peaks["plain"])


def main(args: Args) -> int:
    machine = find_machine(args.device, args.dtype)
    shapes = args.shapes or DEFAULT_SHAPES[machine.device.type]
    rows = [row for shape in shapes for row in measure(parse(shape), machine.dtype, machine.device, args.passes)]
    report("cross_entropy", rows, str(machine.device), shapes=shapes, dtype=str(machine.dtype), passes=args.passes)
    return int(any(row["check"] != "right" for row in rows))


def parse(shape: str) -> Shape:
    sizes = shape.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"shapes: {shape!r} must be tokens x vocabulary x width, as in 2048x320x128")
    N, V, D = map(int, sizes)
    return N, V, D


if __name__ == "__main__":
    command(main, Args, __doc__)
