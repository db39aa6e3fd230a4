"""Mean gradients of the matrices of one bank, copied into one tensor only where somebody needs them so."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor

from kernels import backend

if TYPE_CHECKING:
    from kernels.scattered import Scattered


class Gradients:
    """Of the matrices that this rank owns, [P, m, n] with zeros as padding: one tensor that the ranks have made, or
    what lies in p.grad."""

    def __init__(
        self, shape: tuple[int, int, int], device: torch.device, parts: Sequence[Tensor | None] = (),
        whole: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Either `whole` [P, m, n] in float32, or `parts`, one for each of P matrices, [m, n] or [m, ...]."""
        self.shape, self.device = shape, device
        self._parts, self._whole = parts, whole
        self._where: Scattered | None = None

    @property
    def whole(self) -> Tensor:
        """[P, m, n] float32, zeros for what is missing. From the first use on changes of it count, later ones of p.grad
        do not."""
        if self._whole is None:
            self._whole = torch.empty(self.shape, dtype=torch.float32, device=self.device)
            copy_matrices(self._whole.unbind(0), self._parts)
            self._parts, self._where = (), None
        return self._whole

    def readable(self, kernels: str) -> Union[Tensor, "Scattered"]:
        """What these kernels can read: matrices where they are, or else the whole."""
        if self._whole is None and self._where is None and backend(kernels, self.device).name == "triton":
            from kernels.scattered import scattered

            self._where = scattered(self._parts, self.device)
        return self._where or self.whole

    def first(self, count: int) -> "Gradients":
        """Of the first `count` matrices alone."""
        if count == self.shape[0]:
            return self
        return Gradients((count, *self.shape[1:]), self.device, whole=self.whole[:count])


def copy_matrices(places: Sequence[Tensor], matrices: Sequence[Tensor | None]) -> None:
    """Each matrix to its place, [m, n] for [m, n] or [m, ...]; zeros where there is none."""
    if missing := [place for place, X in zip(places, matrices, strict=True) if X is None]:
        torch._foreach_zero_(missing)
    present = [(place.view(X.shape), X) for place, X in zip(places, matrices, strict=True) if X is not None]
    if present:
        torch._foreach_copy_([place for place, _ in present], [X for _, X in present])
