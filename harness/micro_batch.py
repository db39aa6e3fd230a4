"""micro_batch_tokens = 0: the most tokens that every rank can take through the model at once.

A pass needs memory that does not depend on its tokens (weights, gradients, optimizer state) and memory per token (what
autograd keeps for the backward pass). Passes of two small micro-batches tell both, so that none near the limit has to
be tried. On a CPU more than CPU_TOKENS at once gain nothing.
"""

import dataclasses
import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from data.loader import TokenLoader
from harness.machine import Machine
from optim.shards import local

CPU_TOKENS = 4096
PROBE_TOKENS = 8192  # of the larger of the two passes, at most; or four rows
USABLE = 0.9  # of the memory that is free: the allocator leaves gaps, and shapes of validation differ


def choices(batch_tokens: int, is_halved: bool, row_tokens: int, world_size: int) -> list[int]:
    """In tokens, micro-batches that divide a rank's share of the batch, and of half a batch if there are such. A row
    where nothing divides: the loader then says what would."""
    half = batch_tokens // 2 if is_halved else 0
    rows = math.gcd(batch_tokens, half) // (world_size * row_tokens)
    return [row_tokens * number for number in range(1, rows + 1) if rows % number == 0] or [row_tokens]


def check_shapes(config: Any, loader: TokenLoader, plans: Sequence[Any]) -> None:
    """Raises ValueError for a batch that ranks and micro-batches do not divide, at the run's full size or in one of the
    trainer's plans."""
    loader.shape(config.batch_tokens, config.seq_len)
    for plan in plans:
        try:
            loader.shape(plan.batch_tokens, plan.row_tokens)
        except ValueError as error:
            when = f"small_batch_steps = {config.small_batch_steps}, short_row_steps = {config.short_row_steps}"
            raise ValueError(f"{when}: in some steps {error}") from None


def usual_on_cpu(known: list[int]) -> int:
    return max((tokens for tokens in known if tokens <= CPU_TOKENS), default=known[0])


def peak_bytes(run: Any, tokens: int) -> int:
    """Most memory that a forward and backward pass of so many tokens holds on this GPU, gradients and all."""
    shape = tokens // run.config.seq_len, run.config.seq_len
    inputs, targets = (torch.randint(run.config.vocab_size, shape, device=run.machine.device) for _ in range(2))
    for _ in range(2):  # the first one compiles, and makes room for gradients
        torch.cuda.reset_peak_memory_stats()
        (run.compiled(inputs.int(), targets, run.window) / tokens).backward()
    return torch.cuda.max_memory_allocated()


def bytes_later(run: Any) -> int:
    """What the run will hold besides: the copy that warm-up puts back, of weights and, resumed, of the optimizers'
    state; an average of the weights, and another copy while it is evaluated."""
    weights = sum(local(p).nbytes for p in run.model.parameters())
    state = sum(local(value).nbytes for optimizer in run.optimizers for entry in optimizer.state.values()
                for value in entry.values() if isinstance(value, Tensor))  # fmt: skip
    return weights * (3 if run.config.average_steps else 1) + state


def room_bytes() -> int:
    """Memory of this GPU that this process has or could have."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def probes(known: list[int]) -> tuple[int, int]:
    """The choices that are measured, the same twice if only one is small."""
    small = [tokens for tokens in known if tokens <= max(PROBE_TOKENS, 4 * known[0])]
    return small[max(0, len(small) - 2)], small[-1]


def choose(known: list[int], peak: Callable[[int], int], room: int) -> tuple[int, str]:
    """The largest of the choices whose pass fits into the room, and what is expected of it."""
    small, large = probes(known)
    peak_small, peak_large = peak(small), peak(large)
    per_token = max(0.0, (peak_large - peak_small) / max(1, large - small))
    expected = {
        tokens: peak_small + per_token * (tokens - small) for tokens in known if tokens <= large or small < large
    }
    chosen = max((tokens for tokens, size in expected.items() if size <= USABLE * room), default=known[0])
    told = f"{expected[chosen] / 2**30:.1f} GiB of {room / 2**30:.1f} GiB expected"
    return chosen, f"{told}, {per_token / 2**10:.0f} KiB per token"


def with_micro_batch(
    config: Any, machine: Machine, set_up: Callable[[Any, Machine], Any], train_step: Callable[..., Tensor]
) -> tuple[Any, Machine]:
    """The settings with micro_batch_tokens filled in, the same on all ranks, and the machine with a note of it.
    set_up, train_step: the trainer's."""
    known = choices(config.batch_tokens, config.small_batch_steps > 0, config.seq_len, machine.world_size)
    if machine.device.type == "cuda":
        anew = dict(resume="", init_from="", eval_every=0, eval_tasks=())
        run = set_up(dataclasses.replace(config, micro_batch_tokens=probes(known)[0], **anew), machine)
        train_step(run, *run.batch())  # the optimizers' state is there then
        chosen, why = choose(known, lambda tokens: peak_bytes(run, tokens), room_bytes() - bytes_later(run))
        run.loader.close()
        del run
        gc.collect()
        torch.cuda.empty_cache()
    else:
        chosen, why = usual_on_cpu(known), "a CPU's usual"
    chosen = machine.least(chosen)
    notes = (*machine.notes, f"micro_batch_tokens = {chosen} ({why})")
    return dataclasses.replace(config, micro_batch_tokens=chosen), dataclasses.replace(machine, notes=notes)
