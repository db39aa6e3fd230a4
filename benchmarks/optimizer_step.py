"""Time of a whole optimizer step: every rule for the hidden matrices, beside AdamW and torch.optim.Muon.

    python -m benchmarks.optimizer_step configs/classics_124m_aurora.toml
    python -m benchmarks.optimizer_step --graphs=true --rules muon "aurora release"     on a GPU, as CUDA graphs, too

Gradients are Gaussian. `matrices_ms` is the step of the hidden matrices alone; embeddings, head and scalars take the
same AdamW step beside every rule, `step_ms` is both. `share_%` is the step's part of a training step with the recipe's
batch: forward and backward are timed on one micro-batch of `tokens` tokens and scaled to the batch. Rules take turns,
so that a slow moment of a shared machine falls on all alike; a rule whose update is not finite is refused.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import optim
from architectures import class_of
from benchmarks.polar_speed import graphed
from data.files import user_path
from harness.machine import find_machine
from harness.results import command, report
from harness.step_timer import median_seconds
from harness.tables import Row
from model import GPT
from optim import build_optimizers
from optim.bank import matrices
from train_gpt import Config, load_config

SLOW = ("riemannian_aurora", "soap", "soap_muon")  # of the 124M model: minutes for a step on a CPU
RULES: dict[str, list[str]] = {
    "adamw": ["--matrix_optimizer=adamw"],
    "torch.optim.Muon": [],
    **{rule: [f"--matrix_optimizer={rule}"] for rule in optim.RULES if rule not in ("aurora", *SLOW)},
    "muon hyperball": ["--matrix_optimizer=muon", "--hyperball=true"],
    "muon floor by row": ["--matrix_optimizer=muon", "--update_floor=0.35", "--floor_by_row=true"],
    "aurora warm": ["--matrix_optimizer=aurora", "--aurora_variant=warm"],
    "aurora release": ["--matrix_optimizer=aurora"],
    "aurora paper": ["--matrix_optimizer=aurora", "--aurora_variant=paper"],
    **{rule: [f"--matrix_optimizer={rule}"] for rule in SLOW},
}
DEFAULT_RULES = tuple(RULES)[: -len(SLOW)]


@dataclass(frozen=True)
class Args:
    recipe: str = "configs/classics_124m_aurora.toml"  # model, batch and learning rates
    rules: tuple[str, ...] = DEFAULT_RULES  # to time, of those in RULES; the ratios refer to "adamw" and "muon"
    rounds: int = 5  # turns of each rule; the table has medians over them
    tokens: int = 1024  # tokens of the micro-batch that forward and backward are timed on
    graphs: bool = False  # also each rule's step of the matrices as a CUDA graph: graph_ms
    device: str = "auto"  # auto, cuda or cpu


def torch_muon(model: GPT, config: Config) -> torch.optim.Optimizer:
    """torch.optim.Muon over copies of the hidden matrices, one by one: it takes no stacks."""
    weights = [
        nn.Parameter(w.detach().clone()) for p in model.blocks.parameters() if p.ndim > 1 for w in matrices(p, 1)
    ]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return torch.optim.Muon(weights, lr=config.matrix_lr, momentum=config.momentum)


def main(args: Args) -> None:
    device = find_machine(args.device, "auto").device
    if args.graphs and not torch.cuda.is_available():
        raise ValueError("graphs = true needs a GPU; leave it out")
    arguments = [str(user_path(args.recipe)), f"--device={device.type}"]
    arguments += ["--init_out=0.02", "--init_down=0.02", "--matrix_weight_decay=0"]  # for the rules that keep norms
    config = load_config(arguments)
    torch.manual_seed(0)
    with device:
        model = class_of(config)(config, find_machine(args.device, config.dtype).dtype)
    tokens = torch.randint(config.vocab_size, (max(1, args.tokens // config.seq_len), config.seq_len), device=device)

    def forward_backward() -> None:
        (model(tokens, tokens) / tokens.numel()).backward()

    work: dict[str, Callable[[], object]] = {"forward and backward": forward_backward}
    forward_backward()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for rule in args.rules:
        if rule == "torch.optim.Muon":
            work[rule] = torch_muon(model, config).step
            continue
        matrix_optimizer, rest = build_optimizers(model, load_config([*arguments, *RULES[rule]]))
        matrix_optimizer.step()
        if not all(p.isfinite().all() for p in model.blocks.parameters()):
            raise ValueError(f"{rule}: the update is not finite; there is nothing to time")
        work[rule], work["the rest, by AdamW"] = matrix_optimizer.step, rest.step
        if args.graphs and isinstance(matrix_optimizer, optim.MatrixOptimizer):
            for group in matrix_optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], device=device)
            work[f"{rule}, graph"] = graphed(matrix_optimizer.step)
    medians = median_seconds(work, args.rounds, warmups=1, device=device)  # state and caches are made in the first turn
    seconds = {name: time.wall for name, time in medians.items()}
    rest_s, pass_s = seconds.pop("the rest, by AdamW"), seconds.pop("forward and backward")
    batch_s = pass_s * config.batch_tokens / tokens.numel()
    rows: list[Row] = []
    for rule in args.rules:
        step_s = seconds[rule] + rest_s
        row: Row = {"rule": rule, "matrices_ms": 1e3 * seconds[rule], "step_ms": 1e3 * step_s}
        if args.graphs:
            row["graph_ms"] = 1e3 * seconds[f"{rule}, graph"] if f"{rule}, graph" in seconds else ""
        for baseline in ("muon", "torch.optim.Muon"):
            row[f"matrices_over_{baseline}"] = seconds[rule] / seconds[baseline] if baseline in seconds else ""
        row["step_over_adamw"] = step_s / (seconds["adamw"] + rest_s) if "adamw" in seconds else ""
        rows.append(row | {"share_%": 100 * step_s / (step_s + batch_s)})
    settings = {key: value for key, value in dataclasses.asdict(args).items() if key != "device"}
    settings |= dict(forward_backward_ms=1e3 * pass_s, pass_tokens=tokens.numel(), batch_tokens=config.batch_tokens)
    report("optimizer_graphs" if args.graphs else "optimizer_step", rows, str(device), **settings)


if __name__ == "__main__":
    command(main, Args, __doc__)
