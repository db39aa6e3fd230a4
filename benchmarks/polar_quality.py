"""How good the polar factors are: every form and format against float64 SVD, over hostile spectra.

    python -m benchmarks.polar_quality
    python -m benchmarks.polar_quality --restarts true  other places to restart Polar Express, to choose from

orthogonality   ||U^T U - I||_F / sqrt(n): how far singular values are from 1, the method's own unfinished ones included
direction       1 - cosine between U and the exact polar factor (of the singular values above 0)
distance        ||U - exact|| / ||exact|| to the same polynomials applied in float64: the rounding alone

The question is whether the Gram form costs accuracy. It is judged against the dense direct form in bfloat16 with the
same coefficients: no worse than it, or than the method itself without rounding (where a method has not converged,
rounding can look like progress). On a CPU the Triton kernels are emulated:
products in float16 with float32 sums, one triangle mirrored, the tiles on the diagonal averaged with their transposes.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.polar_speed import dense_polar, normalized
from harness.results import command, report
from harness.tables import Row
from kernels import Backend, backend
from optim.polar import COEFFICIENTS, METHODS, dtype_of_unit_rows, polar
from optim.unit_rows import UnitRows

SPECTRA = (
    "gaussian", "log-uniform to 1e-6", "rank-deficient", "rank one", "one dominant", "dominant in few columns"
)  # fmt: skip
SHAPES = ("768x768", "2048x768", "768x2048", "3072x768", "1023x511", "257x101")


@dataclass(frozen=True)
class Args:
    shapes: tuple[str, ...] = SHAPES
    method: str = "polar_express"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    restarts: bool = False  # compare places to restart in half precision, instead of forms


class Quality(NamedTuple):
    orthogonality: float
    direction: float
    distance: float


class Problem(NamedTuple):
    """A matrix X [1, m, n], and of what the steps of `method` take (X, but for "aol") the exact polar factor and the
    method's without rounding, both float64 [m, n]."""

    X: Tensor
    factor: Tensor
    unrounded: Tensor


def make_problem(m: int, n: int, spectrum: str, method: str, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    X, k = torch.randn(m, n, generator=generator, dtype=torch.float64), min(m, n)
    if spectrum != "gaussian":
        W, _, Vh = torch.linalg.svd(X, full_matrices=False)
        S = {
            "log-uniform to 1e-6": torch.logspace(0, -6, k, dtype=torch.float64),
            "rank-deficient": (torch.arange(k) < math.ceil(k / 4)).double(),
            "rank one": (torch.arange(k) < 1).double(),
            "one dominant": torch.full((k,), 1e-2, dtype=torch.float64).index_fill(0, torch.tensor(0), 1),
            "dominant in few columns": torch.logspace(-0.5, -2.3, k, dtype=torch.float64),
        }[spectrum]
        X = (W * S) @ Vh
        if spectrum == "dominant in few columns":  # (of the shorter side), where entries of the Gram matrix are large
            tall, v = X if m >= n else X.mT, torch.zeros(k, dtype=torch.float64)
            v[:16] = torch.randn(min(k, 16), generator=generator, dtype=torch.float64)
            v /= v.norm()
            tall += torch.outer(1.4 * S.norm() * tall[:, -1] / tall[:, -1].norm() - tall @ v, v)
    X = X.float()
    W, s, Vh = torch.linalg.svd(normalized(X.double(), method), full_matrices=False)
    rank = {"rank-deficient": math.ceil(k / 4), "rank one": 1}.get(spectrum, k)
    return Problem(X[None], W[:, :rank] @ Vh[:rank], (W * composed(method, s)) @ Vh)


def composed(method: str, s: Tensor) -> Tensor:
    """What the steps of `method` make of singular values."""
    for a, b, c in COEFFICIENTS[method]:
        s = a * s + b * s**3 + c * s**5
    return s


def quality(U: Tensor, problem: Problem) -> Quality:
    U = U.squeeze(0).double().cpu()
    tall = U if U.size(0) >= U.size(1) else U.mT
    n = tall.size(1)
    return Quality(
        float((tall.mT @ tall - torch.eye(n, dtype=torch.float64)).norm() / n**0.5),
        1 - float((U * problem.factor).sum() / U.norm() / problem.factor.norm()),
        float((U - problem.unrounded).norm() / problem.unrounded.norm()),
    )


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Kernels for a CPU: plain ones in the Triton kernels' format, made symmetric as theirs are, tile by tile."""

    def mirrored(*arguments: Any, **options: Any) -> Tensor:
        product: Tensor = plain.symmetric_product(*arguments, **options)
        n = product.size(-1)
        tile = torch.arange(n) // (64 if n <= 256 else 128)
        average = (0.5 * (product.float() + product.float().mT)).to(product.dtype)
        return torch.where(tile[:, None] == tile[None, :], average, product.tril() + product.tril(-1).mT)

    def emulated(kernels: str, device: torch.device) -> Backend:
        ops = backend(kernels, device)
        return ops if ops.name == "triton" else plain._replace(symmetric_product=mirrored)

    plain = backend("torch", torch.device("cpu"))
    with mock.patch("optim.polar.backend", emulated):
        yield


def forms(X: Tensor, method: str) -> Iterator[tuple[str, Tensor]]:
    """(name, result) of each form and format; "unit rows" are what an optimizer's momentum comes as on a GPU."""
    for dtype, form in itertools.product((torch.float16, torch.float32), ("direct", "gram")):
        yield f"{dtype} {form}", polar(X, method, dtype=dtype, form=form)
    if dtype_of_unit_rows(method, None, torch.float16, X.device):
        rows, norm = backend("auto", X.device).normalize_rows(X if X.size(1) >= X.size(2) else X.mT, torch.float16)
        yield "float16 gram, unit rows", polar(UnitRows(rows, norm, X.shape), method, dtype=torch.float16, form="gram")


def restarts(X: Tensor, method: str) -> Iterator[tuple[str, Tensor]]:
    """(name, result) of each half format and lengths of segments."""
    cuts = ((1, 1, 1, 1, 1), (2, 3), (3, 2), (2, 2, 1), (1, 2, 2), (5,))
    for dtype, lengths in itertools.product((torch.float16, torch.bfloat16), cuts):
        ends = itertools.accumulate(lengths, initial=0)
        plan = [COEFFICIENTS[method][start:end] for start, end in itertools.pairwise(ends)]
        with mock.patch("optim.polar.plan_segments", return_value=plan):
            yield f"{dtype} {'+'.join(map(str, lengths))}", polar(X, method, dtype=dtype)


def measure(problem: Problem, args: Args) -> dict[str, Quality]:
    """Quality by name; "unrounded" and "bfloat16 dense direct" are what the rest is judged by."""
    X = problem.X.to(args.device)
    results = {
        "unrounded": quality(problem.unrounded, problem),
        "bfloat16 dense direct": quality(dense_polar(X, torch.bfloat16, args.method), problem),
    }
    with as_on_a_gpu():
        for name, U in (restarts if args.restarts else forms)(X, args.method):
            results[name.removeprefix("torch.")] = quality(U, problem)
    return results


def is_no_worse(result: Quality, dense: Quality, unrounded: Quality) -> bool:
    """Than the dense direct form in bfloat16 or the method itself without rounding; 1% for chance. Where the dense form
    overflows, which depends on how a CPU rounds, anything finite is no worse."""
    if not math.isfinite(dense.orthogonality):
        return math.isfinite(result.orthogonality)
    is_as_orthogonal = result.orthogonality <= 1.01 * max(dense.orthogonality, unrounded.orthogonality)
    return is_as_orthogonal and result.direction <= 1.01 * max(dense.direction, unrounded.direction) + 1e-5


def main(args: Args) -> int:
    if args.method not in COEFFICIENTS:
        raise ValueError(f"method = {args.method!r} is none of {', '.join(METHODS[:-1])}")
    if args.restarts and len(COEFFICIENTS[args.method]) != 5:
        raise ValueError(f"--restarts compares cuts of 5 steps; {args.method} has more, polar_express 5")
    rows: list[Row] = []
    with torch.no_grad():
        for shape, spectrum in tqdm(list(itertools.product(args.shapes, SPECTRA)), leave=False, disable=None):
            m, n = map(int, shape.split("x"))
            results = measure(make_problem(m, n, spectrum, args.method), args)
            for name, result in results.items():
                verdict = is_no_worse(result, results["bfloat16 dense direct"], results["unrounded"])
                row: Row = dict(shape=shape, spectrum=spectrum, form=name, no_worse="yes" if verdict else "NO")
                rows.append(row | result._asdict())
    report("polar_restarts" if args.restarts else "polar_quality", rows, args.device, method=args.method)
    worse = [row for row in rows if row["no_worse"] == "NO"]
    print(f"{len(worse)} of {len(rows)} worse than the dense direct form in bfloat16")
    return int(bool(worse) and not args.restarts)


if __name__ == "__main__":
    command(main, Args, __doc__)
