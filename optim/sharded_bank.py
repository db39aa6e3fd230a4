"""Banks of matrices that lie in shards on the ranks, as torch's fully_shard leaves them: cut along their rows, or along
a dimension before these (dimension 0 of a stack, say).

Row by row, the numbers of a parameter are one sequence. A matrix is a range of it, a rank's shard a few others, and
where they overlap is what the rank has of that matrix: some rows, a whole matrix of a stack, or nothing. So matrices
have owners as in bank.py, and the ranks exchange overlaps alone:

    mean gradients, in shards  --all-to-all--> gradient [P, m, n] of the rank's own
    state [P, ...], update rule -------------> direction [P, m, n]
    direction                  --all-to-all--> the updates of every rank's shards

Where R divides B, a rank sends B m n (R - 1) / R^2 numbers each way: for its shard, 1 / R of all numbers, the part that
others own. What depends on more of a weight than one number (a norm that is kept, a floor under the update) is done by
the matrix's owner, which asks for the weights and returns them: an all-to-all more.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from optim.apply_update import constrains
from optim.bank import Bank
from optim.gradients import Gradients
from optim.shards import cut_of, flat_ranges, local


class Piece(NamedTuple):
    """Part of a tensor's numbers: `which` says of which, a parameter's shard or a slot's matrix."""

    which: int
    start: int
    stop: int


class Exchange(NamedTuple):
    """Pieces under way: what arrives, in which pieces, and what it is sent from."""

    received: Tensor
    pieces: list[Piece]
    work: dist.Work | None
    sent: Tensor

    def wait(self) -> tuple[Tensor, ...]:
        """What has arrived, piece by piece."""
        if self.work is not None:
            self.work.wait()
        return self.received.split([piece.stop - piece.start for piece in self.pieces])


class ShardedBank(Bank):
    """A bank whose parameters are DTensors, cut as `cut_of` says over the ranks of `process_group`."""

    is_sharded = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._to_owner: list[list[Piece]] = [[] for _ in range(self.num_ranks)]  # of this rank's shards
        self._from_rank: list[list[Piece]] = [[] for _ in range(self.num_ranks)]  # of this rank's matrices
        first_matrix, each = 0, self.m * self.n
        for index, (p, size) in enumerate(zip(self.params, self.sizes, strict=True)):
            for rank in range(self.num_ranks):
                passed = 0  # numbers of the rank's shard
                for held in self._numbers(p, rank):
                    for place in range(held.start // each, math.ceil(held.stop / each)):  # the matrices they are of
                        start, stop = max(held.start, place * each), min(held.stop, (place + 1) * each)
                        slot, owner = divmod(first_matrix + place, self.num_ranks)
                        if owner == self.rank:
                            self._from_rank[rank].append(Piece(slot, start - place * each, stop - place * each))
                        if rank == self.rank:
                            self._to_owner[owner].append(Piece(index, passed, passed + stop - start))
                        passed += stop - start
            first_matrix += size
        self._arriving: Exchange | None = None
        self._returning: Exchange | None = None

    def _numbers(self, p: Tensor, rank: int) -> list[range]:
        cut = cut_of(p)
        assert cut is not None
        return flat_ranges(p.shape, cut.dim, rank, self.num_ranks)

    def _cut_into_buckets(self) -> list[range]:
        return [range(self.num_slots)]

    def is_moved_by_owner(self, group: dict[str, Any]) -> bool:
        return self.needs_master or constrains(group)

    def _exchange(
        self,
        tensors: Sequence[Tensor | None],
        pieces: list[list[Piece]],
        arriving: list[list[Piece]],
        dtype: torch.dtype,
    ) -> Exchange:
        """Send `pieces`, a list for each rank, of tensors of one dimension (None: zeros)."""
        counts, expected = (
            [sum(piece.stop - piece.start for piece in of_rank) for of_rank in each] for each in (pieces, arriving)
        )
        sent = torch.zeros(sum(counts), dtype=dtype, device=self.device)
        flat = [piece for of_rank in pieces for piece in of_rank]
        places = sent.split([piece.stop - piece.start for piece in flat])
        present = [(to, tensors[piece.which], piece) for to, piece in zip(places, flat, strict=True)]
        copied = [(to, value[piece.start : piece.stop]) for to, value, piece in present if value is not None]
        if copied:
            torch._foreach_copy_([to for to, _ in copied], [value for _, value in copied])
        received = sent.new_empty(sum(expected))
        work = dist.all_to_all_single(received, sent, expected, counts, group=self.process_group, async_op=True)
        return Exchange(received, [piece for of_rank in arriving for piece in of_rank], work, sent)

    def _start_to_owners(self, shards: Sequence[Tensor | None], dtype: torch.dtype) -> Exchange:
        flat = [None if shard is None else shard.reshape(-1) for shard in shards]
        return self._exchange(flat, self._to_owner, self._from_rank, dtype)

    def _at_owner(self, exchange: Exchange) -> Tensor:
        """The matrices that this rank owns, float32 or wider [P, m, n]; zeros as padding."""
        dtype = torch.promote_types(exchange.received.dtype, torch.float32)
        own = torch.zeros(self.num_slots, self.m * self.n, dtype=dtype, device=self.device)
        parts = exchange.wait()
        if parts:
            torch._foreach_copy_([own[slot, start:stop] for slot, start, stop in exchange.pieces], parts)
        return own.view(self.num_slots, self.m, self.n)

    # Gradients in

    def start_reduction(self, slots: range) -> None:
        """Send the gradients, means over the ranks already, to their owners."""
        self.refuse_unusable()
        pairs: list[tuple[Any, Any]] = [(p, p.grad) for p in self.params]
        alike = [
            g if g is None or g.placements == p.placements else g.redistribute(placements=p.placements)
            for p, g in pairs
        ]
        self._arriving = self._start_to_owners([local(gradient) for gradient in alike], self.comm_dtype)

    def own_gradients(self) -> Gradients:
        assert self._arriving is not None
        whole = self._at_owner(self._arriving).float()
        self.forget_reduction()
        return Gradients((self.num_slots, self.m, self.n), self.device, whole=whole)

    def forget_reduction(self) -> None:
        self._arriving = None

    # Results out

    def _copied_weights(self, num_slots: int, dtype: torch.dtype) -> Tensor:
        shards = [local(p.detach()) for p in self.params]
        return self._at_owner(self._start_to_owners(shards, dtype))[:num_slots]

    def start_gather(self, own: Tensor, is_exact: bool = False) -> None:
        rows = list(own.flatten(1).unbind(0))
        self._returning = self._exchange(rows, self._from_rank, self._to_owner, self.dtype_sent(own.dtype, is_exact))

    def gathered(self) -> Tensor:
        assert self._returning is not None
        self._returning.wait()
        return self._returning.received

    def active_pairs(self, everything: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(parts of this rank's shards, their results) of all matrices that have a gradient."""
        assert self._returning is not None
        pieces, self._returning = self._returning.pieces, None
        flat = [local(p.detach()).view(-1) if p.grad is not None else None for p in self.params]
        parts = everything.split([piece.stop - piece.start for piece in pieces])
        pairs = [
            (weight[start:stop], part)
            for (index, start, stop), part in zip(pieces, parts, strict=True)
            if (weight := flat[index]) is not None
        ]
        return [weight for weight, _ in pairs], [part for _, part in pairs]

    # State, whole and in parts

    def _gather_state(self, own: Tensor) -> Tensor:
        """In main memory, and by way of the GPU a slot at a time: there may be no room for the whole of it."""
        if self.num_ranks == 1:
            return own
        whole = own.new_empty(self.num_ranks * len(own), *own.shape[1:], device="cpu")
        for part, slot in zip(whole.split(self.num_ranks), own.split(1), strict=True):
            part.copy_(self._gather_slots(slot))
        return whole[: self.size]

    def _is_master_of_these(self, whole: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        fits = super()._is_master_of_these(whole)
        if self.needs_master:  # for shards of other ranks, too
            misses = torch.tensor(float(not fits), device=self.device)
            dist.all_reduce(misses, group=self.process_group)
            fits = not misses
        return fits

    def _rounds_to(self, master: Tensor, p: Tensor) -> bool:
        numbers, here = master.reshape(-1), local(p.detach()).view(-1)
        parts = [numbers[held.start : held.stop] for held in self._numbers(p, self.rank)]
        return torch.equal(torch.cat([numbers[:0], *parts]).to(p.device, p.dtype), here)
