"""Polar factor: the orthogonal matrix nearest to a given one, by matrix products alone.

With X = W S V^T the polar factor is W V^T: every singular value becomes 1 and the singular vectors stay. A
Newton-Schulz step applies the odd polynomial p(s) = a s + b s^3 + c s^5 to the singular values, since

    X (a I + b R + c R^2) = W p(S) V^T    with R = X^T X

so a few steps with coefficients that push (0, 1] towards 1 replace a singular value decomposition. X is taken tall,
m >= n; a wide one is its transposed view.

Two ways to run the steps. Direct: a new R from the new X every step. Gram form: X is left alone while the steps'
factors P = a I + b R + c R^2 are multiplied up, Q <- Q P, and R follows by R <- P R P, all n x n and symmetric; then
X <- X Q once. R is noise where X has no weight, and the steps amplify it, so in short formats the Gram form restarts:
it applies Q and takes a new R. Direct is a restart after every step, and a run of steps between restarts is here a
segment. A segment of L steps costs 4 m n^2 + (4 L - 3) 2 n^3 FLOPs, of which kernels that know about symmetry do
3 m n^2 + (4 L - 3) n^3; every step with c = 0 saves one of the n^3 products.

Methods, of X divided by its Frobenius norm if nothing else is said; docs/optimizers.md has their costs and ranges:

quintic         Keller Jordan, "Muon: an optimizer for hidden layers" (2024): fast, ends within about [0.7, 1.2]
polar_express   Amsel et al., arXiv 2505.16932: the best polynomial for each step in turn
simple_quintic  the slow textbook iteration, quadratically convergent at 1
cans            arXiv 2506.10935: Chebyshev-optimal steps
deepseek_v4     DeepSeek-V4's: eight steps of `quintic`, which bring all to about 1, then two of `simple_quintic`
cubic5          arXiv 2606.00371: five cubic steps made as one, 10 products instead of 15, for singular values down to
                7e-3; later steps repeat the fifth, which neither helps nor harms
aol             Turbo-Muon, arXiv 2512.04632: columns scaled by AOL instead of the norm, then four steps. X diag(r) has
                another polar factor than X: U is as orthogonal, it spans the same columns, but is not nearest to X
svd             float64, the oracle for tests

Coefficients of cans, deepseek_v4 and cubic5 are those of NVIDIA's Emerging-Optimizers. Three sets of aol are public.
Taken: the later one of the authors, which is positive on (0, 1] and beyond. Their first one (4.6051, ...) comes as near
to 1, but theirs replaced it. Emerging-Optimizers' (4.0098, ...) turns the sign of singular values above 0.884.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from kernels import Backend, backend
from kernels.reference import TINY, has_bfloat16
from optim.unit_rows import UnitRows

Coefficients = tuple[float, float, float]

COEFFICIENTS: dict[str, list[Coefficients]] = {
    "polar_express": [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ],
    "quintic": [(3.4445, -4.7750, 2.0315)] * 5,
    "simple_quintic": [(2.0, -1.5, 0.5)] * 12,
    "cans": [
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ],
    "deepseek_v4": [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2,
    "cubic5": [
        (3.3656576, -3.3420992, 0.0),
        (2.5744352, -1.4957376, 0.0),
        (2.5368962, -1.4312570, 0.0),
        (2.4418906, -1.2764040, 0.0),
        (2.2230472, -0.9630650, 0.0),
    ],
    "aol": [
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
}
METHODS = (*COEFFICIENTS, "svd")
FORMS = ("auto", "direct", "gram")
# Factors on the Frobenius norm; None: AOL takes its place. Polar Express is tuned for spectral norms up to 1/1.02,
# which leaves room for rounding in half precision. The sources of cans and cubic5 have no such factor, but for a
# singular value 0.5% above 1 the first diverges and the second turns the sign.
SAFETY: dict[str, float | None] = {
    "polar_express": 1.02, "quintic": 1.0, "simple_quintic": 1.0, "cans": 1.02, "deepseek_v4": 1.0, "cubic5": 1.02,
    "aol": None,
}  # fmt: skip
# Longest segments that lose nothing against the direct form in bfloat16 on any spectrum of
# benchmarks/polar_quality.py, nor on one direction above little noise, where five steps of cubic5 do. Three steps of
# Polar Express lose everything where what dominates lies in few columns. In bfloat16 itself every restart saved costs
# accuracy.
LONGEST_SEGMENT: dict[torch.dtype, dict[str, int]] = {
    torch.float16: {
        "polar_express": 2, "quintic": 3, "simple_quintic": 5, "cans": 1, "deepseek_v4": 1, "cubic5": 3, "aol": 3
    },
    torch.bfloat16: dict.fromkeys(COEFFICIENTS, 1),
    torch.float32: dict.fromkeys(COEFFICIENTS, 6) | {"cans": 4},
}  # fmt: skip
# What float16 holds of a matrix with a spectral norm of about 1, times this: entries far below 1, and up to 4. (Rows
# that are multiples of each other are rounded each in its own way then: a matrix of rank one gets a little noise in
# other directions, which methods of many steps raise.)
LIFT = 2.0**14
PIECE_BYTES = 16 * 2**20  # half of the largest block that glibc keeps
Segments = list[list[Coefficients]]


def dtype_of_unit_rows(method: str, steps: int | None, dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """In what dtype `polar` with these arguments takes UnitRows, float16; None where it begins otherwise."""
    if method == "svd" or SAFETY[method] is None or storage_dtype(dtype, device, method, steps) != torch.float16:
        return None
    return torch.float16


@cache
def fast_half_dtype(device_type: str) -> torch.dtype:
    """bfloat16 where matrix products in it run in hardware, else float32."""
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device_type == "cuda" else has_bfloat16()
    return torch.bfloat16 if native else torch.float32


def check_unit_rows(X: UnitRows, method: str, steps: int | None, dtype: torch.dtype) -> None:
    if X.rows.dtype != (taken := dtype_of_unit_rows(method, steps, dtype, X.device)):
        raise ValueError(
            f"polar: method {method!r} in {dtype} takes {f'UnitRows in {taken}' if taken else 'no UnitRows'}, and "
            f"these are {X.rows.dtype}; give it the matrices themselves"
        )


@torch.no_grad()
def polar(
    X: Tensor | UnitRows,
    method: str = "polar_express",
    steps: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kernels: str = "auto",
    form: str = "auto",
) -> Tensor:
    """Polar factor of each matrix of X [..., m, n], in X's shape and in `dtype` (float64 for "svd"). UnitRows are taken
    where `dtype_of_unit_rows` names their dtype.

    `steps` defaults to the method's own number, the length of its COEFFICIENTS; further steps repeat the last. `dtype`
    is bfloat16, float16 or float32; on CUDA bfloat16 is computed in float16, which is as fast and rounds eight times
    finer, and entries are scaled to stay inside its range. `kernels` is "auto", "triton" or "torch", `form` "auto" (the
    cheaper one), "direct" or "gram" (in bfloat16 storage direct all the same, see LONGEST_SEGMENT). Works for any scale
    from 1e-30 to 1e30; a zero matrix stays zero. Not differentiable.
    Raises ValueError for other arguments.
    """
    check_polar_arguments(method, steps)
    ops, safety = backend(kernels, X.device), SAFETY.get(method)
    if isinstance(X, UnitRows):
        check_unit_rows(X, method, steps, dtype)
        is_turned, storage = X.shape[-2] < X.shape[-1], X.rows.dtype
        assert safety is not None  # or UnitRows would have been refused
        start = partial(_scaled, ops, X.rows, X.norm, safety, storage)
    else:
        X = as_matrices(X)
        if (length := piece_length(X)) is not None:
            return torch.cat([polar(piece, method, steps, dtype, kernels, form) for piece in X.split(length)])
        storage = storage_dtype(dtype, X.device, method, steps)
        if method == "svd":
            return polar_svd(X)
        is_turned = X.size(-2) <= X.size(-1)  # X X^T of a square row-major X is quicker than X^T X on CPUs
        tall = X.mT if is_turned else X
        start = partial(_normalize, ops, tall.reshape(-1, *tall.shape[-2:]), safety, storage)
    m, n = max(X.shape[-2:]), min(X.shape[-2:])
    plan = plan_segments(method, steps, storage, m, n, ops.symmetric, form)
    U, _ = newton_schulz(ops, start, plan, dtype)
    return (U.mT if is_turned else U).reshape(X.shape)


def row_scaled_polar(
    M: Tensor | UnitRows, method: str, steps: int | None, dtype: torch.dtype, kernels: str, form: str
) -> tuple[Callable[[Tensor | None, str], tuple[Tensor, Tensor]], Tensor]:
    """(polar_of, norm) for tall M [B, m, n], or for the UnitRows of tall or wide matrices as `polar` takes them; norm
    [B, m] are the norms of the rows, float32.

    `polar_of(d, outputs)` is the polar factor of d * (M / norm), [B, m, n] in `dtype`, and the sums of squares of its
    rows, float32 [B, m], for any d [B, m] that is not negative, or None for 1 in every row that is not zero; `outputs`
    ("matrix", "row_square" or "both") says which of them is wanted.
    """
    ops, safety = backend(kernels, M.device), SAFETY.get(method)
    storage = torch.float32 if method == "svd" else storage_dtype(dtype, M.device, method, steps)
    in_float16 = storage == torch.float16 and method != "aol"  # rows, before d is known
    if isinstance(M, UnitRows):
        check_unit_rows(M, method, steps, dtype)
        rows, norm = M.rows, M.norm
    else:
        rows, norm = ops.normalize_rows(M, storage if in_float16 else torch.float32)

    def polar_of(d: Tensor | None, outputs: str) -> tuple[Tensor, Tensor]:
        is_unit = d is None
        d = (norm > 0).float() if d is None else d
        if method == "svd":
            U = polar_svd(d.unsqueeze(-1) * rows)
            return U, U.square().sum(dim=-1).float()
        plan = plan_segments(method, steps, storage, rows.size(-2), rows.size(-1), ops.symmetric, form)
        if safety is None:
            start = partial(_normalize, ops, d.unsqueeze(-1) * rows, None, storage)
        elif is_unit and in_float16:  # spares a pass, by the model 2% of Aurora's two polar factors
            square_scale = frobenius_scales(d, safety)[1]
            return newton_schulz(ops, lambda: (rows, square_scale), plan, dtype, outputs)
        else:
            start = partial(_scaled, ops, rows, d, safety, storage)
        return newton_schulz(ops, start, plan, dtype, outputs)

    return polar_of, norm


def piece_length(X: Tensor) -> int | None:
    """How many matrices of a batch [B, m, n] to take at once on a CPU, None for all of them.

    Its products gain nothing from a batch, while every intermediate larger than the allocator keeps at hand has its
    pages mapped anew, at several times the cost of writing them.
    """
    if X.device.type != "cpu" or X.ndim != 3:
        return None
    length = max(1, PIECE_BYTES // (4 * X.size(-2) * X.size(-1)))
    return length if length < X.size(0) else None


def check_polar_arguments(method: str, steps: int | None) -> None:
    if method not in METHODS:
        raise ValueError(f"polar_method = {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if steps is not None and steps < 1:
        raise ValueError(f"polar_steps = {steps} must be at least 1; leave it out for the method's own number")


def polar_svd(X: Tensor) -> Tensor:
    """W V^T over the singular values that are not numerically zero, so that a zero matrix stays zero; float64."""
    W, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    rank_tolerance = S[..., :1] * max(X.shape[-2:]) * torch.finfo(torch.float64).eps
    return (W * (rank_tolerance < S).unsqueeze(-2)) @ Vh


def as_matrices(X: Tensor) -> Tensor:
    """X in a dtype the kernels read (float64 becomes float32); ValueError unless it holds real matrices."""
    if X.ndim < 2 or 0 in X.shape[-2:]:
        raise ValueError(
            f"polar: X has shape {tuple(X.shape)}; the last two dimensions must be a matrix with rows and columns"
        )
    if not X.is_floating_point():
        raise ValueError(f"polar: X has dtype {X.dtype}; it must be real floating-point, such as torch.float32")
    return X if X.dtype in LONGEST_SEGMENT else X.float()


def storage_dtype(dtype: torch.dtype, device: torch.device, method: str, steps: int | None) -> torch.dtype:
    """What matrices are held in between products, when the result is wanted in `dtype`."""
    if dtype not in LONGEST_SEGMENT:
        raise ValueError(f"polar: dtype = {dtype} must be torch.bfloat16, torch.float16 or torch.float32")
    if dtype == torch.float32 or (dtype == torch.bfloat16 and device.type != "cuda") or method == "svd":
        return dtype
    # Of many steps, as deepseek_v4's, float16's rounding is seen in weak directions: no further off than bfloat16's,
    # for which it stands in, but by more than the method itself.
    growth = 1.0
    for a, _, _ in _step_coefficients(method, steps)[:-1]:  # a loop: torch.compile knows no math.prod of a generator
        growth *= a
    return torch.float16 if growth < 30_000 or dtype == torch.bfloat16 else torch.float32


def _step_coefficients(method: str, steps: int | None) -> list[Coefficients]:
    table = COEFFICIENTS[method]
    return [table[min(step, len(table) - 1)] for step in range(steps or len(table))]


def plan_segments(
    method: str, steps: int | None, storage: torch.dtype, m: int, n: int, symmetric: bool, form: str = "auto"
) -> Segments:
    """The steps' coefficients, cut where a new Gram matrix is taken, for m x n matrices (m >= n) in dtype `storage`.

    "auto" takes the form with fewer FLOPs; `symmetric` says that symmetric products cost half.
    """
    if form not in FORMS:
        raise ValueError(f"polar: form = {form!r} is unknown; choose one of {', '.join(FORMS)}")
    coefficients = _step_coefficients(method, steps)
    longest = LONGEST_SEGMENT[storage][method]
    direct, gram = ([coefficients[i : i + k] for i in range(0, len(coefficients), k)] for k in (1, longest))
    if form == "auto":
        form = "direct" if flops(direct, m, n, symmetric) <= flops(gram, m, n, symmetric) else "gram"
    return direct if form == "direct" else gram


def flops(segments: Segments, m: int, n: int, symmetric: bool) -> float:
    """Floating-point operations of a polar factor of one m x n matrix, m >= n."""
    half = 0.5 if symmetric else 1.0
    products = sum(4 * len(segment) - 3 - sum(c == 0 for _, _, c in segment) for segment in segments)
    return len(segments) * (half + 1) * 2 * m * n**2 + products * half * 2 * n**3


def newton_schulz(
    ops: Backend, start: Callable[[], tuple[Tensor, Tensor | None]], segments: Segments, dtype: torch.dtype,
    outputs: str = "matrix",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Newton-Schulz on sqrt(square_scale) X, whose spectral norm is at most 1.

    `start` makes (X, square_scale), so that X is held here alone, and freed after the first segment: X [B, m, n],
    m >= n, in the dtype to compute in; square_scale float32 [B], None: 1.
    Returns the polar factor U [B, m, n] in `dtype` and the sums of squares of its rows, float32 [B, m]; `outputs`
    ("matrix", "row_square" or "both") says which are wanted, the other is empty. A zero matrix gives zeros.
    """
    X, square_scale = start()
    for segment in segments[:-1]:
        S, alpha = _segment_factor(ops, X, square_scale, segment)
        X, _ = ops.apply_symmetric(X, S, alpha)
    S, alpha = _segment_factor(ops, X, square_scale, segments[-1])
    scale = None if square_scale is None else square_scale.sqrt()
    return ops.apply_symmetric(X, S, alpha, scale, dtype, outputs=outputs)


def _scaled(
    ops: Backend, rows: Tensor, scale: Tensor, safety: float, storage: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(X, square_scale) as `newton_schulz` takes them, of diag(scale) rows, normalised as in `frobenius_scales`."""
    r, s = frobenius_scales(scale, safety)
    r = r * s.sqrt().unsqueeze(-1)
    if storage != torch.float16:
        return ops.scale_rows(rows, r, storage), None
    return ops.scale_rows(rows, LIFT * r, storage), torch.full_like(s, LIFT**-2)


def frobenius_scales(scale: Tensor, safety: float) -> tuple[Tensor, Tensor]:
    """(r, s) from scales [B, m] of rows of norm 1: r is proportional to them and at most 1, and sqrt(s) r * rows has
    1 / safety as its Frobenius norm; s is [B]."""
    r = scale / scale.amax(dim=-1, keepdim=True).clamp_min(TINY)
    return r, 1 / (safety**2 * r.square().sum(dim=-1).clamp_min(TINY))


def _segment_factor(
    ops: Backend, X: Tensor, square_scale: Tensor | None, segment: list[Coefficients]
) -> tuple[Tensor, float]:
    """(S, alpha) with alpha I + S the product of a segment's factors a I + b R + c R^2, R following the steps.

    The identity's share stays a number beside the matrix: stored inside, it would be rounded like everything else.
    """
    unrounded = None
    if X.dtype == torch.float16 and len(segment) > 2:  # see kernels/symmetric_product.py
        unrounded = ops.gram(X, square_scale, dtype=torch.float32)
        R = unrounded.to(X.dtype)
    else:
        R = ops.gram(X, square_scale)
    S, alpha = R, 1.0
    for i, (a, b, c) in enumerate(segment):
        if c == 0:
            Z = (b * (R if unrounded is None else unrounded)).to(R.dtype)
        else:
            Z = ops.symmetric_product(R, R, c, b, unrounded_A=unrounded)
        S = Z if i == 0 else ops.symmetric_product(S, Z, 1, a, alpha)
        alpha *= a
        if i + 1 < len(segment):
            half_way = ops.symmetric_product(R, Z, 1, a, unrounded_A=unrounded)
            R, unrounded = ops.symmetric_product(half_way, Z, 1, a), None
    return S, alpha


def _normalize(ops: Backend, X: Tensor, safety: float | None, storage: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(Y, square_scale) as `newton_schulz` takes them, of X [B, m, n], with Y in `storage`.

    X is divided by `safety` times its Frobenius norm; without `safety` its columns are scaled by AOL.
    """
    if safety is None:
        X = scale_columns(ops, X, storage)
    if storage == torch.float16:
        scale = torch.full((X.size(0), 1), LIFT, device=X.device)
        square_scale = scale.squeeze(-1) ** -2
        if safety is not None:
            _, norm = ops.normalize_rows(X, storage)  # for norms of any magnitude, in one pass
            largest = norm.amax(dim=-1, keepdim=True).clamp_min(TINY)
            whole = safety * largest * torch.linalg.vector_norm(norm / largest, dim=-1, keepdim=True)
            scale = scale / whole.clamp_min(LIFT * TINY)
        return ops.scale_rows(X, scale.expand(X.shape[:2]), storage), square_scale
    if safety is not None:
        X = X.float()
        X = X / X.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(TINY)  # squares stay inside float32's range
        X = X.div_((safety * torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)).clamp_min(TINY))
    return X.to(storage), None


def scale_columns(ops: Backend, X: Tensor, storage: torch.dtype) -> Tensor:
    """AOL: X diag(r), float32, for X [B, m, n] and r_j = (sum_i |X^T X|_ij)^(-1/2). Its spectral norm is at most 1.

    With Y the columns at norm 1 and c their norms that is Y_j (c_j / sum_i c_i |Y^T Y|_ij)^(1/2): the products are of
    numbers up to 1, which float16 holds whatever the columns' norms are.
    """
    Y, norm = ops.normalize_rows(X.mT, torch.float32)
    norm = norm / norm.amax(dim=-1, keepdim=True).clamp_min(TINY)
    total = ops.gram(Y.mT.to(storage), dtype=torch.float32).abs() @ norm.unsqueeze(-1)
    return Y.mT * (norm / total.squeeze(-1).clamp_min(TINY)).sqrt().unsqueeze(-2)
