"""The one product that Newton-Schulz on a Gram matrix is made of, one triangle computed and mirrored.

    C = alpha A B + beta A + gamma B        A, B, C [B, n, n] symmetric, A and B commuting

Polynomials of one symmetric matrix commute, and so do their products, so C is symmetric and half of it need not be
computed. With R the Gram matrix and the step p(s) = a s + b s^3 + c s^5, Z = b R + c R R gives the step's factor
a I + Z, and (a I + Z) applied to a running factor (y I + Y) gives (a y) I + (Y Z + a Y + y Z): the identity part is a
number that is never stored, hence never rounded.

`unrounded_A`, float32, may stand in for A in beta A. The first two of three steps multiply whatever rounding leaves in
R where X is weak by their a^2 (12 each in the method `quintic`), and they do so through that term; beside a dominant
singular value the rounding of float16 would be felt.

With T = ceil(n / tile): n^3 (1 + 1/T) FLOPs, 2 n^3 dense; bytes in half precision 4 n^2 read, 2 n^2 written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import (
    Tile,
    cdiv,
    check_batch,
    check_scale,
    describes,
    descriptor,
    launch_options,
    load_block,
    lower_triangle,
    operator,
    precision,
    product_tile,
)


@triton.jit
def symmetric_product_kernel(
    left, right, tile_added, tile_b, a, b, added, out, n, alpha, beta, gamma,
    ALPHA: tl.constexpr, BETA: tl.constexpr, GAMMA: tl.constexpr, SIZE: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Tiles (i, j) and (j, i) of alpha A B + beta added + gamma B, all contiguous [n, n]. The first four are
    descriptors, of A, B, `added` and B, by which all is loaded if DESCRIBED."""
    tiles = tl.cdiv(n, SIZE)
    pairs = tiles * (tiles + 1) // 2
    matrix = tl.program_id(0) // pairs
    batch = matrix.to(tl.int64) * n * n
    i, j = lower_triangle(tl.program_id(0) % pairs)
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    if DESCRIBED:
        for k in range(0, n, DEPTH):
            a_block = load_block(left, matrix, i * SIZE, k, SIZE, DEPTH, False)
            b_block = load_block(right, matrix, k, j * SIZE, DEPTH, SIZE, False)
            total = tl.dot(a_block, b_block, total)
    else:
        rows, columns, depth = i * SIZE + tl.arange(0, SIZE), j * SIZE + tl.arange(0, SIZE), tl.arange(0, DEPTH)
        a_tile = a + batch + rows[:, None].to(tl.int64) * n + depth[None, :]
        b_tile = b + batch + depth[:, None].to(tl.int64) * n + columns[None, :]
        for k in range(0, n, DEPTH):
            a_block = tl.load(a_tile, mask=(rows < n)[:, None] & (k + depth < n)[None, :], other=0.0)
            b_block = tl.load(b_tile, mask=(k + depth < n)[:, None] & (columns < n)[None, :], other=0.0)
            total = tl.dot(a_block, b_block, total, input_precision=PRECISION)
            a_tile += DEPTH
            b_tile += DEPTH * n
    if ALPHA:  # a factor of 1 would cost a register, and with beta and gamma so the second block on a multiprocessor
        total *= alpha
    if DESCRIBED:
        if BETA:
            total += beta * load_block(tile_added, matrix, i * SIZE, j * SIZE, SIZE, SIZE, False).to(tl.float32)
        if GAMMA:
            total += gamma * load_block(tile_b, matrix, i * SIZE, j * SIZE, SIZE, SIZE, False).to(tl.float32)
    else:
        tile = batch + rows[:, None].to(tl.int64) * n + columns[None, :]
        is_inside = (rows < n)[:, None] & (columns < n)[None, :]
        if BETA:
            total += beta * tl.load(added + tile, mask=is_inside, other=0.0).to(tl.float32)
        if GAMMA:
            total += gamma * tl.load(b + tile, mask=is_inside, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    if i == j:  # A and B commute but for rounding, and what is not symmetric here would grow from step to step
        result = (0.5 * (total + tl.trans(total))).to(out.dtype.element_ty)
    # Computed again: kept from above they would cost registers, and so the second block on a multiprocessor
    rows, columns = i * SIZE + tl.arange(0, SIZE), j * SIZE + tl.arange(0, SIZE)
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    out += batch
    tl.store(out + rows[:, None].to(tl.int64) * n + columns[None, :], result, mask=inside)
    if i != j:
        tl.store(out + columns[:, None].to(tl.int64) * n + rows[None, :], tl.trans(result), mask=tl.trans(inside))


def symmetric_product(
    A: Tensor,
    B: Tensor,
    alpha: float = 1,
    beta: float = 0,
    gamma: float = 0,
    unrounded_A: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """alpha A B + beta A + gamma B for symmetric A and B [B, n, n] that commute, so that the result is symmetric.

    A and B of one shape and dtype (float16, bfloat16 or float32); sums in float32, the result in their dtype.
    `unrounded_A` float32 [B, n, n], from which A was rounded, takes its place in beta A. `tile` replaces the device's
    own. Raises ValueError for other arguments; symmetry is not checked.
    """
    check_batch("symmetric_product: A", A)
    check_batch("symmetric_product: B", B, like=A)
    if A.shape != B.shape or A.size(1) != A.size(2):
        raise ValueError(
            f"symmetric_product: A has shape {tuple(A.shape)} and B {tuple(B.shape)}; "
            "both must have one shape [B, n, n]"
        )
    unrounded_A = check_scale("symmetric_product: unrounded_A", unrounded_A, tuple(A.shape), A)
    added = A.contiguous() if unrounded_A is None else unrounded_A
    return _symmetric_product(A.contiguous(), B.contiguous(), added, alpha, beta, gamma, tile and list(tile))


@operator(fake=lambda A, *_: torch.empty_like(A))
def _symmetric_product(
    A: Tensor, B: Tensor, added: Tensor, alpha: float, beta: float, gamma: float, tile: list[int] | None
) -> Tensor:
    out = torch.empty_like(A)
    n = A.size(-1)
    size, _, depth, warps, stages = tile or product_tile(A)
    tiles = cdiv(n, size)
    described = describes(A, B, added)
    # Each takes the host some microseconds
    descriptors = [(A, size, depth), (B, depth, size), (added, size, size) if beta else None,
                   (B, size, size) if gamma else None]  # fmt: skip
    symmetric_product_kernel[(A.size(0) * tiles * (tiles + 1) // 2,)](
        *(descriptor(*each) if described and each else None for each in descriptors),
        A, B, added, out, n, alpha, beta, gamma, ALPHA=alpha != 1, BETA=beta != 0, GAMMA=gamma != 0, SIZE=size,
        DEPTH=depth, PRECISION=precision(A.dtype), DESCRIBED=described, **launch_options(warps, stages),
    )  # fmt: skip
    return out
