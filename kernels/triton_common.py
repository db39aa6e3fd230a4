"""What the Triton kernels share: tile sizes for a device, checks of arguments, and their registration with torch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import Library, infer_schema, register_fake
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import NAMESPACE, constant

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ARCHITECTURES = (80, 89, 90, 100)  # compute capabilities with tiles of their own; a device takes the next lower one's

# Of each operator, by name, with its module. When that is loaded again, as notebooks do, the new one takes its place.
_libraries: dict[str, tuple[str, Library]] = globals().get("_libraries", {})


class Tile(NamedTuple):
    """One program's share of the output (rows x columns), how much of the summed dimension it loads at a time
    (depth), its warps, and the loads it keeps in flight (stages)."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Tiles of the matrix products, by architecture. Chosen for occupancy and shared memory from compiler output
# (python -m benchmarks.kernel_resources); see docs/speed.md for an H100. python -m benchmarks.polar_tiles times others.
LARGE = {80: Tile(128, 128, 32, 8, 4), 89: Tile(128, 128, 32, 8, 3)}
LARGE |= dict.fromkeys((90, 100), Tile(128, 128, 64, 8, 3))
SMALL = dict.fromkeys((80, 89), Tile(64, 64, 32, 4, 3)) | {90: Tile(64, 64, 64, 4, 3), 100: Tile(64, 64, 32, 8, 3)}
FLOAT32 = dict.fromkeys(ARCHITECTURES, Tile(32, 32, 32, 4, 2))


def product_tile(X: Tensor) -> Tile:
    """For a product whose output has X's number of columns."""
    tiles = FLOAT32 if X.dtype == torch.float32 else LARGE if X.size(-1) > 256 else SMALL
    return tiles[architecture(X.device)]


def architecture(device: torch.device) -> int:
    """The entry of ARCHITECTURES for a device; Triton's interpreter takes Hopper's."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return max(a for a in ARCHITECTURES if a <= 10 * major + minor)


def describes(*matrices: Tensor) -> bool:
    """Whether a kernel can load these batches [B, m, n] by descriptor (the bulk copies of Hopper and later): the first
    in half precision, rows or columns next to each other in memory, and all else a multiple of 16 bytes apart."""
    first = matrices[0]
    if first.itemsize != 2 or architecture(first.device) < 90 or first.numel() == 0:
        return False
    for X in matrices:
        batch, row, column = X.stride()
        near, far = (row, column) if row < column else (column, row)
        if near != 1 or not batch or far * X.itemsize % 16 or batch * X.itemsize % 16 or X.data_ptr() % 16:
            return False
    return True


def descriptor(X: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """For `load_block` of [rows, columns] of X [B, m, n]; of X^T where that is what memory holds. Zeros outside."""
    if X.stride(2) != 1:
        X, rows, columns = X.mT, columns, rows
    result = object.__new__(TensorDescriptor)  # without its own checks, which `describes` has made, for every launch
    result.base, result.shape, result.strides, result.block_shape = X, [*X.shape], [*X.stride()], [1, rows, columns]
    return result


def operator(
    fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of tensors as an operator of NAMESPACE with its name, which torch.compile (fullgraph) takes
    as one opaque node; `fake` makes its outputs without computing them, `mutates` names the arguments written to."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.lstrip("_")
        schema, module = infer_schema(function, mutates_args=mutates), function.__module__
        if (owner := _libraries.get(name, (module,))[0]) != module:
            raise ValueError(f"{module} and {owner} both have an operator {name}; choose another name")
        _libraries.pop(name, None)  # which takes the operator back
        library = Library(NAMESPACE, "FRAGMENT")
        _libraries[name] = module, library
        library.define(name + schema)

        def on_its_device(X: Tensor, *arguments: Any) -> Any:
            if not can_launch(X.device):
                raise ValueError(
                    f"{name}: the matrices are on {X.device}; Triton kernels need a CUDA GPU of compute capability "
                    "8.0 or later; use kernels = 'torch' or 'auto'"
                )
            with torch.cuda.device_of(X):
                return function(X, *arguments)

        library.impl(name, on_its_device, "CompositeExplicitAutograd")
        register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register


@constant
def can_launch(device: torch.device) -> bool:
    """On CUDA from compute capability 8.0; anywhere under Triton's interpreter (TRITON_INTERPRET=1)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return triton.knobs.runtime.interpret


def check_batch(what: str, X: Tensor, like: Tensor | None = None) -> None:
    """ValueError unless X is a batch of matrices that a kernel can read (with the dtype and device of `like`)."""
    if X.ndim != 3 or 0 in X.shape[1:]:
        raise ValueError(f"{what} has shape {tuple(X.shape)}; it must be a batch of matrices [B, m, n], m and n >= 1")
    if X.dtype not in DTYPES:
        raise ValueError(f"{what} has dtype {X.dtype}; it must be float16, bfloat16 or float32")
    if like is not None and (X.dtype, X.device) != (like.dtype, like.device):
        raise ValueError(
            f"{what} is {X.dtype} on {X.device}, the first matrix {like.dtype} on {like.device}; make them equal"
        )


def empty_in_order(X: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised [B, m, n] of that dtype in X's order of memory."""
    B, m, n = X.shape
    return X.new_empty((B, n, m), dtype=dtype).mT if X.stride(1) < X.stride(2) else X.new_empty((B, m, n), dtype=dtype)


def check_scale(what: str, scale: Tensor | None, shape: tuple[int, ...], X: Tensor) -> Tensor | None:
    """`scale`, contiguous; ValueError unless it is left out, or float32 of that shape on X's device."""
    if scale is None:
        return None
    if scale.shape != shape or scale.dtype != torch.float32 or scale.device != X.device:
        raise ValueError(
            f"{what} is {scale.dtype} {tuple(scale.shape)} on {scale.device}; it must be float32 {shape} on {X.device}"
        )
    return scale.contiguous()


def number_or_tensor(value: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """What a kernel takes a number as: itself, or where it is a tensor of one element on the kernel's device, the place
    to read it from, so that nobody waits for it."""
    if isinstance(value, Tensor) and value.device == device:
        return 0.0, value.float()
    return float(value), None


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv, which is for kernels too, takes the host several times as long."""
    return -(-a // b)


def launch_options(warps: int, stages: int) -> dict[str, Any]:
    """Of a kernel's launch: a multiplication and an addition become one instruction, whatever Triton's default is."""
    return dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def precision(dtype: torch.dtype) -> str:
    """Of tl.dot: float32 products are exact ("ieee"), not rounded to TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def load_block(x, b, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """X_b[row : row + ROWS, column : column + COLUMNS] by a descriptor of X, or, with TRANSPOSED, of X^T."""
    if TRANSPOSED:
        return tl.trans(tl.reshape(x.load([b, column, row]), (COLUMNS, ROWS)))
    return tl.reshape(x.load([b, row, column]), (ROWS, COLUMNS))


@triton.jit
def lower_triangle(t):
    """The t-th pair (i, j) with i >= j: (0, 0), (1, 0), (1, 1), (2, 0) ..."""
    i = ((tl.sqrt(8.0 * t + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)  # the square root may round across an integer
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    return i, t - i * (i + 1) // 2
