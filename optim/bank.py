"""Banks: matrices of one shape as one batch, each with an owner among the ranks.

A bank of B matrices on R ranks is padded with zeros to P R, P = ceil(B / R). Matrix i lies in slot i // R of rank
i % R, so that neighbours in the model have different owners and a slot is complete as soon as backward has passed R
of them. For each matrix its owner receives the mean gradient (reduce-scatter), keeps the state, computes the update
and gives the result to all (all-gather):

    gradients of all matrices, on every rank --reduce-scatter--> gradients [P, m, n] of the rank's own
    state [P, ...], update rule              ------------------> direction [P, m, n]
    direction                                --all-gather------> [P R, m, n], applied to every rank's weights

A rank sends and receives m n P (R - 1) numbers twice a step, as much as averaging the gradients everywhere where R
divides B. Since all ranks apply the same bits, their weights stay identical.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from optim.gradients import Gradients, copy_matrices

BUCKET_BYTES = 25 * 2**20  # of gradients in one reduce-scatter: large enough for bandwidth, small enough to overlap

# torch 2.13 has new names for them and warns at the old ones, which are all that some earlier versions have.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

State = dict[str, Tensor]


class Placeholder(Tensor):
    """The shape of a tensor that the ranks hold in parts, on the device meta. Moving it does nothing: at the end of
    training Lightning moves whatever an optimizer's state shows to the host."""

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self


def layout(tensor: Tensor, row_blocks: int, flatten: bool | None) -> tuple[tuple[int, ...], int, int]:
    """(leading sizes, rows, columns) of the matrices in a tensor [..., m, n], or with `flatten` [m, ...], each cut into
    `row_blocks` blocks of m / row_blocks rows."""
    dim = 0 if flatten else tensor.ndim - 2
    blocks = (row_blocks,) if row_blocks > 1 else ()
    return (*tensor.shape[:dim], *blocks), tensor.size(dim) // row_blocks, math.prod(tensor.shape[dim + 1 :])


def matrices(tensor: Tensor, row_blocks: int, flatten: bool | None = None) -> list[Tensor]:
    """The matrices of a tensor (see `layout`) as views. Flattened ones keep their dimensions, [m, ...]: in some orders
    of memory they have no view of two."""
    dim = 0 if flatten else tensor.ndim - 2
    views = [tensor.unflatten(dim, (row_blocks, -1)) if row_blocks > 1 else tensor]
    for _ in range(dim + (row_blocks > 1)):
        views = [part for view in views for part in view.unbind(0)]
    return views


def by_matrix(flags: Tensor, value: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to go with `value` [B, ...]."""
    return flags.view(-1, *[1] * (value.ndim - 1))


class Bank:
    """Same-shape matrices of one param group; leading dimensions (none with `flatten`) and row blocks of a parameter
    are batch.

    `state` holds this rank's slots: tensors [P, ...], zeros in slots that are padding or not yet used.
    """

    is_sharded = False  # whether a rank has shards of the parameters, whose gradients are means over the ranks already

    def __init__(
        self,
        params: list[Tensor],
        names: list[str],
        row_blocks: int = 1,
        comm_dtype: torch.dtype = torch.float32,
        process_group: dist.ProcessGroup | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        flatten: bool | None = None,
    ) -> None:
        self.params, self.names, self.row_blocks, self.flatten = params, names, row_blocks, flatten
        self.comm_dtype, self.process_group = comm_dtype, process_group
        self.rank, self.num_ranks = rank, num_ranks
        _, self.m, self.n = layout(params[0], row_blocks, flatten)
        self.dtype, self.device = params[0].dtype, params[0].device
        self.sizes = [p.numel() // (self.m * self.n) for p in params]  # matrices in each parameter
        self.param_of = [i for i, size in enumerate(self.sizes) for _ in range(size)]  # of each matrix
        self.size = len(self.param_of)
        self.num_slots = math.ceil(self.size / num_ranks)
        self.state: State = {}
        self.has_moved = False  # whether masters hold more than the weights: a step has moved them, or they were loaded
        self.buckets = self._cut_into_buckets()
        self._sent: list[tuple[Tensor, dist.Work]] = []  # what exchanges under way read from
        self._received: Tensor | None = None
        self._gathered: tuple[Tensor, dist.Work | None] | None = None
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def _cut_into_buckets(self) -> list[range]:
        """Slots by bucket, the last first: the order in which backward completes them."""
        if self.num_ranks == 1:
            return [range(self.num_slots)]
        slot_bytes = self.num_ranks * self.m * self.n * self.comm_dtype.itemsize
        length = max(1, BUCKET_BYTES // slot_bytes)
        return [range(start, min(start + length, self.num_slots)) for start in range(0, self.num_slots, length)][::-1]

    @property
    def needs_master(self) -> bool:
        """Whether weights are so short that small updates would round away: they follow a float32 master then."""
        return self.dtype.itemsize < 4

    def is_moved_by_owner(self, group: dict[str, Any]) -> bool:
        """Whether a matrix's owner makes its new weights, and gives away these in place of the update."""
        return self.needs_master

    def rows(self, tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
        """One tensor (or None) for each parameter -> one view for each matrix of the bank, [m, n] or [m, ...]."""
        result: list[Tensor | None] = []
        for tensor, size in zip(tensors, self.sizes, strict=True):
            result += [None] * size if tensor is None else matrices(tensor, self.row_blocks, self.flatten)
        return result

    # Gradients in

    @torch.no_grad()  # a hook of backward calls it, and gradients may have gradients
    def start_reduction(self, slots: range) -> None:
        """Send the gradients of some slots to their owners; a missing gradient is sent as zeros. With one rank they
        stay where they are."""
        self.refuse_unusable()
        if self.num_ranks == 1:
            return
        if self._received is None:
            self._received = torch.empty(self.num_slots, self.m, self.n, dtype=self.comm_dtype, device=self.device)
        received = self._received[slots.start : slots.stop]
        sent = received.new_empty(self.num_ranks, len(slots), self.m, self.n)
        gradients = self.rows(p.grad for p in self.params)[slots.start * self.num_ranks : slots.stop * self.num_ranks]
        gradients += [None] * (self.num_ranks * len(slots) - len(gradients))
        of_ranks = [of_rank.unbind(0) for of_rank in sent.unbind(0)]
        copy_matrices([of_ranks[i % self.num_ranks][i // self.num_ranks] for i in range(len(gradients))], gradients)
        work = _reduce_scatter(
            received, sent.flatten(0, 1), op=dist.ReduceOp.AVG, group=self.process_group, async_op=True
        )
        self._sent.append((sent, work))

    def refuse_unusable(self) -> None:
        """ValueError for parameters without memory and for a gradient that is not an ordinary tensor."""
        if self.device.type == "meta":
            raise ValueError(f"{self.names[0]} is on the device meta; make the optimizer when the model has memory")
        for name, p in zip(self.names, self.params, strict=True):
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(f"the gradient of {name} is sparse; a matrix optimizer needs it dense (sparse=False)")

    def own_gradients(self) -> Gradients:
        """Wait for the reductions; the mean gradients of this rank's slots, the caller's to keep."""
        shape = (self.num_slots, self.m, self.n)
        if self.num_ranks == 1:
            return Gradients(shape, self.device, self.rows(p.grad for p in self.params))
        for _, work in self._sent:
            work.wait()
        whole = self._received
        self.forget_reduction()
        assert whole is not None
        return Gradients(shape, self.device, whole=whole.float())

    def forget_reduction(self) -> None:
        """Nothing of a step that failed is left over for the next."""
        self._received = None
        self._sent.clear()

    def params_by_owner(self) -> list[int | None]:
        """Index of each matrix's parameter, by owner and slot; None for padding."""
        indices = [*self.param_of, *[None] * (self.num_ranks * self.num_slots - self.size)]
        return [index for owner in range(self.num_ranks) for index in indices[owner :: self.num_ranks]]

    def active_slots(self) -> list[int]:
        """The own slots whose matrices have a gradient."""
        own = self.param_of[self.rank :: self.num_ranks]
        return [slot for slot, index in enumerate(own) if self.params[index].grad is not None]

    @property
    def num_own(self) -> int:
        """Slots that are worth computing: the matrices this rank owns, or one of padding, so that state and results of
        a rank without any are like the others'."""
        return max(1, len(range(self.rank, self.size, self.num_ranks)))

    def mask(self, slots: list[int]) -> Tensor | None:
        """Bool [num_own], true in `slots`; None if it is true everywhere. Kept: a copy from the host at each step would
        make a GPU wait."""
        if len(slots) == self.num_own:
            return None
        key = tuple(slots)
        if key not in self._masks:
            self._masks[key] = torch.tensor([slot in slots for slot in range(self.num_own)], device=self.device)
        return self._masks[key]

    # Results out

    def own_weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A copy of the weights (masters, if there are) of the matrices this rank owns, [num_own, m, n]."""
        if self.needs_master:
            return self.own_masters()[: self.num_own].clone()
        return self._copied_weights(self.num_own, dtype)

    def own_masters(self) -> Tensor:
        """The float32 master copy of this rank's weights [P, m, n], made from them until a step moves them: torch's
        get_optimizer_state_dict makes state by a step at rate 0, after which weights may be loaded."""
        if not self.has_moved:
            weights = self._copied_weights(self.num_slots, torch.float32)
            self.state.setdefault("master_weight", weights).copy_(weights)
        return self.state["master_weight"]

    def _copied_weights(self, num_slots: int, dtype: torch.dtype) -> Tensor:
        copy = torch.zeros(num_slots, self.m, self.n, dtype=dtype, device=self.device)
        for slot, weight in enumerate(self.rows(self.params)[self.rank :: self.num_ranks]):
            assert weight is not None
            copy[slot].view(weight.shape).copy_(weight)
        return copy

    def dtype_sent(self, dtype: torch.dtype, is_exact: bool) -> torch.dtype:
        """In what results travel: halves as they are, longer ones in `comm_dtype` unless every bit counts."""
        return dtype if is_exact or dtype.itemsize < 4 else self.comm_dtype

    def start_gather(self, own: Tensor, is_exact: bool = False) -> None:
        """Give this rank's results [num_own, m, n] to all; new weights have to come out exact."""
        if self.num_ranks == 1:
            self._gathered = own, None
            return
        sent = own.new_zeros(self.num_slots, self.m, self.n, dtype=self.dtype_sent(own.dtype, is_exact))
        sent[: len(own)] = own
        everything = sent.new_empty(self.num_ranks * self.num_slots, self.m, self.n)
        work = _all_gather(everything, sent, group=self.process_group, async_op=True)
        self._sent.append((sent, work))
        self._gathered = everything, work

    def gathered(self) -> Tensor:
        """Wait for the results of all ranks: [R P, m, n], matrix i at (i % R) P + i // R."""
        assert self._gathered is not None
        everything, work = self._gathered
        if work is not None:
            work.wait()
        self._sent.clear()
        self._gathered = None
        return everything

    def active_pairs(self, everything: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(weights, their results in the same shape) of all matrices that have a gradient."""
        results, (places, weights) = everything.unbind(0), self.active_weights()
        return weights, [results[place].view(weight.shape) for place, weight in zip(places, weights, strict=True)]

    def active_weights(self) -> tuple[list[int], list[Tensor]]:
        """(places of their results in what `gathered` gives, weights) of all matrices that have a gradient."""
        rows = self.rows(p if p.grad is not None else None for p in self.params)
        active = [(i, weight) for i, weight in enumerate(rows) if weight is not None]
        places = [i % self.num_ranks * self.num_slots + i // self.num_ranks for i, _ in active]
        return places, [weight for _, weight in active]

    # State, whole and in parts

    def whole_state(self) -> Iterator[tuple[Tensor, State]]:
        """(parameter, its state) with leading sizes as in `layout`; every rank has to call this."""
        names = sorted(self.state)
        whole = [self._gather_state(self.state[name]).split(self.sizes) for name in names]
        for i, p in enumerate(self.params):
            lead, _, _ = layout(p, self.row_blocks, self.flatten)
            yield (
                p,
                {name: parts[i].view((*lead, *parts[i].shape[1:])) for name, parts in zip(names, whole, strict=True)},
            )

    def shapes(self) -> Iterator[tuple[Tensor, State]]:
        """As `whole_state`, of placeholders, and for one rank alone to call."""
        for p in self.params:
            lead, _, _ = layout(p, self.row_blocks, self.flatten)
            shapes = {name: (*lead, *value.shape[1:]) for name, value in self.state.items()}
            empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            yield p, {name: tensor.as_subclass(Placeholder) for name, tensor in empty.items()}

    def _gather_state(self, own: Tensor) -> Tensor:
        """[P, ...] of each rank -> [B, ...]; with one rank the state itself, as torch's optimizers give it away."""
        return own if self.num_ranks == 1 else self._gather_slots(own)[: self.size].contiguous()

    def _gather_slots(self, own: Tensor) -> Tensor:
        """Some slots of each rank, [slots, ...] -> [slots R, ...] in the order of the matrices."""
        everything = own.new_empty(self.num_ranks * len(own), *own.shape[1:])
        _all_gather(everything, own.contiguous(), group=self.process_group)
        return everything.unflatten(0, (self.num_ranks, len(own))).transpose(0, 1).flatten(0, 1)

    def take_state(self, whole: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Keep this rank's part of whole per-parameter state; a parameter without any starts from zeros."""
        for name in dict.fromkeys(name for p in self.params for name in whole.get(p, {})):
            if name == "master_weight" and not self._is_master_of_these(whole):
                continue
            values: list[Tensor | None] = []  # of each matrix
            for p, size in zip(self.params, self.sizes, strict=True):
                if name in whole.get(p, {}):
                    lead = len(layout(p, self.row_blocks, self.flatten)[0])
                    values += whole[p][name].reshape(size, *whole[p][name].shape[lead:]).unbind(0)
                else:
                    values += [None] * size
            rest = next(value.shape for value in values if value is not None)
            own = torch.zeros(self.num_slots, *rest, dtype=torch.float32, device=self.device)
            for slot, value in enumerate(values[self.rank :: self.num_ranks]):
                if value is not None:
                    own[slot].copy_(value)
            self.state[name] = own
            self.has_moved |= name == "master_weight"

    def _is_master_of_these(self, whole: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Whether the master weights in `whole` round to the weights there are: others were put in their place since,
        or the format has changed."""
        pairs = [(whole.get(p, {}).get("master_weight"), p) for p in self.params]
        return self.needs_master and all(master is not None and self._rounds_to(master, p) for master, p in pairs)

    def _rounds_to(self, master: Tensor, p: Tensor) -> bool:
        return torch.equal(master.to(p.device, p.dtype).reshape(p.shape), p.detach())
