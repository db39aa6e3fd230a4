"""Gradient reductions of many banks in one order, started by the backward pass itself where that is asked for.

Collectives have to start in the same order on every rank. The order is fixed from the banks alone: the buckets that
hold the last parameters first, as backward finishes them. A bucket starts when its gradients are there and all buckets
before it have started; what has not started by the time of the step starts then. (A model compiled as a whole hands
out all its gradients at the end of backward: nothing overlaps with that.)
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

from optim.bank import Bank
from optim.gradients import Gradients


class Reductions:
    def __init__(self, banks: Sequence[Bank], params: Iterable[Tensor]) -> None:
        """`params` are all parameters in the order of the model, which backward visits from the end."""
        self.banks, place = banks, {p: i for i, p in enumerate(params)}
        buckets = []
        for bank in banks:
            for slots in bank.buckets:
                indices = bank.param_of[slots.start * bank.num_ranks : slots.stop * bank.num_ranks]
                buckets.append((bank, slots, {bank.params[i] for i in indices}))
        self._order = sorted(buckets, key=lambda bucket: -min(place[p] for p in bucket[2]))
        self._buckets_of: dict[Tensor, list[int]] = {}
        for i, (_, _, members) in enumerate(self._order):
            for p in members:
                self._buckets_of.setdefault(p, []).append(i)
        self._reset()

    def _reset(self) -> None:
        self._started = 0  # buckets, in order
        self._missing: list[set[Tensor]] = []  # of each bucket, from await_backward to finish
        self._ready: set[Tensor] = set()
        self._is_abandoned = False

    def await_backward(self) -> None:
        """From now on `ready` starts what it completes."""
        self._finish_abandoned(bool(self._missing))
        self._missing = [{p for p in members if p.requires_grad} for _, _, members in self._order]

    def ready(self, p: Tensor) -> None:
        """The gradient of `p` is final. Raises RuntimeError if that was said before."""
        if not self._missing or self._is_abandoned:
            return
        if p in self._ready:
            raise RuntimeError(
                "a gradient was accumulated once more after its reduction had started: call start_reduction() "
                "before the last backward pass of a step alone, and use checkpointing with use_reentrant=False"
            )
        self._ready.add(p)
        for i in self._buckets_of.get(p, ()):
            self._missing[i].discard(p)
        while self._started < len(self._order) and not self._missing[self._started]:
            self._start_next()

    def abandon(self) -> None:
        """The gradients of the step under way were thrown away; what was sent of them must not be used."""
        self._is_abandoned = bool(self._missing)

    def finish(self) -> list[Gradients]:
        """Start what is left, wait for all; the mean gradients of this rank's matrices, for each bank."""
        self._finish_abandoned(self._is_abandoned)
        try:
            for bank in self.banks:
                bank.refuse_unusable()
            while self._started < len(self._order):
                self._start_next()
            gradients = [bank.own_gradients() for bank in self.banks]
        except BaseException:
            for bank in self.banks:
                bank.forget_reduction()
            raise
        finally:
            self._reset()
        return gradients

    def _finish_abandoned(self, is_abandoned: bool) -> None:
        """Complete what other ranks may have started, whatever this one has; nobody uses it."""
        if is_abandoned:
            self._is_abandoned = False
            self.finish()

    def _start_next(self) -> None:
        bank, slots, _ = self._order[self._started]
        bank.start_reduction(slots)
        self._started += 1
