"""Several optimizers as one, for what takes one alone: Hugging Face's Trainer, a scheduler, Lightning's own loop."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class CombinedOptimizer(torch.optim.Optimizer):
    """The param groups of all `optimizers`, in their order; a step is a step of each, in that order.

    The groups are the very dicts of the optimizers, so that schedulers act on them. A state dict has torch's form, all
    groups and their state in one. Where an optimizer gathers its state from several ranks, all of them have to ask for
    it, as without this class. Put a MatrixOptimizer first: a gradient that is not finite then ends the step before
    anything moved.

    Raises ValueError for no optimizers, for a parameter of two of them, and for a state dict whose groups are others,
    which then changes nothing.
    """

    optimizers: list[torch.optim.Optimizer]

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        # Not torch's __init__, which would make groups and state of its own; this is how unpickling does without it.
        self.__setstate__({"optimizers": list(optimizers), "defaults": {}})
        if not self.optimizers:
            raise ValueError(
                "CombinedOptimizer: there are no optimizers; give a list such as [Aurora(...), AdamW(...)]"
            )
        seen = set[Tensor]()
        for optimizer in self.optimizers:
            own = {p for group in optimizer.param_groups for p in group["params"]}
            if seen & own:
                shape = tuple(next(iter(seen & own)).shape)
                name = type(optimizer).__name__
                raise ValueError(
                    f"CombinedOptimizer: {name} has a parameter {shape} of another; give each to one alone"
                )
            seen |= own

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # an attribute in torch
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """To be read: {parameter: what its optimizer keeps for it}."""
        return defaultdict(dict, {p: kept for optimizer in self.optimizers for p, kept in optimizer.state.items()})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise ValueError(
            "CombinedOptimizer: it cannot know whose the new group is; add it to one of .optimizers, such as "
            ".optimizers[0].add_param_group(...)"
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state, groups, start = dict[int, Any](), list[dict[str, Any]](), 0
        for optimizer in self.optimizers:
            own = optimizer.state_dict()
            state |= {start + i: kept for i, kept in own["state"].items()}
            groups += [{**group, "params": [start + i for i in group["params"]]} for group in own["param_groups"]]
            start += sum(len(group["params"]) for group in own["param_groups"])
        result: dict[str, Any] = {"state": state, "param_groups": groups}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, result)
            result = result if changed is None else changed
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        saved, own = (
            [len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], self.param_groups)
        )
        if saved != own:
            raise ValueError(
                f"CombinedOptimizer: the state dict has groups of {saved} parameters, the optimizers of {own}; combine "
                "the same optimizers, in the same order, as when it was saved"
            )
        groups = iter(state_dict["param_groups"])
        for optimizer in self.optimizers:
            part = list(itertools.islice(groups, len(optimizer.param_groups)))
            ids = {i for group in part for i in group["params"]}
            state = {i: kept for i, kept in state_dict["state"].items() if i in ids}
            optimizer.load_state_dict({**state_dict, "state": state, "param_groups": part})
        for later in self._optimizer_load_state_dict_post_hooks.values():
            later(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers, "defaults": self.defaults}
