"""What each polar method costs and gives: a row for each set of coefficients, and its errors over hostile spectra.

    python -m benchmarks.polar_methods

products            matrix products of the direct form; flops_*: those of such a matrix, of Polar Express's
low, high           the composed polynomial's smallest and largest value over singular values in [0.01, 1] as it takes
                    them, after whatever factor its input was divided by; weak_low, weak_high: in [0.001, 1]
slope               at zero: by how much a weak direction grows
keeps_sign          whether the polynomial is positive on all of (0, 1]
orthogonality       and direction, as in benchmarks/polar_quality.py; direction is against the polar factor of X itself,
                    for aol too, and the largest of the shapes

exact: the polynomials in float64. float16: as on a GPU, emulated. bfloat16: as on a CPU. "input's factor", of aol: the
exact polar factor of X after AOL, which shows what the pre-scaling alone does to the direction.
"""

import itertools
import math
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.polar_quality import SPECTRA, as_on_a_gpu, composed, make_problem, quality
from benchmarks.polar_speed import Count
from harness.results import command, report
from harness.tables import Row, table
from kernels import backend
from optim.polar import COEFFICIENTS, polar

SIZES = ((768, 768), (2048, 768))


@dataclass(frozen=True)
class Args:
    shapes: tuple[str, ...] = ("192x192", "512x192")  # of the errors
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def executed_flops(method: str, m: int, n: int) -> float:
    """FLOPs of the products of one m x n matrix in the direct form, counted as they are asked for."""
    count, scale = Count(), math.gcd(m, n)  # a small matrix of the same shape: all counts are of the third order
    with mock.patch("optim.polar.backend", return_value=count.kernels(backend("torch", torch.device("cpu")))):
        polar(torch.ones(m // scale, n // scale), method, dtype=torch.float32, form="direct")
    return count.flops * scale**3


def facts(method: str) -> Row:
    """Cost, range, slope and sign of a method, by arithmetic alone."""

    def values(lowest: float) -> Tensor:
        return composed(method, torch.logspace(math.log10(lowest), 0, 100_001, dtype=torch.float64))

    row: Row = dict(method=method, steps=len(COEFFICIENTS[method]))
    row["products"] = round(executed_flops(method, 768, 768) / (2 * 768**3))
    for m, n in SIZES:
        row[f"flops_{m}x{n}"] = executed_flops(method, m, n) / executed_flops("polar_express", m, n)
    for name, lowest in (("", 1e-2), ("weak_", 1e-3)):
        row |= {f"{name}low": float(values(lowest).min()), f"{name}high": float(values(lowest).max())}
    row["slope"] = math.prod(a for a, _, _ in COEFFICIENTS[method])
    row["keeps_sign"] = "yes" if (values(1e-9) > 0).all() else "NO"
    return row


def errors(method: str, spectrum: str, args: Args) -> list[Row]:
    """Orthogonality and direction for each arithmetic."""
    worst: dict[str, Row] = {}
    for shape in args.shapes:
        m, n = map(int, shape.split("x"))
        problem = make_problem(m, n, spectrum, method)
        X = problem.X.to(args.device)
        results = {"exact": problem.unrounded}
        with as_on_a_gpu():
            results |= {str(dtype)[6:]: polar(X, method, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)}
        if method == "aol":
            results["input's factor"] = problem.factor
            problem = problem._replace(factor=make_problem(m, n, spectrum, "quintic").factor)  # that of X
        for arithmetic, U in results.items():
            row = worst.setdefault(arithmetic, dict(method=method, spectrum=spectrum, arithmetic=arithmetic))
            of_shape = quality(U, problem)
            for name in ("orthogonality", "direction"):
                row[name] = max(row.get(name, 0.0), getattr(of_shape, name))
    return list(worst.values())


def main(args: Args) -> None:
    cases = list(itertools.product(COEFFICIENTS, SPECTRA))
    with torch.no_grad():
        found = [
            row for method, spectrum in tqdm(cases, leave=False, disable=None) for row in errors(method, spectrum, args)
        ]
    print(table(found))
    report("polar_methods", [facts(method) for method in COEFFICIENTS], args.device, shapes=args.shapes, errors=found)


if __name__ == "__main__":
    command(main, Args, __doc__)
