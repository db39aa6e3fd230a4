"""What `--dry_run` says of memory beside what training on this CPU takes: nothing is timed.

    python -m benchmarks.memory_use --recipe configs/sotu_base.toml

For variants of a recipe: bytes of optimizer state after a real step, which have to be as planned; what autograd keeps,
by hooks on the tensors it saves; and the most that torch's allocator held beyond what there was before, in a forward
and backward pass and in a step of the matrix optimizer, by the profiler. `compiled` is of what the partitioner of
torch.compile keeps, without the backend that generates code. `_mib` is planned, the same name without it measured /
planned.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from architectures import class_of
from harness import memory_plan
from harness.compiling import compile_model
from harness.results import command, report
from harness.tables import Row
from model import GPT
from optim import build_optimizers
from train_gpt import Config, load_config, model_config

WIDER = "num_layers=2 model_dim=256 num_heads=4 seq_len=512 fused="
VARIANTS = (
    "", "fused=none", "fused=norm", "fused=mlp", "fused=head", "fused=blocks", f"{WIDER}none",
    f"{WIDER}norm,mlp,head,blocks", f"{WIDER}norm,head", f"{WIDER}none doc_mask=true window=128",
    f"{WIDER}blocks doc_mask=true window=128", f"{WIDER}none value_embeds=1 ngrams=2,3 embed_skip=true",
    f"{WIDER}none architecture=track3 activation=squared_relu",
    f"{WIDER}none tokenizer=none vocab_size=10000", "matrix_optimizer=normuon",
    "matrix_optimizer=adamh init_out=0.02 init_down=0.02",
)  # fmt: skip


@dataclass(frozen=True)
class Args:
    recipe: str = "configs/sotu_base.toml"
    variants: tuple[str, ...] = VARIANTS  # settings of each, with spaces between them
    batch: int = 2  # rows in a micro-batch
    compile: bool = True  # also ask the partitioner of torch.compile, which takes seconds, in bfloat16


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that was allocated at once in `work` beyond what there was before, as the allocator reports it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    assert found.profiler is not None and found.profiler.kineto_results is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def saved_bytes(model: GPT, forward: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor) -> int:
    """Of the storages that autograd keeps of a forward pass, each once, without those of parameters and tokens."""
    known = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), inputs, targets)}
    saved: dict[int, Tensor] = {}  # by address; alive, lest an address comes again

    def pack(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in known:
            saved.setdefault(address, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(inputs, targets)
    size = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del loss
    return size


def measured(config: Config, dtype: torch.dtype, args: Args) -> Row:
    """One variant in one dtype. Raises ValueError where what should be exact is not."""
    torch.manual_seed(0)
    with torch.device("meta"):
        planned_model = class_of(config)(model_config(config), dtype)
    planned = memory_plan.state_bytes(build_optimizers(planned_model, config), 1, False)
    _, planned_update = memory_plan.update_bytes(build_optimizers(planned_model, config), 1, False)
    shape = args.batch, config.seq_len
    eager, compiled = memory_plan.activations(model_config(config), dtype, "cpu", shape)

    model = class_of(config)(model_config(config), dtype, 0 if config.doc_mask else None)
    optimizers = build_optimizers(model, config)
    inputs = torch.randint(1, config.vocab_size, shape, dtype=torch.int32)
    targets = torch.randint(1, config.vocab_size, shape)
    model(inputs, targets).backward()
    for optimizer in optimizers:
        optimizer.step()
    state = sum(memory_plan.nbytes(entry.values()) for each in optimizers for entry in each.state.values())
    if state != sum(planned.values()):
        raise ValueError(f"optimizer state is {state:,} bytes, and {sum(planned.values()):,} were planned")
    kept = saved_bytes(model, model, inputs, targets)
    most = peak_bytes(lambda: model(inputs, targets).backward())
    update = peak_bytes(optimizers[0].step)
    row: Row = dict(
        dtype=str(dtype).removeprefix("torch."), state_mib=state / 2**20, kept_mib=eager.kept / 2**20,
        kept=kept / eager.kept, most_mib=eager.most / 2**20, most=most / eager.most,
        update_mib=planned_update / 2**20, update=update / planned_update,
    )  # fmt: skip
    if args.compile and dtype == torch.bfloat16 and "blocks" not in model.parts:  # as on GPUs
        function = compile_model(model, by_block=True, backend="aot_eager_decomp_partition")
        row["compiled"] = saved_bytes(model, function, inputs, targets) / compiled.kept
        torch._dynamo.reset()
    return row | {"compiled": row.get("compiled", "")}


def main(args: Args) -> None:
    def rows() -> Iterator[Row]:
        for variant in args.variants:
            config = load_config([args.recipe, *(f"--{setting}" for setting in variant.split())])
            for dtype in (torch.float32, torch.bfloat16):
                yield {"settings": variant or "as it is", **measured(config, dtype, args)}
                print(".", end="", flush=True, file=sys.stderr)

    report("memory_use", list(rows()), "cpu", recipe=args.recipe, batch=args.batch)


if __name__ == "__main__":
    command(main, Args, __doc__)
