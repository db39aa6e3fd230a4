"""Gradient reductions of many banks in one order, started by the backward pass itself where that is asked for.

Collectives have to start in the same order on every rank. The order is fixed from the banks alone: the buckets that
hold the last parameters first, as backward finishes them. A bucket starts when its gradients are there and all buckets
before it have started; what has not started by the time of the step starts then.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from optim.bank import Bank


class Reductions:
    def __init__(self, banks: Sequence[Bank], params: Iterable[Tensor]) -> None:
        """`params` are all parameters in the order of the model, which backward visits from the end."""
        self.banks, place = banks, {p: i for i, p in enumerate(params)}
        buckets = []
        for bank in banks:
            for slots in bank.buckets:
                rows = range(slots.start * bank.num_ranks, min(slots.stop * bank.num_ranks, bank.size))
                members = {bank.params[bank.param_of(row)] for row in rows}
                buckets.append((bank, slots, {p for p in members if p.requires_grad}))
        self._order = sorted(buckets, key=lambda bucket: -min((place[p] for p in bucket[2]), default=-1))
        self._buckets_of: dict[Tensor, list[int]] = {}
        for i, (_, _, members) in enumerate(self._order):
            for p in members:
                self._buckets_of.setdefault(p, []).append(i)
        self._started = 0
        self._missing: list[set[Tensor]] = []  # of each bucket, while backward is awaited

    def await_backward(self) -> None:
        """From now on `ready` starts what it completes. What an abandoned step had started is dropped."""
        self._drop()
        self._missing = [set(members) for _, _, members in self._order]

    def ready(self, p: Tensor) -> None:
        """The gradient of `p` is final."""
        if not self._missing:
            return
        for i in self._buckets_of.get(p, ()):
            self._missing[i].discard(p)
        while self._started < len(self._order) and not self._missing[self._started]:
            self._start_next()

    def finish(self) -> list[Tensor]:
        """Start what is left, wait for all; this rank's mean gradients [P, m, n] float32, one for each bank."""
        while self._started < len(self._order):
            self._start_next()
        self._started, self._missing = 0, []
        return [bank.own_gradient() for bank in self.banks]

    def _start_next(self) -> None:
        bank, slots, _ = self._order[self._started]
        bank.start_reduction(slots)
        self._started += 1

    def _drop(self) -> None:
        if self._started:
            self.finish()


def when_ready(optimizer: weakref.ref[Any]) -> Callable[[Tensor], None]:
    """A hook that tells an optimizer's reductions, as long as there is one, that a gradient is final."""

    def hook(p: Tensor) -> None:
        alive = optimizer()
        if alive is not None:
            alive._reductions.ready(p)

    return hook
