"""How fast the passes of an optimizer step around the matrix products are on this GPU, by tile, the best first.

    python -m benchmarks.pass_tiles        then put the best into FLAT, CONTIGUOUS and TRANSPOSED of kernels/*.py

Gradients are float32 and scattered, updates and rows in half precision, as in a step of the 124 M model. `predicted_ms`
is what benchmarks/step_model.py reckons with on an H100.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.polar_model import DRAM, NORMALIZE
from benchmarks.polar_speed import CASES, Shape
from benchmarks.polar_tiles import check_case, repeated, timed
from harness.results import command, report
from harness.tables import Row
from kernels.apply_update import apply_update
from kernels.momentum import momentum, momentum_rows
from kernels.normalize_rows import normalize_rows
from kernels.not_finite import mark_not_finite
from kernels.scale_rows import scale_rows
from kernels.scattered import scattered
from kernels.triton_common import Tile

FLAT = tuple(Tile(1, columns, 0, warps, 1) for columns in (1024, 2048, 4096) for warps in (4, 8))
ROWS = (Tile(1, 1024, 0, 4, 1), Tile(1, 512, 0, 4, 1), Tile(2, 1024, 0, 8, 1), Tile(4, 256, 0, 4, 1),
        Tile(8, 256, 0, 4, 3))  # fmt: skip
COLUMNS = (Tile(8, 256, 0, 16, 1), Tile(8, 256, 0, 8, 1), Tile(16, 128, 0, 16, 1), Tile(16, 128, 0, 8, 1),
           Tile(32, 64, 0, 8, 1), Tile(64, 32, 0, 4, 3))  # fmt: skip
BLOCKS = (Tile(4, 1024, 0, 4, 1), Tile(8, 512, 0, 4, 1), Tile(8, 256, 0, 4, 1), Tile(16, 256, 0, 8, 1))
BLOCKS_TRANSPOSED = tuple(Tile(columns, rows, depth, warps, stages) for rows, columns, depth, warps, stages in BLOCKS)


@dataclass(frozen=True)
class Args:
    case: str = "124m"  # shapes, by their name in benchmarks/polar_speed.py
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    passes: int = 15  # turns of each candidate; the table has medians


def time_passes(shapes: Sequence[Shape], device: torch.device, passes: int) -> list[Row]:
    """A row for each pass, shape and tile, by time within a pass and shape."""
    rows: list[Row] = []
    for B, m, n in shapes:
        buffer, weights = torch.randn(B, m, n, device=device), [torch.randn(m, n, device=device) for _ in range(B)]
        where = scattered([torch.randn(m, n, device=device) for _ in range(B)], buffer.device)
        assert where is not None
        tall, update = buffer if m >= n else buffer.mT, buffer.half()
        half, of_rows = tall.half(), torch.rand(tall.shape[:2], device=device)
        by_row, blocks = (ROWS, BLOCKS) if m >= n else (COLUMNS, BLOCKS_TRANSPOSED)
        # bytes for each element, at which rate
        works: dict[str, tuple[Callable[..., object], Sequence[Tile], int, float]] = {
            "mark_not_finite": (partial(mark_not_finite, where, torch.zeros(B, device=device)), FLAT, 4, DRAM),
            "momentum": (partial(momentum, where, buffer, 0.95, True), FLAT, 16, DRAM),
            "momentum_rows": (partial(momentum_rows, where, buffer, 0.95, True), by_row, 14, NORMALIZE),
            "normalize_rows": (partial(normalize_rows, tall, torch.float16), by_row, 6, NORMALIZE),
            "scale_rows": (partial(scale_rows, half, of_rows, half.dtype), blocks, 4, DRAM),
            "apply_update": (partial(apply_update, weights, update, list(range(B)), 1e-9, 1.0, 0.1), FLAT, 10, DRAM),
        }
        for name, (work, tiles, size, rate) in works.items():
            runs = {str(tuple(tile)): repeated(partial(work, tile=tile), device) for tile in tiles}
            moved = B * m * n * size
            for seconds, row in timed(name, (B, m, n), runs, passes, device):
                rows.append(row | dict(tb_per_s=moved / seconds / 1e12, predicted_ms=1e3 * moved / rate))
    return rows


def main(args: Args) -> None:
    device = torch.device(args.device)
    check_case(args.case, device)
    with torch.no_grad():
        rows = time_passes(CASES[args.case], device, args.passes)
    report("pass_tiles", rows, args.device, case=args.case, passes=args.passes)


if __name__ == "__main__":
    command(main, Args, __doc__)
