"""Print where every parameter of a recipe goes: its optimizer, its bank, the ranks that own it, the state it costs.

    python -m benchmarks.optimizer_plan configs/fineweb_124m_aurora.toml --ranks=8 [--fsdp] [--key=value ...]

Nothing is allocated: state is counted as in harness/memory_plan.py, whose memory by part `--dry_run` prints. A bank is
all matrices of one shape; a parameter that is a stack of matrices has an owner for each. Parameters outside banks are
kept whole by every rank, or with fsdp in shards like all weights and gradients; the bytes are then those of the first
rank, which has the longest shards.
"""

import itertools
import sys
from dataclasses import dataclass
from typing import Annotated

import torch

from architectures import class_of
from data import console
from harness import memory_plan
from harness.memory_plan import share
from harness.settings import parse_settings
from harness.tables import align
from optim import MatrixOptimizer, build_optimizers
from train_gpt import load_config


@dataclass(frozen=True)
class Args:
    ranks: Annotated[int, ">= 1"] = 1


def routing(optimizers: list[torch.optim.Optimizer], ranks: int) -> list[list[str]]:
    """A line of cells for each parameter."""
    lines = []
    for optimizer in optimizers:
        rule = type(optimizer).__name__
        if isinstance(optimizer, MatrixOptimizer):
            for number, (bank, group) in enumerate(optimizer.plan_banks(0, ranks)):
                each = sum(memory_plan.state_of_matrix(optimizer, bank, group))
                name = f"{number}: {bank.size} of {bank.m}x{bank.n}, {bank.num_slots} per rank"
                owners = (str(matrix % ranks) for matrix in itertools.count())
                for param, p, size in zip(bank.names, bank.params, bank.sizes, strict=True):
                    own = ",".join(itertools.islice(owners, size))
                    lines.append([param, "x".join(map(str, p.shape)), rule, name, own, f"{each * size:,}"])
            continue
        state = memory_plan.replicated_state_bytes(optimizer)
        for group in optimizer.param_groups:
            for param, p in zip(group["param_names"], group["params"], strict=True):
                lines.append([param, "x".join(map(str, p.shape)), rule, "-", "all", f"{state[p]:,}"])
    return lines


def main(argv: list[str]) -> int:
    return console.run(lambda: _main(argv), "the same command starts again")


def _main(argv: list[str]) -> None:
    own = [word for word in argv if word.startswith("--ranks=")]
    ranks = parse_settings(Args, own).ranks
    config = load_config([word for word in argv if word not in own])
    with torch.device("meta"):
        model = class_of(config)(config)
    optimizers = build_optimizers(model, config)
    print(align([["parameter", "shape", "optimizer", "bank", "owner", "state bytes"], *routing(optimizers, ranks)]))
    weights = sum(p.nbytes * share(p, ranks, config.fsdp) for p in model.parameters())
    state = sum(memory_plan.state_bytes(optimizers, ranks, config.fsdp).values())
    print(f"{model.num_params():,} parameters, {weights / 2**20:,.1f} MiB on every rank; gradients as much again")
    print(f"optimizer state: {state / 2**20:,.1f} MiB on each of {ranks} ranks")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
