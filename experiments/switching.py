"""A rule that is Muon for part of a run and Aurora for the rest, for experiments/neurons.py: what does equal leverage
change, and does it matter when?

    python train_gpt.py configs/sotu_base.toml --matrix_optimizer=experiments.switching:Switching --switching_after=300
"""

from typing import Any, ClassVar

from torch import Tensor

from optim import Aurora, Option
from optim.bank import State


class Switching(Aurora):
    """Muon's updates, then Aurora's, or the reverse; momentum goes on through the switch."""

    options: ClassVar = {
        "first": Option("muon", "muon or aurora; the other one follows", choices=("muon", "aurora")),
        "after": Option(0, "steps with the first one", (">= 0",)),
    }

    def orthogonalize(self, update: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        if "num_steps" not in state:
            state["num_steps"] = update.new_zeros(update.size(0))
        state["num_steps"] += 1
        # a tensor without memory is there to learn what is kept, which is what Aurora keeps
        is_aurora = update.is_meta or (group["first"] == "aurora") == bool((state["num_steps"] <= group["after"]).all())
        return super().orthogonalize(update, state, group) if is_aurora else self.polar(update, group)
