"""Which tile sizes suit this GPU: every product of the Gram form, timed with every candidate, the best first.

    python -m benchmarks.polar_tiles                    then put the best into LARGE of kernels/triton_common.py

Tiles are chosen once, here, and written down: a kernel that tunes itself would do so on a run's clock, and two runs
could differ.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.polar_speed import CASES, Shape, graphed
from harness.results import command, report
from harness.step_timer import median_seconds
from harness.tables import Row
from kernels.apply_symmetric import apply_symmetric
from kernels.gram import gram
from kernels.symmetric_product import symmetric_product
from kernels.triton_common import LARGE, Tile, can_launch

CANDIDATES = (
    *dict.fromkeys(LARGE.values()), Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 4, 3), Tile(128, 128, 32, 4, 4),
    Tile(64, 64, 64, 4, 4), Tile(64, 64, 32, 4, 5), Tile(256, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3),
    Tile(128, 64, 64, 4, 4),
)  # fmt: skip


REPEATS = 10  # of a product in one timing


@dataclass(frozen=True)
class Args:
    case: str = "124m"  # shapes, by their name in benchmarks/polar_speed.py
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    passes: int = 15  # turns of each candidate; the table has medians


def repeated(product: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The product REPEATS times, on a GPU as one CUDA graph: a launch from Python takes as long as the product."""

    def run() -> None:
        for _ in range(REPEATS):
            product()

    return graphed(run) if device.type == "cuda" else run


def timed(
    kernel: str, shape: Shape, runs: dict[str, Callable[[], object]], passes: int, device: torch.device
) -> list[tuple[float, Row]]:
    """(seconds, row) of each tile by time, from `repeated` runs."""
    medians = median_seconds(runs, passes, device=device)
    result: list[tuple[float, Row]] = []
    for tile, time in sorted(medians.items(), key=lambda item: item[1]):
        seconds = time.wall / REPEATS
        result.append((seconds, dict(kernel=kernel, shape="x".join(map(str, shape)), tile=tile, ms=1e3 * seconds)))
    return result


def check_case(case: str, device: torch.device) -> None:
    """ValueError for a case that there is not, and for a device without Triton."""
    if case not in CASES or not can_launch(device):
        raise ValueError(
            f"case = {case!r} must be one of {', '.join(CASES)}, and device = {str(device)!r} a CUDA GPU: tiles are "
            "Triton's"
        )


def time_tiles(shapes: Sequence[Shape], tiles: Sequence[Tile], device: torch.device, passes: int) -> list[Row]:
    """A row for each product, shape and tile that the device can hold, by time within a product and shape."""
    rows: list[Row] = []
    for B, m, n in shapes:
        X = torch.randn(B, m, n, device=device).half() / max(m, n) ** 0.5
        X = X if m >= n else X.mT  # as the optimizers see it
        R = gram(X)
        long, side = map(float, X.shape[1:])
        products: dict[str, tuple[Callable[..., object], float]] = {
            "gram": (partial(gram, X, torch.ones(B, device=device)), long * side**2),  # half of the output
            "symmetric_product": (partial(symmetric_product, R, R, 1.0, 2.0), side**3),
            "apply_symmetric": (partial(apply_symmetric, X, R, 2.0), 2 * long * side**2),
        }
        for name, (product, flops) in products.items():
            runs: dict[str, Callable[[], object]] = {}
            for tile in tiles:
                if tile.rows == tile.columns or name == "apply_symmetric":  # a triangle needs square tiles
                    with suppress(OutOfResources):
                        product(tile=tile)
                        runs[str(tuple(tile))] = repeated(partial(product, tile=tile), device)
            for seconds, row in timed(name, (B, m, n), runs, passes, device):
                rows.append(row | dict(tflops=B * flops / seconds / 1e12))
    return rows


def main(args: Args) -> None:
    device = torch.device(args.device)
    check_case(args.case, device)
    with torch.no_grad():
        rows = time_tiles(CASES[args.case], CANDIDATES, device, args.passes)
    report("polar_tiles", rows, args.device, case=args.case, passes=args.passes)


if __name__ == "__main__":
    command(main, Args, __doc__)
