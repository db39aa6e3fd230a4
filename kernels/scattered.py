"""Matrices of one batch that are tensors of their own, for kernels that read them where they are.

A kernel takes their addresses from a table on the device. Tables are kept by what they hold: a step copies one to the
device only where addresses have changed, and does not wait for that. While a CUDA graph is captured there are no new
ones, and what it reads stays for its replays.
"""

from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import DTYPES

PLAIN = (Tensor, torch.nn.Parameter)  # tensors of a subclass may have no memory of their own
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
MOST_TABLES = 1024
Rows = tuple[tuple[int, ...], ...]
_tables: dict[tuple[Rows, torch.device], Tensor] = {}  # the last used at the end
_captured: dict[tuple[Rows, torch.device], Tensor] = {}  # what CUDA graphs read when they are replayed, for ever
_lock = Lock()


class Scattered(NamedTuple):
    """A batch of matrices some of which may be missing."""

    tensors: list[Tensor]  # those that are there: contiguous, of one size, dtype and device
    addresses: tuple[int, ...]  # of each matrix, 0 where it is missing
    device: torch.device

    @property
    def table(self) -> Tensor:
        """The addresses, int64 [1, B]."""
        return address_table((self.addresses,), self.device)

    @property
    def is_aligned(self) -> bool:
        return are_aligned(self.addresses)


def scattered(matrices: Sequence[Tensor | None], device: torch.device) -> Scattered | None:
    """None if kernels cannot read them where they are."""
    tensors = [X for X in matrices if X is not None]
    dtype = tensors[0].dtype if tensors else torch.float32
    if dtype not in DTYPES or not all(
        type(X) in PLAIN and X.dtype == dtype and X.device == device and X.is_contiguous() and not X.is_neg()
        for X in tensors
    ):
        return None
    addresses = tuple([0 if X is None else X.data_ptr() for X in matrices])
    if len(tensors) != sum(map(bool, addresses)):  # one has no memory, as zeros that torch has not made yet
        return None
    if is_capturing(device) and ((addresses,), device) not in _tables:
        return None
    return Scattered(tensors, addresses, device)


def are_aligned(addresses: Sequence[int]) -> bool:
    """To 16 bytes, which a kernel may load at once."""
    return not any(address % 16 for address in addresses)


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def address_table(rows: Rows, device: torch.device) -> Tensor:
    """`rows` on the device, int64; not to be written to, and there for the stream that asks first. RuntimeError for a
    new one while a CUDA graph is captured: it would be filled by replays alone."""
    key = rows, device
    with _lock:
        result = _tables.pop(key, None)
        if result is None and is_capturing(device):
            raise RuntimeError(
                "a CUDA graph cannot capture this: matrices lie where no kernel has found them before; take an "
                "ordinary step first"
            )
        if result is None:
            result = torch.tensor(rows)
            if device.type == "cuda":
                result = result.pin_memory().to(device, non_blocking=True)
        _tables[key] = result
        if len(_tables) > MOST_TABLES:
            del _tables[next(iter(_tables))]
        if is_capturing(device):
            _captured[key] = result
    return result


@triton.jit
def matrix_at(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to the matrix at that address; ALIGNED is what the compiler cannot know of a loaded one."""
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer
