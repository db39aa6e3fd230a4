"""Print where every parameter of a recipe goes: its optimizer, its bank, the ranks that own it, the state it costs.

    python -m benchmarks.optimizer_plan configs/fineweb_124m_aurora.toml --ranks=8 [--fsdp] [--key=value ...]

Nothing is allocated: the model is built without memory, and state is counted from what the update rules make of
tensors without memory. A bank is all matrices of one shape; a parameter that is a stack of matrices has an owner for
each. Parameters outside banks are kept whole by every rank, or with fsdp in shards like all weights and gradients; the
bytes are then those of the first rank, which has the longest shards.
"""

import itertools
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from data import console
from harness.fsdp import cut_dim
from harness.settings import parse_settings
from harness.tables import align
from model import GPT
from optim import MatrixOptimizer, build_optimizers
from optim.shards import flat_ranges
from train_gpt import load_config


@dataclass(frozen=True)
class Args:
    ranks: Annotated[int, ">= 1"] = 1


def nbytes(tensors: Any) -> int:
    return sum(value.nbytes for value in tensors if isinstance(value, Tensor))


def replicated_state_bytes(optimizer: torch.optim.Optimizer) -> dict[Tensor, int]:
    """Bytes of state of each parameter, from a step without memory."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p)
    optimizer.step()
    return {p: nbytes(state.values()) for p, state in optimizer.state.items()}


def share(p: Tensor, ranks: int, fsdp: bool) -> float:
    """The part of a parameter that one rank keeps."""
    return sum(map(len, flat_ranges(p.shape, cut_dim(p, ranks), 0, ranks))) / p.numel() if fsdp else 1.0


def routing(optimizers: list[torch.optim.Optimizer], ranks: int, fsdp: bool = False) -> tuple[list[list[str]], float]:
    """(a line of cells for each parameter, bytes of state on one rank)."""
    lines, per_rank = [], 0.0
    for optimizer in optimizers:
        rule = type(optimizer).__name__
        if isinstance(optimizer, MatrixOptimizer):
            for number, (bank, group) in enumerate(optimizer.plan_banks(0, ranks)):
                each = torch.float32.itemsize * bank.m * bank.n * (2 if bank.needs_master else 1)  # momentum, master
                each += nbytes(optimizer.rule_state(bank.m, bank.n, group).values())
                per_rank += each * bank.num_slots
                name = f"{number}: {bank.size} of {bank.m}x{bank.n}, {bank.num_slots} per rank"
                owners = (str(matrix % ranks) for matrix in itertools.count())
                for param, p, size in zip(bank.names, bank.params, bank.sizes, strict=True):
                    own = ",".join(itertools.islice(owners, size))
                    lines.append([param, "x".join(map(str, p.shape)), rule, name, own, f"{each * size:,}"])
            continue
        state = replicated_state_bytes(optimizer)
        for group in optimizer.param_groups:
            for param, p in zip(group["param_names"], group["params"], strict=True):
                lines.append([param, "x".join(map(str, p.shape)), rule, "-", "all", f"{state[p]:,}"])
                per_rank += state[p] * share(p, ranks, fsdp)
    return lines, per_rank


def main(argv: list[str]) -> int:
    return console.run(lambda: _main(argv), "the same command starts again")


def _main(argv: list[str]) -> None:
    own = [word for word in argv if word.startswith("--ranks=")]
    ranks = parse_settings(Args, own).ranks
    config = load_config([word for word in argv if word not in own])
    with torch.device("meta"):
        model = GPT(config)
    optimizers = build_optimizers(model, config)
    lines, per_rank = routing(optimizers, ranks, config.fsdp)
    print(align([["parameter", "shape", "optimizer", "bank", "owner", "state bytes"], *lines]))
    weights = sum(p.nbytes * share(p, ranks, config.fsdp) for p in model.parameters())
    print(f"{model.num_params():,} parameters, {weights / 2**20:,.1f} MiB on every rank; gradients as much again")
    print(f"optimizer state: {per_rank / 2**20:,.1f} MiB on each of {ranks} ranks")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
