"""Memory that a training step takes on each rank, counted without any: the model, its passes and its update rules run
on the device meta, where tensors have shapes and no numbers.

Nothing here knows an architecture: whatever model.py computes is what is counted, so that no formula goes stale. Exact
are weights, gradients and optimizer state, and without torch.compile also what autograd keeps for the backward pass
(benchmarks/memory_use.py measures all of it). Not counted is what lies outside torch's tensors: a GPU's context and
NCCL's buffers, together about a gigabyte, and gaps that the allocator leaves.
"""

import dataclasses
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from architectures import class_of
from harness.fsdp import cut_dim
from kernels.linear_cross_entropy import default_chunk_tokens
from model import GPT, FusedPart, ModelConfig
from optim import MatrixOptimizer
from optim.apply_update import apply_update, scaled
from optim.bank import Bank
from optim.shards import flat_ranges

aten = torch.ops.aten
FUSED_PARTS: tuple[FusedPart, ...] = get_args(FusedPart)
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._scaled_mm)  # torch.compile keeps what they read and make


def nbytes(tensors: Iterable[Any]) -> int:
    return sum(value.nbytes for value in tensors if isinstance(value, Tensor))


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def sparse_tables(model: nn.Module) -> list[Tensor]:
    return [part.weight for part in model.modules() if isinstance(part, nn.Embedding) and part.sparse]


def share(p: Tensor, ranks: int, fsdp: bool) -> float:
    """The part of a parameter that the first rank keeps, which has the longest shards."""
    return sum(map(len, flat_ranges(p.shape, cut_dim(p, ranks), 0, ranks))) / p.numel() if fsdp else 1.0


# ------------------------------------------------------------------------------------------------------------
# Optimizer state


def state_of_matrix(optimizer: MatrixOptimizer, bank: Bank, group: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes for each matrix of a bank: momentum, master copy, what the rule adds."""
    momentum = torch.float32.itemsize * bank.m * bank.n
    rule = nbytes(optimizer.rule_state(bank.m, bank.n, group).values())
    return momentum, momentum if bank.needs_master else 0, rule


def replicated_state_bytes(optimizer: torch.optim.Optimizer) -> dict[Tensor, int]:
    """Bytes of state of each parameter of an optimizer of torch, from a step without memory."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p)
    optimizer.step()
    return {p: nbytes(state.values()) for p, state in optimizer.state.items()}


def state_bytes(optimizers: Iterable[torch.optim.Optimizer], ranks: int, fsdp: bool) -> dict[str, float]:
    """Bytes on the first of `ranks` ranks, by kind of state."""
    parts = {"momentum of matrices": 0.0, "float32 masters": 0.0, "state of the rule": 0.0}
    for optimizer in optimizers:
        if isinstance(optimizer, MatrixOptimizer):
            for bank, group in optimizer.plan_banks(0, ranks):
                for part, each in zip(list(parts)[:3], state_of_matrix(optimizer, bank, group), strict=True):
                    parts[part] += each * bank.num_slots
        else:
            held = sum(size * share(p, ranks, fsdp) for p, size in replicated_state_bytes(optimizer).items())
            name = f"state of {type(optimizer).__name__}"
            parts[name] = parts.get(name, 0) + held
    return {part: size for part, size in parts.items() if size}


# ------------------------------------------------------------------------------------------------------------
# A forward and backward pass


class Tally(TorchDispatchMode):
    """Counts the bytes of all storages that are made in its block: how many are alive, the most at any time, and those
    that a product or attention reads or makes."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.of_products = self.largest_product = 0
        self._storages = set[int]()  # alive; their bytes count until they are freed
        self._counted = set[int]()  # those of products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {value.untyped_storage()._cdata for value in tensors_in((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = tensors_in(result)
        for value in made:
            if value.untyped_storage()._cdata not in given:  # else a view, maybe of what was there before the block
                self._note(value.untyped_storage())
        if func.overloadpacket in PRODUCTS or func.namespace == kernels.NAMESPACE:
            self.keep([*tensors_in(args), *made])
            self.largest_product = max([self.largest_product, *(value.nbytes for value in made)])
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self._counted.discard(key)
        self.alive -= size

    def keep(self, values: Iterable[Tensor]) -> None:
        """Count these among what products read and make; not what was there before the block."""
        for storage in (value.untyped_storage() for value in values):
            if storage._cdata in self._storages and storage._cdata not in self._counted:
                self._counted.add(storage._cdata)
                self.of_products += storage.nbytes()


class _FlashAttention(torch.autograd.Function):
    """Makes and keeps what fused attention does: beside q, k, v [B, H, T, K] the result and one float32 per query. On
    meta torch would make all scores instead. A CPU also keeps a mask, in q's dtype."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        sums = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums, *([] if mask is None else [mask.to(q.dtype)]))
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(saved) for saved in ctx.saved_tensors[:3]), None


class _FusedAttention(TorchFunctionMode):
    """A block in which scaled_dot_product_attention is _FlashAttention, and `tally` knows that it is no chain of
    elementwise operations."""

    def __init__(self, tally: Tally, keeps_mask: bool) -> None:
        super().__init__()
        self.tally, self.keeps_mask = tally, keeps_mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v, mask = (*args, None)[:4]
        out = _FlashAttention.apply(q, k, v, mask if self.keeps_mask else None)
        self.tally.keep([q, k, v, out])
        return out


@dataclass(frozen=True)
class Activations:
    """Bytes beyond weights, gradients and state in the passes of one micro-batch.

    blocks: alive when all blocks have run forward. kept: alive between the forward and the backward pass, which is what
    autograd keeps. most: at any time, with what is soon thrown away, such as float32 logits and their gradient.
    """

    blocks: int
    kept: int
    most: int


@cache
def activations(
    config: ModelConfig, dtype: torch.dtype, device_type: str, shape: tuple[int, ...], fsdp: bool = False
) -> tuple[Activations, Activations]:
    """(without torch.compile, with it) for a micro-batch of `shape` = (rows, tokens) on a device of this type.

    Without, counts are of the operations that eager torch calls, and exact but for what a kernel takes inside. With it,
    they are an estimate: elementwise operations and norms are made again in the backward pass, so that what products
    and attention read and make is kept, and at the most the largest of it once more, whose gradient it meets.
    """
    parts = config.fused_parts(device_type)
    fused = tuple(part for part in FUSED_PARTS if part in parts) or ("none",)  # as on that device, not as on meta
    config = dataclasses.replace(config, fused=fused)
    with torch.device("meta"):
        model = class_of(config)(config, dtype, 0)
        inputs, targets = (torch.empty(shape, dtype=kind) for kind in (torch.int32, torch.int64))
    if fsdp:  # gathers weights in the dtype of the products
        model.blocks.to(dtype)
    for table in sparse_tables(model):  # meta knows no sparse gradients; dry_run.py counts them
        table.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.empty_like(p)  # as from the second micro-batch on
    operator = 0  # what the fused head holds while it runs: a chunk's logits, and its weight in their dtype
    if "head" in parts:
        chunk = default_chunk_tokens(config.padded_vocab_size, dtype, torch.device(device_type))
        rows = min(inputs.numel(), chunk) + (config.model_dim if dtype.itemsize < 4 else 0)
        operator = rows * config.padded_vocab_size * dtype.itemsize
        if "head" in config.float8:  # hidden states and weight, one byte each
            operator += (inputs.numel() + config.padded_vocab_size) * config.model_dim
    with Tally() as tally, _FusedAttention(tally, device_type == "cpu"):
        hidden = model.hidden(inputs)
        blocks, blocks_compiled = tally.alive, tally.of_products
        loss = model.loss(hidden, targets)
        del hidden
        kept, kept_compiled = tally.alive, tally.of_products
        loss.backward()
    most = max(tally.peak, kept + operator)
    most_compiled = kept_compiled + max(tally.largest_product, operator)
    compiled = (min(pair) for pair in ((blocks, blocks_compiled), (kept, kept_compiled), (most, most_compiled)))
    return Activations(blocks, kept, most), Activations(*compiled)


# ------------------------------------------------------------------------------------------------------------
# What else there is at the peak


def gathered_bytes(model: GPT, dtype: torch.dtype) -> int:
    """With fsdp: what a rank holds whole for a while, of the parameters around the blocks and of two blocks (the next
    is fetched meanwhile): weights, those of blocks in `dtype`, and float32 gradients."""
    numbers = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    around = sum(p.numel() for p in model.parameters()) - sum(numbers)
    return 2 * torch.float32.itemsize * around + 2 * max(numbers) * (dtype.itemsize + torch.float32.itemsize)


def update_bytes(optimizers: Iterable[torch.optim.Optimizer], ranks: int, fsdp: bool) -> tuple[int, int]:
    """The most that matrices take (between the ranks, which begins while backward still runs; in the update after it).

    Between the ranks: the gradients as they are sent, and float32 ones of the rank's own matrices. In the update: bank
    by bank what the rule works with, beside the gradients that are left and the directions that are there already; then
    the directions of all matrices, with fsdp of the rank's part, and what applying those of one bank takes. Directions
    count as float32, though polar factors are shorter on a GPU, and gradients as copies, though there a rank alone
    reads them where they are. What torch's products pack of bfloat16 operands on a CPU with units for them is not
    counted: of an update of three layers of 128, 2% with Muon and 14% with Aurora.
    """
    width, sent, largest, most, done = torch.float32.itemsize, 0, 0, 0, 0
    matrix_optimizers = [each for each in optimizers if isinstance(each, MatrixOptimizer)]
    banks = [(each, *planned) for each in matrix_optimizers for planned in each.plan_banks(0, ranks)]
    own = left = sum(width * bank.num_slots * bank.m * bank.n for _, bank, _ in banks)
    for optimizer, bank, group in banks:
        own_numbers = bank.num_slots * bank.m * bank.n
        numbers = own_numbers if fsdp else own_numbers * ranks
        with Tally() as tally:
            state = nbytes(optimizer.rule_state(bank.m, bank.n, group).values())
        work = tally.peak - state - 2 * width * bank.m * bank.n  # momentum and gradient are counted elsewhere
        most = max(most, left + done + bank.num_slots * work)
        left, done = left - own_numbers * width, done + numbers * width
        sent += numbers * optimizer.comm_dtype.itemsize
        weight, direction = torch.empty(2, bank.m, bank.n, device="meta")
        with Tally() as tally:
            apply_update([weight], [scaled(direction, bank.m, bank.n, group, None)], group, None)
        largest = max(largest, tally.peak * numbers // (bank.m * bank.n))
    return sent + own if ranks > 1 else 0, max(most, done + largest)
