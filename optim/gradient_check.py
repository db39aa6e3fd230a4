"""Gradients that are not finite, or not there on every rank, found by all ranks together before anything moves."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from optim.bank import Bank


class GradientCheck:
    """Looks at the owners' mean gradients of all banks and tells every rank the same.

    At once it raises, which makes a GPU wait; deferred it returns a tensor to mask the step with and keeps count.
    """

    def __init__(self, banks: Sequence[Bank], is_deferred: bool) -> None:
        self.banks, self.is_deferred = banks, is_deferred
        self._bad_rows: Tensor | None = None  # deferred: how often each matrix's gradient was not finite

    def look(self, gradients: list[Tensor]) -> Tensor | None:
        """From the gradients [P, m, n] of this rank's matrices, one for each bank: None, or if deferred whether all
        ranks' are finite, a bool scalar. Raises FloatingPointError for NaN or infinity, ValueError for a parameter
        with a gradient on some ranks alone."""
        num_ranks, group = self.banks[0].num_ranks, self.banks[0].process_group
        lengths = [num_ranks * bank.num_slots for bank in self.banks]
        bad = torch.zeros(sum(lengths), device=gradients[0].device)  # by bank, owner and slot: ranks where it is so
        for bank, gradient, part in zip(self.banks, gradients, bad.split(lengths), strict=True):
            part.view(num_ranks, -1)[bank.rank] = self._not_finite(gradient)
        if self.is_deferred:
            if num_ranks > 1:
                dist.all_reduce(bad, group=group)
            self._bad_rows = bad if self._bad_rows is None else self._bad_rows + bad
            return bad.sum() == 0
        if num_ranks > 1:
            present = torch.tensor([float(has) for bank in self.banks for has in bank.has_gradient()])
            both = torch.stack((bad, present.to(bad.device)))
            dist.all_reduce(both, group=group)
            bad, present = both
            partly = (present > 0) & (present < num_ranks)
            if partly.any():
                raise ValueError(
                    f"{self._name_of(partly)} has a gradient on some ranks and none on others; every rank has to use "
                    "it (add 0 times its sum to the loss where it is not used)"
                )
        self._raise_for(bad, "nothing was updated")
        return None

    def raise_if_any(self) -> None:
        """Deferred: FloatingPointError if a gradient since the last call was not finite. Waits for the device."""
        bad_rows, self._bad_rows = self._bad_rows, None
        if bad_rows is not None:
            self._raise_for(bad_rows, "the step it came in changed nothing")

    def _not_finite(self, gradient: Tensor) -> Tensor:
        """Which matrices of [P, m, n] hold NaN or infinity, bool [P]."""
        if not self.is_deferred:  # a sum is the quickest look, and is finite only if all of it is
            rows = gradient.sum(dim=(-2, -1)).isfinite().logical_not_()
            if not rows.any():
                return rows
        return torch.linalg.vector_norm(gradient, torch.inf, dim=(-2, -1)).isfinite().logical_not_()

    def _raise_for(self, bad_rows: Tensor, consequence: str) -> None:
        if bad_rows.any():
            raise FloatingPointError(
                f"the gradient of {self._name_of(bad_rows)} holds NaN or infinity; {consequence}. Lower the learning "
                "rate, or skip the step with zero_grad() if one bad batch is expected"
            )

    def _name_of(self, rows: Tensor) -> str:
        """The parameter that the first marked matrix belongs to."""
        marked = int(rows.nonzero()[0])
        for bank in self.banks:
            if marked < bank.num_ranks * bank.num_slots:
                owner, slot = divmod(marked, bank.num_slots)
                return bank.names[bank.param_of(slot * bank.num_ranks + owner)]
            marked -= bank.num_ranks * bank.num_slots
        raise AssertionError("a mark outside all banks")
