"""The routing of a model's parameters to optimizers: matrices inside the blocks, embeddings, head, scalars."""

from functools import partial
from typing import Any

import torch
from torch import nn

from kernels import backend
from optim.adagrad import Adagrad
from optim.apply_update import WEIGHT_OPTIONS, check_weight_options
from optim.config import TORCH_OPTIMIZERS, Groups, OptimizerConfig, adamw, find_rule, rule_settings
from optim.matrix_optimizer import MatrixOptimizer
from optim.replicated import replicate
from optim.shards import is_dtensor

TABLES = nn.Embedding, nn.EmbeddingBag
HEADS = "head", "lm_head"
COMM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rule_optimizer(rule: type[MatrixOptimizer], groups: Groups, config: OptimizerConfig) -> MatrixOptimizer:
    """A matrix optimizer as the config says; what it leaves to the rule ("auto", 0) is the rule's own default."""
    options: dict[str, Any] = dict(momentum=config.momentum, scale=config.matrix_scale, cautious=config.cautious)
    for name, option in WEIGHT_OPTIONS.items():
        if getattr(config, name, option.default) != option.default:  # else the rule's own
            options[name] = getattr(config, name)
    if config.polar_method != "auto":
        options["polar_method"] = config.polar_method
    if config.polar_steps:
        options["polar_steps"] = config.polar_steps
    for setting, (name, option) in rule_settings(rule).items():
        options[name] = getattr(config, setting, option.default)
    defaults = {name: option.default for name, option in rule.options.items()}
    for group in groups:  # the rule checks this too, in words of its own options
        check_weight_options(rule.__name__, defaults | options | group, decay="matrix_weight_decay")
    return rule(groups, kernels=config.kernels, comm_dtype=COMM_DTYPES[config.comm_dtype], **options)


def refuse_weight_options(config: OptimizerConfig) -> None:
    """ValueError for a constraint on weights beside an optimizer of torch, which would train without it."""
    for name, option in WEIGHT_OPTIONS.items():
        if (value := getattr(config, name, option.default)) != option.default:
            raise ValueError(
                f"matrix_optimizer = {config.matrix_optimizer!r} is torch's own, which knows no {name} = {value}; set "
                f"{name} = {option.default}, or matrix_optimizer to a rule such as 'muon'"
            )


def head_parameters(module: nn.Module, is_listed: bool = False, is_in_model: bool = False) -> set[nn.Parameter]:
    """The parameters of every child of a model that HEADS names, at whatever depth: torch.compile, nn.Sequential,
    DistributedDataParallel and their like put modules of their own around it.

    A module in a list (`is_listed`) is a model where it holds an embedding, and not one where it is a block of another
    (`is_in_model`), whose `head` is a matrix like its others.
    """
    children = dict(module.named_children())
    heads = [children[name] for name in HEADS if name in children]
    is_model = bool(heads)
    if is_model and is_listed:
        is_model = not is_in_model and any(isinstance(part, TABLES) for part in module.modules())
    found = {p for head in heads for p in head.parameters()} if is_model else set[nn.Parameter]()
    for name, child in children.items():
        found |= head_parameters(child, name.isdigit() or (is_listed and not is_model), is_in_model or is_model)
    return found


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """[the matrix optimizer, AdamW, Adagrad]; every group carries `name`, and `initial_lr` and `initial_weight_decay`,
    which schedules multiply.

    Embeddings are the weights of nn.Embedding and nn.EmbeddingBag (a tied head is one of them), the head is a model's
    module `head` or `lm_head`, what else has two dimensions or more is a matrix, and less, such as a head's bias, a
    scalar. Tables made with sparse=True, whose gradients AdamW cannot take, are Adagrad's. An optimizer without
    parameters is left out.
    `config` has the fields of OptimizerConfig; a rule's option without a field keeps its default. Raises ValueError for
    an unknown `matrix_optimizer`, a model without matrices and whatever the optimizers refuse.
    """
    make = TORCH_OPTIMIZERS.get(config.matrix_optimizer) or partial(rule_optimizer, find_rule(config.matrix_optimizer))
    if config.matrix_optimizer in TORCH_OPTIMIZERS:
        refuse_weight_options(config)
    if config.comm_dtype not in COMM_DTYPES:
        raise ValueError(f"comm_dtype = {config.comm_dtype!r} is unknown; choose one of {', '.join(COMM_DTYPES)}")
    tables = [module for module in model.modules() if isinstance(module, TABLES)]
    embeddings = {p for table in tables for p in table.parameters()}  # of a parametrized one, what it is made from
    sparse = {table.weight for table in tables if getattr(table, "sparse", False)}
    heads = head_parameters(model)
    routes: dict[str, list[tuple[str, nn.Parameter]]] = {
        name: [] for name in ("matrix", "embed", "head", "scalar", "sparse")
    }
    for name, p in model.named_parameters():
        kind = "sparse" if p in sparse else "embed" if p in embeddings else "head" if p in heads else "matrix"
        routes[kind if p.ndim >= 2 else "scalar"].append((name, p))
    if not routes["matrix"]:
        raise ValueError(
            f"matrix_optimizer = {config.matrix_optimizer!r}: the model has no matrices beside embeddings and head; "
            "train it with torch.optim.AdamW alone"
        )

    def group(name: str, lr: float, weight_decay: float, **options: Any) -> dict[str, Any]:
        initial = dict(initial_lr=lr, initial_weight_decay=weight_decay)
        return dict(params=routes[name], name=name, lr=lr, weight_decay=weight_decay, **initial, **options)

    rates = {"embed": config.embed_lr, "head": config.head_lr, "scalar": config.scalar_lr}
    betas = {"embed": config.embed_betas, "head": config.head_betas, "scalar": config.scalar_betas}
    rest = [
        group(name, lr, config.weight_decay, betas=betas[name] or config.adam_betas)
        for name, lr in rates.items()
        if routes[name]
    ]
    matrix_optimizer = make([group("matrix", config.matrix_lr, config.matrix_weight_decay)], config)
    if isinstance(matrix_optimizer, MatrixOptimizer):  # the trainer asks at its log lines, where a GPU waits anyway
        matrix_optimizer.defer_check = routes["matrix"][0][1].is_cuda
    others = [adamw(rest, config)] if rest else []
    if routes["sparse"]:
        others.append(replicate(Adagrad([group("sparse", config.sparse_lr, 0.0)])))
    return [matrix_optimizer, *others]


def routing_table(optimizers: list[torch.optim.Optimizer]) -> str:
    """Which optimizer moves what: one line per group."""
    lines = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            count = sum(p.numel() for p in group["params"])
            what = f"{group['name']}: {len(group['params'])} tensors, {count:,} parameters"
            if isinstance(optimizer, MatrixOptimizer):
                kernels = backend(optimizer.kernels, group["params"][0].device).name
                what += f", {group['polar_method']}, {kernels} kernels"
                what += "" if optimizer.is_scale_free else ", not scale-free"
            if is_dtensor(p := group["params"][0]):
                what += f", in shards on {p.device_mesh.size()} ranks"
            lines.append(f"{type(optimizer).__name__:8} {what}, lr {group['lr']}, decay {group['weight_decay']}")
    return "\n".join(lines)
