"""Definitions of the update rules, transcribed a line at a time: numpy in float64 with an exact polar factor.

Those that need the momentum alone give a direction, the others the weights after a step.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from optim import (
    AdamH,
    AdaMuon,
    Aurora,
    MatrixOptimizer,
    Muon,
    MuonEq,
    MuonPlus,
    MuonSquared,
    Muown,
    NorMuon,
    PolarGrad,
    RiemannianAurora,
    Soap,
    SoapMuon,
    UNorMuon,
)
from tests.matrices import Float64, randn, uneven

Matrix = npt.NDArray[np.float64]
Memory = dict[str, Any]
SHAPES = {"tall": (14, 5), "wide": (5, 14), "square": (6, 6)}

# Directions, of the momentum M


def exact_polar(M: Matrix) -> Matrix:
    """Without directions in which M is zero, as matrices of signs often have them."""
    W, S, Vh = np.linalg.svd(M, full_matrices=False)
    kept = 1e-12 * S[0] < S
    return W[:, kept] @ Vh[kept]


def row_norms(M: Matrix) -> Matrix:
    return np.sqrt((M**2).sum(axis=1))


def balanced_sides(rule: Callable[[Matrix, Memory], Matrix]) -> Callable[[Matrix, Memory], Matrix]:
    """Tall by the rule, wide by its transpose, square by the polar factor."""

    def on_any(M: Matrix, memory: Memory) -> Matrix:
        m, n = M.shape
        if m == n:
            return exact_polar(M)
        return rule(M, memory) if m > n else rule(M.T, memory).T

    return on_any


def normuon(M: Matrix, memory: Memory) -> Matrix:
    U = exact_polar(M)
    memory["v"] = 0.9 * memory.get("v", 0) + 0.1 * (U**2).mean(axis=1)
    scaled = U / np.sqrt(memory["v"])[:, None]
    return scaled * np.linalg.norm(U) / np.linalg.norm(scaled)


def normuon_long(M: Matrix, memory: Memory) -> Matrix:
    U, (m, n) = exact_polar(M), M.shape
    memory["v"] = 0.95 * memory.get("v", 0) + 0.05 * (U**2).mean(axis=1 if m >= n else 0, keepdims=True)
    scaled = U / np.sqrt(memory["v"])
    return scaled * np.linalg.norm(U) / np.linalg.norm(scaled)


def unormuon(M: Matrix, memory: Memory) -> Matrix:
    U, (m, n) = exact_polar(M), M.shape
    return U / row_norms(U)[:, None] * math.sqrt(n / m) if m > n else U


@balanced_sides
def release(M: Matrix, memory: Memory) -> Matrix:
    (m, n), d = M.shape, 1 / row_norms(M)
    for _ in range(2):
        U = exact_polar(d[:, None] * M)
        d = d * ((n / m) / row_norms(U) ** 2) ** 0.5
    return U


@balanced_sides
def paper(M: Matrix, memory: Memory) -> Matrix:
    (m, n), D = M.shape, np.ones(len(M))
    U = exact_polar(M / row_norms(M)[:, None])
    for _ in range(2):
        D = D * (row_norms(U) / math.sqrt(n / m)) ** 0.5
        U = exact_polar(U / D[:, None])
    return U


@balanced_sides
def warm(M: Matrix, memory: Memory) -> Matrix:
    m, n = M.shape
    c = memory.get("c", np.ones(m))
    U = exact_polar(c[:, None] * M / row_norms(M)[:, None])
    c = c * ((n / m) / row_norms(U) ** 2) ** 0.25
    memory["c"] = c / c.mean()
    return U


@balanced_sides
def riemannian(M: Matrix, memory: Memory) -> Matrix:
    """With P o P written out and its equations solved by a pseudo-inverse."""
    m, n = M.shape
    M = M * math.sqrt(n) / np.linalg.norm(M)
    U = exact_polar(M)
    for _ in range(2):
        P, B = U @ U.T, (U.T @ M + M.T @ U) / 2
        q = (M * U).sum(axis=1) - ((U @ B) * U).sum(axis=1)
        lagrange = np.linalg.pinv(np.diag((P * P).sum(axis=1)) - P * P) @ (q - q.mean())
        S = B - U.T @ (lagrange[:, None] * U)
        U = U + 0.2 * (M - U @ S - lagrange[:, None] * U)
        U = exact_polar(U / row_norms(U)[:, None] * math.sqrt(n / m))
    return U


def muon_eq(M: Matrix, memory: Memory, *, rows: bool, columns: bool) -> Matrix:
    r, c = row_norms(M)[:, None], row_norms(M.T)[None, :]
    return exact_polar(M / (r if rows else 1) / (c if columns else 1))


def muon_plus(M: Matrix, memory: Memory, *, order: list[int]) -> Matrix:
    """With its own scale. Columns are sums over axis 0, rows over axis 1."""
    U, (m, n) = exact_polar(M), M.shape
    for axis in order:
        U = U / np.sqrt((U**2).sum(axis=axis, keepdims=True) + 1e-7)
    return math.sqrt(m / n) * U


def adamuon(M: Matrix, memory: Memory, *, beta2: float) -> Matrix:
    """With its own scale."""
    U, (m, n) = exact_polar(np.sign(M)), M.shape
    memory["v"] = beta2 * memory.get("v", 0) + (1 - beta2) * U**2
    A = U / (np.sqrt(memory["v"]) + 1e-8)
    return 0.2 * math.sqrt(m * n) * A / np.linalg.norm(A)


def polar_grad(M: Matrix, memory: Memory) -> Matrix:
    return exact_polar(M) * np.linalg.norm(M, ord="nuc")


# Weights after a step, from weights W and gradient G


def momentum(G: Matrix, memory: Memory, nesterov: bool) -> Matrix:
    memory["B"] = 0.95 * memory.get("B", 0) + 0.05 * G
    return 0.95 * memory["B"] + 0.05 * G if nesterov else memory["B"]


def running(name: str, value: Matrix, beta: float, memory: Memory) -> Matrix:
    memory[name] = beta * memory.get(name, 0) + (1 - beta) * value
    return memory[name]


def hyperball(W: Matrix, U: Matrix, lr: float) -> Matrix:
    r = np.linalg.norm(W)
    moved = W - lr * r * U / np.linalg.norm(U)
    return r * moved / np.linalg.norm(moved)


def muon_squared(W: Matrix, G: Matrix, memory: Memory) -> Matrix:
    V = running("V", G**2, 0.95, memory)
    U = exact_polar(momentum(G, memory, nesterov=True) / np.sqrt(V))
    return W * (1 - 0.1 * 0.2) - 0.1 * math.sqrt(max(1, W.shape[0] / W.shape[1])) * U


def adamh(W: Matrix, G: Matrix, memory: Memory) -> Matrix:
    t = memory["t"] = memory.get("t", 0) + 1
    V = running("V", G**2, 0.9, memory)
    U = momentum(G, memory, nesterov=False) / (1 - 0.95**t) / np.sqrt(V / (1 - 0.9**t))
    return hyperball(W, U, 0.1)


def muown(W: Matrix, G: Matrix, memory: Memory, lr: float = 0.02) -> Matrix:
    """Whose v and g are variables of their own; W follows them."""
    t = memory["t"] = memory.get("t", 0) + 1
    if t == 1:
        memory["g"] = np.linalg.norm(W, axis=1)
        memory["v"] = W.copy()
    g, v = memory["g"], memory["v"]
    k = np.linalg.norm(v, axis=1)
    u = v / k[:, None]
    dg = (G * u).sum(axis=1)
    dv = (g / k)[:, None] * (G - dg[:, None] * u)
    memory["v"] = v - lr * 0.2 * math.sqrt(max(W.shape)) * exact_polar(momentum(dv, memory, nesterov=True))
    mean, square = running("m", dg, 0.9, memory) / (1 - 0.9**t), running("s", dg**2, 0.95, memory) / (1 - 0.95**t)
    memory["g"] = g - lr * mean / np.sqrt(square)
    return (memory["g"] / np.linalg.norm(memory["v"], axis=1))[:, None] * memory["v"]


def soap(W: Matrix, G: Matrix, memory: Memory, is_muon: bool) -> Matrix:
    """L and R with all that follows from them, and the bases as the last step left them."""
    t = memory["t"] = memory.get("t", 0) + 1
    start = math.ceil(max(W.shape) / min(W.shape))
    M = momentum(G, memory, nesterov=is_muon) if is_muon or t > start else 0 * G
    U = M
    if t > start:
        QL, QR = memory["QL"], memory["QR"]
        V = running("V", (QL.T @ (M if is_muon else G) @ QR) ** 2, 0.9, memory)
        rotated = (QL.T @ M @ QR) / np.sqrt(V)
        if not is_muon:
            rotated = rotated / (1 - 0.95 ** (t - start)) * math.sqrt(1 - 0.9 ** (t - start))
        U = QL @ rotated @ QR.T
    for name, product in {"L": G @ G.T, "R": G.T @ G}.items():
        factor = running(name, product, 0.9, memory)
        if t == start:
            memory["Q" + name] = np.linalg.eigh(factor)[1][:, ::-1]
        if t > start:
            Q = memory["Q" + name]
            if is_muon:
                order = np.argsort(-np.diag(Q.T @ factor @ Q))
                Q = Q[:, order]
                memory["V"] = memory["V"][order] if name == "L" else memory["V"][:, order]
            memory["Q" + name] = np.linalg.qr(factor @ Q)[0]
    U = exact_polar(U) if is_muon else U
    return W * (1 - 0.1 * 0.2) - 0.1 * math.sqrt(max(1, W.shape[0] / W.shape[1])) * U


DIRECTIONS: dict[str, tuple[Callable[..., MatrixOptimizer], Callable[[Matrix, Memory], Matrix]]] = {
    "muon": (Muon, lambda M, memory: exact_polar(M)),
    "normuon": (partial(NorMuon, beta2=0.9), normuon),
    "normuon long": (partial(NorMuon, axis="long"), normuon_long),
    "unormuon": (UNorMuon, unormuon),
    "muon_eq": (MuonEq, partial(muon_eq, rows=True, columns=False)),
    "muon_eq columns": (partial(MuonEq, axis="columns"), partial(muon_eq, rows=False, columns=True)),
    "muon_eq both": (partial(MuonEq, axis="both"), partial(muon_eq, rows=True, columns=True)),
    "muon_plus": (partial(MuonPlus, scale="aspect"), partial(muon_plus, order=[0, 1])),
    "muon_plus row_col": (partial(MuonPlus, order="row_col", scale="aspect"), partial(muon_plus, order=[1, 0])),
    "muon_plus col": (partial(MuonPlus, order="col", scale="aspect"), partial(muon_plus, order=[0])),
    "adamuon": (partial(AdaMuon, scale="match_rms_adamw"), partial(adamuon, beta2=0.95)),
    "adamuon beta2": (partial(AdaMuon, beta2=0.8, scale="match_rms_adamw"), partial(adamuon, beta2=0.8)),
    "polar_grad": (PolarGrad, polar_grad),
    "aurora release": (Aurora, release),
    "aurora paper": (partial(Aurora, variant="paper", iterations=3), paper),
    "aurora warm": (partial(Aurora, variant="warm", beta=0.25), warm),
    "riemannian aurora": (
        partial(RiemannianAurora, outer_steps=2, step_size=0.2, retraction_steps=1, cg_steps=40), riemannian,
    ),
}  # fmt: skip
STEPS: dict[str, tuple[Callable[..., MatrixOptimizer], Callable[[Matrix, Matrix, Memory], Matrix]]] = {
    "muon_squared": (MuonSquared, muon_squared),
    "adamh": (partial(AdamH, beta2=0.9), adamh),
    "muown": (partial(Muown, scale="match_rms_adamw"), muown),
    "soap": (Soap, partial(soap, is_muon=False)),
    "soap_muon": (SoapMuon, partial(soap, is_muon=True)),
}
OWN_OPTIONS = {"adamh": dict(lr=0.1), "muown": dict(lr=0.02)}
DEFINITIONS = (*DIRECTIONS, *STEPS)


def step_of(name: str, shape: tuple[int, int]) -> tuple[Callable[..., MatrixOptimizer], Callable[..., Matrix]]:
    """The rule with its options, and what the weights are after a step by its definition; Nesterov momentum and weight
    decay around a direction, and the default scale where its rule is given none."""
    if name in STEPS:
        make, step_by_definition = STEPS[name]
        return partial(make, **OWN_OPTIONS.get(name, dict(lr=0.1, weight_decay=0.2))), step_by_definition
    make, direction = DIRECTIONS[name]
    options = make.keywords if isinstance(make, partial) else {}
    scale = 1.0 if "scale" in options else math.sqrt(max(1, shape[0] / shape[1]))

    def step(W: Matrix, G: Matrix, memory: Memory) -> Matrix:
        return W * (1 - 0.1 * 0.2) - 0.1 * scale * direction(momentum(G, memory, nesterov=True), memory)

    return partial(make, lr=0.1, weight_decay=0.2), step


def largest_difference(name: str, shape: tuple[int, int], steps: int = 50) -> float:
    """Of any weight, in any of the steps, between the rule in float64 and its definition."""
    make, step = step_of(name, shape)
    largest, memory = 0.0, Memory()
    with Float64():
        weight = nn.Parameter(randn(*shape, seed=3).double())
        optimizer, expected = make([weight], polar_method="svd"), weight.detach().clone().numpy()
        for i in range(steps):
            weight.grad = uneven(*shape, seed=3 * i, spread=0.5).double()
            expected = step(expected, weight.grad.numpy(), memory)
            optimizer.step()
            largest = max(largest, float(np.abs(weight.detach().numpy() - expected).max()))
    return largest
