"""Time of orthogonalising hidden matrices: plain torch, compiled torch, torch.optim.Muon's routine, and ours.

    python -m benchmarks.polar_speed                          the cases of this device, checked, then timed
    python -m benchmarks.polar_speed --cases 124m 1024        some of them
    ./run.sh bench polar_speed polar_quality polar_tiles      checks, times and tile sizes: all there is for one GPU

A variant is timed only if its result, on the first and last matrix of every shape, is as near to float64 Newton-Schulz
with the same coefficients as it should be. Variants take turns. FLOPs and bytes are counted by running the real code
with counting kernels: `executed` are those, `effective` what the dense direct form would need for the same result. The
roofline is the larger of FLOPs / matrix-product rate and bytes / copy rate, both measured on this device just before.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from harness.results import command, report
from harness.step_timer import median_seconds, take_turns
from harness.tables import Row
from kernels import Backend, backend
from optim.aurora import aurora_polar
from optim.polar import COEFFICIENTS, SAFETY, polar

Shape = tuple[int, int, int]  # B, m, n
# Hidden matrices of the recipes as the optimizer sees them: gate and up tall, down wide, Q K V and output square.
CASES: dict[str, list[Shape]] = {
    "124m": [(24, 2048, 768), (12, 768, 2048), (48, 768, 768)],
    "1b": [(36, 5504, 2048), (18, 2048, 5504), (72, 2048, 2048)],
    **{f"{n}": [(1, n, n)] for n in (512, 768, 1024, 2048, 4096)},
    **{f"{m}x{n}": [(1, m, n)] for m, n in ((2048, 768), (768, 2048), (3072, 768), (5504, 2048))},
}
CPU_CASES = ("512", "768", "1024", "2048x768", "768x2048", "3072x768")


@dataclass(frozen=True)
class Args:
    cases: tuple[str, ...] = ()  # such as 124m, 1024 or 2048x768; by default all on a GPU, single matrices on a CPU
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    passes: int = 15  # turns of each variant; the table has medians


def normalized(X: Tensor, method: str) -> Tensor:
    """X as the steps of `method` take it: divided by its norm, or for AOL the shorter side scaled (a square's rows)."""
    if (safety := SAFETY[method]) is not None:
        return X / (safety * torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True))
    if X.size(-2) > X.size(-1):
        return normalized(X.mT, method).mT
    return X * (X @ X.mT).abs().sum(dim=-1, keepdim=True).rsqrt()


def dense_polar(X: Tensor, dtype: torch.dtype, method: str = "polar_express") -> Tensor:
    """The direct form as one would write it, batched: the baseline of every ratio."""
    wide = X.size(-2) < X.size(-1)
    X = normalized(X.to(dtype), method)
    X = X.mT if wide else X
    for a, b, c in COEFFICIENTS[method]:
        R = X.mT @ X
        # Without c not by alpha=0: some CPUs' products in bfloat16 then forget beta
        X = torch.baddbmm(X, X, torch.baddbmm(R, R, R, beta=b, alpha=c) if c else b * R, beta=a)
    return X.mT if wide else X


def torch_muon_polar(X: Tensor) -> Tensor:
    """torch.optim.Muon's own, which takes one matrix at a time, in bfloat16."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    coefficients = COEFFICIENTS["quintic"]
    return torch.stack([_zeropower_via_newtonschulz(matrix, coefficients[0], len(coefficients), 1e-7) for matrix in X])


def exact_aurora(X: Tensor, iterations: int, beta: float = 0.5) -> Tensor:
    """Aurora's definition in float64, with dense Polar Express for the polar factor."""
    if X.size(-2) <= X.size(-1):
        return exact_aurora(X.mT, iterations, beta).mT if X.size(-2) < X.size(-1) else dense_polar(X, torch.float64)
    m, n = X.shape[-2:]
    X = X.double()
    d = 1 / X.norm(dim=-1, keepdim=True)
    for k in range(iterations):
        U = dense_polar(d * X, torch.float64)
        if k < iterations - 1:
            d = d * (n / (m * U.square().sum(dim=-1, keepdim=True))) ** beta
    return U


@dataclass(frozen=True)
class Variant:
    name: str
    run: Callable[[Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]
    tolerance: float  # ||result - exact|| / ||exact||


def variants(dtype: torch.dtype) -> list[Variant]:
    """Variants in the table's order; the first is the baseline. Tolerances: rounding of five steps in the format."""
    tolerance, exact = 5e-4 if dtype == torch.float32 else 0.02, partial(dense_polar, dtype=torch.float64)
    torch._dynamo.reset()  # a function is compiled for 8 shapes at most, then runs as it is
    dense = torch.compile(dense_polar, dynamic=False)
    forms, turns = ("direct", "gram", "auto"), (1, 2, 3)
    return [
        Variant("torch eager", partial(dense_polar, dtype=dtype), exact, tolerance),
        Variant("torch.compile", partial(dense, dtype=dtype), exact, tolerance),
        Variant("torch.optim.Muon", torch_muon_polar, partial(exact, method="quintic"), 0.02),  # always in bfloat16
        *(Variant(form, partial(polar, dtype=dtype, form=form), exact, tolerance) for form in forms),
        *(Variant(f"aurora K={k}", partial(aurora_polar, iterations=k, dtype=dtype),
                  partial(exact_aurora, iterations=k), 2 * tolerance) for k in turns),
    ]  # fmt: skip


def failure(variant: Variant, inputs: Sequence[Tensor]) -> str:
    """Why a variant must not be timed; empty if its first and last matrix of every shape are right."""
    for X in inputs:
        ends = slice(None, None, max(1, X.size(0) - 1))  # the first and the last
        exact = variant.exact(X[ends].double())
        error = float((variant.run(X)[ends].double() - exact).norm() / exact.norm())
        if not error <= variant.tolerance:
            return f"error {error:.2g} at {X.size(-2)}x{X.size(-1)}, allowed {variant.tolerance}"
    return ""


@dataclass
class Count:
    flops: float = 0.0
    bytes: float = 0.0

    def kernels(self, ops: Backend) -> Backend:
        """`ops` with every call counted: what it multiplies, and what it reads and writes at least."""

        def counting(name: str) -> Callable[..., Any]:
            kernel = getattr(ops, name)

            def run(*arguments: Any, **options: Any) -> Any:
                results = kernel(*arguments, **options)
                outputs = results if isinstance(results, tuple) else (results,)
                tensors = [t for t in (*arguments, *options.values(), *outputs) if isinstance(t, Tensor)]
                unique = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}
                self.bytes += sum(unique.values())
                B, m, n = arguments[0].shape
                self.flops += B * m * n * n * flops.get(name, 0.0)
                return results

            return run

        half = 1.0 if ops.symmetric else 2.0  # of a symmetric product one triangle is computed
        flops = {"gram": half, "symmetric_product": half, "apply_symmetric": 2.0}  # of each m n n
        return Backend(ops.name, ops.symmetric, *map(counting, Backend._fields[2:]))


def dense_count(shapes: Iterable[Sequence[int]], itemsize: int, steps: int = 5) -> Count:
    """The direct form with dense products: 4 s^2 l + 2 s^3 FLOPs a step, 6 s l + 8 s^2 entries in three products."""
    count = Count()
    for B, m, n in shapes:
        s, l = min(m, n), max(m, n)  # noqa: E741
        count.flops += B * steps * (4.0 * s * s * l + 2.0 * s**3)
        count.bytes += B * (steps * (3.0 * s * l + 4.0 * s * s) * itemsize + s * l * (4 + itemsize))
    return count


def count_of(variant: Variant, inputs: Sequence[Tensor], dtype: torch.dtype) -> Count:
    count = Count()
    real = backend("auto", inputs[0].device)
    with mock.patch("optim.polar.backend", return_value=count.kernels(real)):
        for X in inputs:
            variant.run(X)
    return count if count.flops else dense_count([X.shape for X in inputs], dtype.itemsize)  # of a baseline: dense


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s of a large copy, read and write counted), the best of 20 here."""
    size = 8192 if device.type == "cuda" else 1536
    A = torch.randn(size, size, device=device).to(dtype)
    source = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    product_s, copy_s = (min(seconds.wall for seconds in take_turns({"": run}, 20, device=device)[""])
                         for run in (lambda: A @ A, lambda: target.copy_(source)))  # fmt: skip
    return 2 * size**3 / product_s, 2 * source.numel() * 4 / copy_s


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The same work as one CUDA graph: what it takes without Python between the launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def time_case(
    name: str, device: torch.device, dtype: torch.dtype, passes: int, peaks: tuple[float, float]
) -> list[Row]:
    generator = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, device=device) for shape in CASES[name]]
    runs: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    dense = dense_count(CASES[name], dtype.itemsize)
    for variant in tqdm(variants(dtype), desc=f"checking {name}", leave=False, disable=None):
        reason = failure(variant, inputs)
        rows[variant.name] = {"case": name, "variant": variant.name, "check": reason or "right"}
        if reason:
            continue

        def run(variant: Variant = variant) -> None:
            for X in inputs:
                variant.run(X)

        count = count_of(variant, inputs, dtype)
        rows[variant.name].update(executed_gflop=count.flops / 1e9, mbytes=count.bytes / 1e6)
        runs[variant.name] = run
        if device.type == "cuda" and not variant.name.startswith("torch"):
            runs[f"{variant.name} graph"] = graphed(run)
    seconds = {key: value.wall for key, value in median_seconds(runs, passes, device=device).items()}
    for key, row in rows.items():
        if key not in seconds:
            continue
        flops, moved = row["executed_gflop"] * 1e9, row["mbytes"] * 1e6
        best, row["ms"] = seconds[key], 1e3 * seconds[key]
        if graph_s := seconds.get(f"{key} graph"):
            best, row["graph_ms"] = min(best, graph_s), 1e3 * graph_s
        row["of_eager"] = seconds.get("torch eager", math.nan) / seconds[key]
        row |= dict(effective_tflops=dense.flops / best / 1e12, executed_tflops=flops / best / 1e12)
        row["gbytes_per_s"] = moved / best / 1e9
        if key != "torch.optim.Muon" or dtype == torch.bfloat16:  # which is in bfloat16 whatever was asked for
            row["of_roofline"] = max(flops / peaks[0], moved / peaks[1]) / best
    return list(rows.values())


def main(args: Args) -> int:
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, {"auto": "bfloat16" if on_gpu else "float32"}.get(args.dtype, args.dtype))
    cases = args.cases or (tuple(CASES) if on_gpu else CPU_CASES)
    if unknown := set(cases) - set(CASES):
        raise ValueError(f"no case {', '.join(sorted(unknown))}; cases: {', '.join(CASES)}")
    start = time.monotonic()
    with torch.no_grad():
        peaks = ceilings(device, dtype)
        rows = [row for name in cases for row in time_case(name, device, dtype, args.passes, peaks)]
    keys = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: row.get(key, "") for key in keys} for row in rows]
    settings = dict(
        passes=args.passes, dtype=str(dtype).removeprefix("torch."), kernels=backend("auto", device).name,
        product_tflops=peaks[0] / 1e12, copy_gbytes_per_s=peaks[1] / 1e9,
    )  # fmt: skip
    report("polar", rows, args.device, **settings, seconds=time.monotonic() - start)
    return int(any(row["check"] != "right" for row in rows))


if __name__ == "__main__":
    command(main, Args, __doc__)
