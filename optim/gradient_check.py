"""Gradients that are not finite, or not there on every rank, found by all ranks together before anything moves."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from optim.bank import Bank
from optim.gradients import Gradients


class GradientCheck:
    """Checks the owners' mean gradients of all banks, with one answer on every rank.

    At once it raises, which makes a GPU wait; deferred it returns a tensor to mask the step with and keeps count.
    """

    def __init__(self, banks: Sequence[Bank]) -> None:
        self.banks = banks
        # By kind of fault and matrix: how often there was one. In one place, to which a captured step adds, too
        self._deferred: Tensor | None = None
        self._present: dict[tuple[bool, ...], Tensor] = {}  # kept: a copy from the host would make a GPU wait

    @property
    def has_counted(self) -> bool:
        """Whether a deferred check has been made."""
        return self._deferred is not None

    def check(self, gradients: list[Gradients], is_deferred: bool, kernels: str) -> Tensor | None:
        """From the gradients of this rank's matrices, for each bank: None, or if deferred whether all is well on all
        ranks, a bool scalar. Raises FloatingPointError for NaN or infinity, ValueError for a parameter with a gradient
        on some ranks alone."""
        if not self.banks:
            return None
        num_ranks, device = self.banks[0].num_ranks, gradients[0].device
        lengths = [num_ranks * bank.num_slots for bank in self.banks]
        # By bank, owner and slot: the ranks where it is bad, and those where it is present
        faults = torch.zeros(2, sum(lengths), dtype=torch.float32, device=device)
        for bank, own, part in zip(self.banks, gradients, faults[0].split(lengths), strict=True):
            _mark(own, part.view(num_ranks, -1)[bank.rank], is_deferred, kernels)
        if num_ranks > 1:
            owned = [(bank, i) for bank in self.banks for i in bank.params_by_owner()]
            pattern = tuple(i is not None and bank.params[i].grad is not None for bank, i in owned)
            if pattern not in self._present:
                self._present[pattern] = torch.tensor(pattern, dtype=torch.float32, device=device)
            faults[1] = self._present[pattern]
            dist.all_reduce(faults, group=self.banks[0].process_group)
            faults[1] = (faults[1] > 0) & (faults[1] < num_ranks)
        if not is_deferred:
            self._raise_for(faults, "nothing was updated")
            return None
        if self._deferred is None:
            self._deferred = torch.zeros_like(faults)
        self._deferred += faults
        return faults.sum() == 0

    def raise_if_any(self) -> None:
        """Deferred: what `check` would have raised since the last call. Waits for the device."""
        if self._deferred is not None:
            faults = self._deferred.clone()
            self._deferred.zero_()
            self._raise_for(faults, "the step it came in changed nothing")

    def _raise_for(self, faults: Tensor, consequence: str) -> None:
        if not faults.any():
            return
        bad, partly = faults
        if partly.any():
            raise ValueError(
                f"{self._name_of(partly)} has a gradient on some ranks and none on others; {consequence}. Every rank "
                "has to use it (add 0 times its sum to the loss where it is not used)"
            )
        raise FloatingPointError(
            f"the gradient of {self._name_of(bad)} holds NaN or infinity; {consequence}. Lower the learning rate, or "
            "skip the step with zero_grad() if one bad batch is expected"
        )

    def _name_of(self, rows: Tensor) -> str:
        """The parameter that the first marked matrix belongs to."""
        owned = [(bank, i) for bank in self.banks for i in bank.params_by_owner()]
        bank, i = owned[int(rows.nonzero()[0])]
        assert i is not None  # padding holds zeros
        return bank.names[i]


def _mark(gradients: Gradients, flags: Tensor, is_deferred: bool, kernels: str) -> None:
    """Make `flags` [P], zeros, 1 for the matrices that hold NaN or infinity."""
    matrices = gradients.readable(kernels)
    if not isinstance(matrices, Tensor):
        from kernels.not_finite import mark_not_finite

        mark_not_finite(matrices, flags)
    # A sum is the quickest check, and is finite only if all of it is
    elif is_deferred or not matrices.sum(dim=(-2, -1)).isfinite().all():
        flags.copy_(torch.linalg.vector_norm(matrices, torch.inf, dim=(-2, -1)).isfinite().logical_not_())
