"""`dry_run = true`: what a run would be, told before anything is trained, fetched or written.

    ./run.sh configs/fineweb_124m_aurora.toml --dry_run

The model, its optimizers and its passes are counted without memory (memory_plan.py); of the data the headers are read.
A recipe for GPUs needs none here. What is an estimate is called so in the report.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch

import optim
from architectures import class_of
from data.files import user_path
from data.loader import TokenLoader, TokenStream, validation_batches
from data.prepare import FINEWEB_SHARD_TOKENS, fineweb_shard_tokens, fineweb_shards
from data.shards import TOKEN_BYTES, how_to_get, match_shards, refuse_overlap
from harness import memory_plan
from harness.machine import PEAK_FLOPS
from harness.micro_batch import choices, choose, usual_on_cpu
from harness.tables import align
from model import GPT, ModelConfig
from optim.polar import fast_half_dtype

RANKS = 1, 8, 16
ASSUMED_MFU = 0.5, 0.4
SMALL_GIB, LARGE_GIB, OUTSIDE_GIB = 24, 80, 1  # GPUs' memory; what is not in torch's tensors
NOTES = """\
Weights, gradients (of sparse tables the most) and state are exact; the rest is counted, without running anything"""
NOTE_OF_GPU = f""". A GPU also holds
its context and NCCL's buffers, about {OUTSIDE_GIB} GiB, and gaps that the allocator leaves."""


def print_report(config: Any, model_config: ModelConfig, plans: Sequence[Any], total_tokens: int) -> int:
    """Exit status 0. config: the trainer's Config; plans: the first StepPlan of each shape of batch; total_tokens: of
    the whole schedule. Raises ValueError for what is refused on any number of ranks, and for broken shards."""
    on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device_type = "cuda" if on_gpu else "cpu"
    with torch.device("meta"):
        model = class_of(model_config)(model_config, dtype_on(device_type, config.dtype))
    optimizers = optim.build_optimizers(model, config)
    counts = sorted({*RANKS, max(1, torch.cuda.device_count())})
    micro_batches = {ranks: micro_batch(config, model, optimizers, device_type, plans, ranks) for ranks in counts}
    memory = of_memory(config, model, optimizers, device_type, plans, micro_batches)
    data = of_data(dataclasses.replace(config, micro_batch_tokens=micro_batches[1]), total_tokens)
    flops = model.flops_per_token()
    print(f"Dry run of {config.name}: nothing is trained, fetched or written\n")
    print("\n".join(of_model(model, optimizers)), end="\n\n")
    print(of_schedule(config, total_tokens))
    print(f"{flops:,} FLOPs per token, forward and backward: {flops * total_tokens:.3g} in all")
    print("\n".join(data))
    if on_gpu and not config.micro_batch_tokens:
        small = micro_batch(config, model, optimizers, device_type, plans, 1, SMALL_GIB)
        large = f"{micro_batches[1]:,} with {LARGE_GIB} GiB (as below)"
        told = f"{large}, {small:,} with {SMALL_GIB} GiB (give that for its table)"
        print(f"micro_batch_tokens = 0 takes what fits a GPU: by this count, on one rank, {told}")
    print(f"\n{memory}\n{NOTES + (NOTE_OF_GPU if on_gpu else '.')}")
    if config.resume:
        print(f"resume = {config.resume!r} is not looked at: what holds is of a run from step 0")
    for key in ("init_from", "eval_tasks"):
        if value := getattr(config, key):
            print(f"{key} = {value!r} is not looked at")
    if on_gpu:
        print(f"\n{of_time(flops * total_tokens, counts)}")
    return 0


def of_model(model: GPT, optimizers: Iterable[torch.optim.Optimizer]) -> list[str]:
    """Parameters, and which optimizer moves them."""
    tables = model.num_params() - model.num_params(embedding=False)
    in_blocks = sum(p.numel() for p in model.blocks.parameters())
    lines = [["optimizer", "of", "tensors", "parameters", "lr", "decay"]]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            size = sum(p.numel() for p in group["params"])
            cells = [group["name"], len(group["params"]), f"{size:,}", group["lr"], group["weight_decay"]]
            lines.append([type(optimizer).__name__, *map(str, cells)])
    return [f"{model.num_params():,} parameters: {in_blocks:,} in blocks, {tables:,} in embeddings", align(lines)]


def of_schedule(config: Any, total_tokens: int) -> str:
    """Steps and tokens."""
    words = [f"{config.train_steps:,} steps of {config.batch_tokens:,} tokens in rows of {config.seq_len:,}"]
    if config.small_batch_steps:
        words.append(f"the first {config.small_batch_steps:,} of {config.batch_tokens - config.batch_tokens // 2:,}")
    if config.short_row_steps:
        words.append(f"the first {config.short_row_steps:,} in rows of {config.seq_len // 2:,}")
    return f"{'; '.join(words)}: {total_tokens:,} tokens"


def of_data(config: Any, total_tokens: int) -> list[str]:
    """Epochs of the shards that are there, by their headers; or what is missing."""
    unit = config.batch_tokens if config.shard_tail == "drop" else 0
    lines, train_shards = [], match_shards(config.train_files)
    if train_shards:
        there = TokenStream(train_shards, config.vocab_size, unit).num_tokens
        epochs = f"{there:,} training tokens in {len(train_shards)} shards: {total_tokens / there:.2f} epochs"
        lines.append(f"{config.train_files}: {epochs}")
    if val_shards := match_shards(config.val_files):
        stream = TokenStream(val_shards, config.vocab_size)
        validation_batches(stream, config.val_tokens, config.seq_len, config.micro_batch_tokens)  # refuses wrong sizes
        lines.append(f"{config.val_files}: {config.val_tokens:,} of {stream.num_tokens:,} tokens")
        refuse_overlap(train_shards, val_shards)
    elif config.val_tokens % config.seq_len:
        works = max(1, round(config.val_tokens / config.seq_len)) * config.seq_len
        rule = f"a multiple of seq_len = {config.seq_len}; {works} works"
        raise ValueError(f"val_tokens = {config.val_tokens} must be {rule}")
    is_fineweb = user_path(config.train_files).parent.name == "fineweb10B"
    for pattern, shards in ((config.train_files, train_shards), (config.val_files, val_shards)):
        if not shards:
            lines.append(f"{pattern}: not there" + ("" if is_fineweb else f"; {how_to_get(pattern)}"))
    needed = fineweb_shards(total_tokens, unit)
    fetched = max(0, needed - len(train_shards)) + (not val_shards)
    if is_fineweb and fetched:
        tokens = fetched * FINEWEB_SHARD_TOKENS
        disk = f"{tokens * TOKEN_BYTES / 1e9:.1f} GB of disk"
        epochs = f"training is {total_tokens / needed / fineweb_shard_tokens(unit):.2f} epochs of {needed}"
        lines.append(f"to fetch: {fetched} shards, {tokens:,} tokens, {disk}; {epochs}")
    return lines


def of_memory(
    config: Any, model: GPT, optimizers: Sequence[torch.optim.Optimizer], device_type: str, plans: Sequence[Any],
    micro_batches: Mapping[int, int],
) -> str:  # fmt: skip
    """A table of what a rank holds, part by part, with a column for each number of ranks in `micro_batches`."""
    columns: dict[int, list[str]] = {}
    sizes, problems = {}, {}
    for ranks, tokens in micro_batches.items():
        try:
            count, *shape = shape_on(ranks, tokens, plans)
        except ValueError as error:
            problems[ranks] = str(error)
            continue
        columns[ranks] = [f"{count} of {'x'.join(map(str, shape))}"]
        sizes[ranks] = parts_of_rank(config, model, optimizers, device_type, tuple(shape), ranks)
    if not columns:
        raise ValueError(f"on {' or '.join(map(str, problems))} ranks: {next(iter(problems.values()))}")
    unit, scale = ("GiB", 2**30) if max(parts["at the peak"] for parts in sizes.values()) > 2**30 else ("MiB", 2**20)
    names = [f"{unit} on each of", "micro-batches of a step", *next(iter(sizes.values()))]
    lines = [[ranks_word(ranks), *columns[ranks], *(f"{size / scale:,.2f}" for size in sizes[ranks].values())]
             for ranks in columns]  # fmt: skip
    missing = [f"not on {ranks_word(ranks)}: {problem}" for ranks, problem in problems.items()]
    return "\n".join([align(list(zip(names, *lines, strict=True))), *missing])


def ranks_word(ranks: int) -> str:
    return f"{ranks} rank{'s' * (ranks > 1)}"


def micro_batch(
    config: Any, model: GPT, optimizers: Sequence[torch.optim.Optimizer], device_type: str, plans: Sequence[Any],
    ranks: int, memory_gib: int = LARGE_GIB,
) -> int:  # fmt: skip
    """micro_batch_tokens, or where it is 0 what is expected to fit a GPU of so much memory."""
    if config.micro_batch_tokens:
        return int(config.micro_batch_tokens)
    known = choices(config.batch_tokens, config.small_batch_steps > 0, config.seq_len, ranks)

    def peak(tokens: int) -> int:
        _, *shape = shape_on(ranks, tokens, plans)
        return int(parts_of_rank(config, model, optimizers, device_type, tuple(shape), ranks)["at the peak"])

    if device_type == "cpu" or len(known) == 1:
        return usual_on_cpu(known)
    return choose(known, peak, (memory_gib - OUTSIDE_GIB) * 2**30)[0]


def shape_on(ranks: int, micro_batch_tokens: int, plans: Sequence[Any]) -> tuple[int, int, int]:
    """(micro-batches in a full step, rows, tokens of a row) on a rank, of the plan with the largest micro-batch. Raises
    ValueError where the batch of a step does not divide."""
    loader = TokenLoader(cast(Any, None), micro_batch_tokens, 0, ranks)  # which is asked for no tokens
    shapes = [loader.shape(plan.batch_tokens, plan.row_tokens) for plan in reversed(plans)]  # the usual one first
    return max(shapes, key=lambda shape: (shape[1] * shape[2], shape[2], shape[0]))


def parts_of_rank(
    config: Any, model: GPT, optimizers: Sequence[torch.optim.Optimizer], device_type: str, shape: tuple[int, ...],
    ranks: int,
) -> dict[str, float]:  # fmt: skip
    """Bytes by part of the memory of one rank, whose micro-batch is [rows, tokens], and together."""
    fsdp, dtype = config.fsdp and ranks > 1, dtype_on(device_type, config.dtype)
    eager, compiled = memory_plan.activations(model.config, dtype, device_type, shape, fsdp)
    passes, how = (compiled, ", estimated") if config.compile else (eager, "")
    weights = sum(p.nbytes * memory_plan.share(p, ranks, fsdp) for p in model.parameters())
    rows = config.batch_tokens  # at most, of a sparse gradient: every rank gets those of all
    of_rows = sum(rows * (p[0].nbytes + torch.int64.itemsize) - p.nbytes for p in memory_plan.sparse_tables(model))
    parts = {"weights": weights, "gradients": weights + of_rows, **memory_plan.state_bytes(optimizers, ranks, fsdp)}
    if config.lookahead:
        parts["look-ahead, two copies of the weights"] = 2 * weights
    if config.average_steps:
        parts["average of the weights"] = weights
    parts["copy kept during warm-up"] = weights * (2 if config.lookahead else 1)  # of weights, of the mean step
    if config.fsdp:
        parts["weights and gradients gathered"] = memory_plan.gathered_bytes(model, dtype) if fsdp else 0
    kept = sum(parts.values())
    exchange, update = memory_plan.update_bytes(optimizers, ranks, fsdp)
    parts[f"activations of blocks{how}"] = passes.blocks
    parts[f"head, loss, temporaries{how}"] = passes.most - passes.blocks
    if update:
        parts["matrices' gradients between ranks"] = exchange
        parts["update of matrices, in place of these three"] = update
    parts["at the peak"] = kept + max(passes.most + exchange, update)
    if config.compile:
        parts["at the peak without torch.compile"] = kept + max(eager.most + exchange, update)
    return parts


def dtype_on(device_type: str, asked: str) -> torch.dtype:
    """Of matrix products, as harness/machine.py chooses it, on a GPU that has bfloat16."""
    fastest = torch.bfloat16 if device_type == "cuda" else fast_half_dtype(device_type)
    return torch.float32 if asked == "float32" else fastest


def of_time(flops: float, counts: Sequence[int]) -> str:
    """Minutes on the GPUs whose peak is known, at an assumed MFU."""
    lines = [["GPU", *(ranks_word(ranks) for ranks in counts)]]
    for gpu, peak in PEAK_FLOPS.items():
        each = [" to ".join(f"{flops / (ranks * peak * mfu) / 60:,.1f}" for mfu in ASSUMED_MFU) for ranks in counts]
        lines.append([gpu, *each])
    assumed = " to ".join(f"{mfu:.0%}" for mfu in ASSUMED_MFU)
    title = f"Minutes of training if MFU were {assumed}: an assumption, not a measurement, as no GPU has run this yet"
    return f"{title}\n{align(lines)}"
