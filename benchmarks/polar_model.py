"""How long polar factors should take on an H100, product by product, said before one is asked.

    python -m benchmarks.polar_model            the cases 124m and 1b of benchmarks/polar_speed.py; needs no GPU

A product of T tiles runs in rounds of as many as the multiprocessors hold at once. It takes as long as the slowest of
three: its FLOPs at TENSOR, what its tiles load and store at L2 (each tile its operands anew, whoever loaded them
before), both for whole rounds, and what has to come from memory at DRAM; LAUNCH comes before. What is no product takes
its bytes at the rate of PASSES. What the model leaves out: the start and end of a tile, where nothing is multiplied,
cache misses beyond the first, clocks that sink, and torch's operators on scales (14 in a polar factor of unit rows,
each as long as LAUNCH at least).

The rates are of one H100 80GB HBM3 (benchmarks/results/h100_first_runs.txt). L2 is calibrated on a single product,
apply_symmetric on 24 x 2048 x 768 by descriptor, 0.119 ms: what the model says of that one is no prediction.
"""

import sys
from collections import Counter
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.polar_speed import CASES
from data import console
from harness.tables import align, cell
from kernels import Backend
from kernels.triton_common import LARGE, cdiv
from optim.aurora import aurora_polar
from optim.polar import polar
from optim.unit_rows import UnitRows

TENSOR = 767e12  # FLOP/s of a product of 8192 x 8192 matrices: polar_speed's executed_tflops / of_roofline
L2 = 9.4e12  # bytes/s between L2 and the multiprocessors, both ways
DRAM = 3.07e12  # bytes/s, read and written: a lerp of 85 million float32
NORMALIZE = 2.1e12  # the same of normalize_rows
PASSES = {"normalize_rows": NORMALIZE, "scale_rows": DRAM}  # bytes/s of what is no product
LAUNCH = 2e-6  # of a kernel in a CUDA graph: assumed
PROCESSORS = 132


class Call(NamedTuple):
    """A launch: `what` of X [B, m, n], bytes from and to memory at least."""

    what: str
    B: int
    m: int
    n: int
    memory: int


def not_asked(*arguments: object) -> None:
    raise AssertionError("polar factors need no other kernels")


class Idea(NamedTuple):
    """What could be done otherwise."""

    at_a_time: int = sys.maxsize  # matrices of a shape
    is_cached: bool = False  # nothing of a product comes from memory or goes there, as if L2 held it all
    is_wide: bool = False  # apply_symmetric's tiles are of 128 x 256, for one block on a multiprocessor
    operands: float = 1.0  # share of the products' loads that L2 sees


AS_IT_IS = Idea()
IDEAS = {
    "polar factors": AS_IT_IS,
    "12 matrices at a time": Idea(12),
    "the same, their operands in L2": Idea(12, is_cached=True),
    "apply_symmetric in tiles of 128 x 256": Idea(is_wide=True),
    "an operand copied for two blocks at once": Idea(operands=0.75),
    "operands for nothing": Idea(operands=0.0),
}
SHOWN = ("124m", "1b")


class Estimate(NamedTuple):
    seconds: float
    bound: str  # tensor cores, L2 or memory


def recorder(calls: list[Call]) -> Backend:
    """Kernels that note what they are asked for; on the device meta."""

    def note(what: str, X: Tensor, *moved: Tensor | None) -> None:
        B, m, n = X.shape
        calls.append(Call(what, B, m, n, sum(t.numel() * t.itemsize for t in moved if t is not None)))

    def normalize_rows(X: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        Y = torch.empty_like(X, dtype=dtype)
        note("normalize_rows", X, X, Y)
        return Y, X.new_empty(X.shape[:2])

    def scale_rows(X: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        Y = torch.empty_like(X, dtype=dtype)
        note("scale_rows", X, X, Y)
        return Y

    def gram(X: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        R = X.new_empty((X.size(0), X.size(2), X.size(2)), dtype=dtype or X.dtype)
        note("gram", X, X, R)
        return R

    def symmetric_product(
        A: Tensor, B: Tensor, alpha: float = 1, beta: float = 0, gamma: float = 0, unrounded_A: Tensor | None = None
    ) -> Tensor:
        C = torch.empty_like(A)
        note("symmetric_product", A, A, None if A is B else B, unrounded_A, C)
        return C

    def apply_symmetric(
        X: Tensor, S: Tensor, alpha: float = 0, scale: Tensor | None = None, dtype: torch.dtype | None = None,
        outputs: str = "matrix",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        Y = torch.empty_like(X, dtype=dtype)
        note("apply_symmetric", X, X, S, None if outputs == "row_square" else Y)
        return Y, X.new_empty(X.shape[:2], dtype=torch.float32)

    products = (gram, symmetric_product, apply_symmetric)
    return Backend("model", True, not_asked, not_asked, normalize_rows, scale_rows, *products, cross_entropy=not_asked)


def estimate(call: Call, idea: Idea = AS_IT_IS) -> Estimate:
    if call.what in PASSES:
        return Estimate(LAUNCH + call.memory / PASSES[call.what], "memory")
    tile, blocks = LARGE[90], 2
    if idea.is_wide and call.what == "apply_symmetric":
        tile, blocks = tile._replace(columns=256), 1
    rows, columns = cdiv(call.m, tile.rows), cdiv(call.n, tile.columns)
    tiles = call.B * (rows * columns if call.what == "apply_symmetric" else columns * (columns + 1) // 2)
    steps = cdiv(call.m if call.what == "gram" else call.n, tile.depth)
    at_once = PROCESSORS * blocks
    rounds = cdiv(tiles, at_once) * at_once / tiles
    flops = 2 * tiles * steps * tile.rows * tile.columns * tile.depth
    through_l2 = 2 * tiles * steps * (tile.rows + tile.columns) * tile.depth * idea.operands + call.memory
    times = {
        "tensor cores": flops / TENSOR * rounds,
        "L2": through_l2 / L2 * rounds,
        "memory": 0.0 if idea.is_cached else call.memory / DRAM,
    }
    bound = max(times, key=lambda name: times[name])
    return Estimate(LAUNCH + times[bound], bound)


def calls_of(case: str, iterations: int, at_a_time: int = sys.maxsize, has_unit_rows: bool = False) -> list[Call]:
    """The launches for the matrices of a case: Muon's polar factors, or with `iterations` Aurora's; so many matrices of
    a shape `at_a_time`; with `has_unit_rows` of what momentum_rows has made of them, as in training."""
    calls: list[Call] = []
    with mock.patch("optim.polar.backend", return_value=recorder(calls)):
        parts = [part for shape in CASES[case] for part in torch.empty(shape, device="meta").split(at_a_time)]
        for M in parts:
            X = unit_rows_of(M) if has_unit_rows else M
            if iterations:
                aurora_polar(X, iterations=iterations, dtype=torch.float16)
            else:
                polar(X, dtype=torch.float16)
    return calls


def unit_rows_of(M: Tensor) -> UnitRows:
    B, *sizes = M.shape
    rows = M.new_empty((B, max(sizes), min(sizes)), dtype=torch.float16)
    return UnitRows(rows, M.new_empty((B, max(sizes)), dtype=torch.float32), M.shape)


def main(argv: list[str]) -> int:
    if argv:
        raise ValueError(f"there are no arguments, and not {' '.join(argv)}")
    for case in SHOWN:
        lines = [[case, "shape", "launches", "us each", "us", "bound by"]]
        for call, count in Counter(calls_of(case, 0)).items():
            seconds, bound = estimate(call)
            shape = f"{call.B}x{call.m}x{call.n}"
            lines.append([call.what, shape, str(count), cell(1e6 * seconds), cell(1e6 * count * seconds), bound])
        print(align(lines) + "\n")
    rows = [["ms", *SHOWN]]
    for what, iterations, idea in (
        ("Aurora's, two iterations", 2, AS_IT_IS),
        *((name, 0, IDEAS[name]) for name in IDEAS),
    ):
        calls = [calls_of(case, iterations, idea.at_a_time) for case in SHOWN]
        rows.append([what, *(cell(1e3 * sum(estimate(call, idea).seconds for call in each)) for each in calls)])
    print(align(rows))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(lambda: main(sys.argv[1:]), "the same command starts again"))
