"""Train a GPT to a target loss and report how long it took.

    ./run.sh configs/sotu_cpu.toml --matrix_lr=0.03                                    (installs, fetches, launches)
    torchrun --standalone --nproc_per_node=8 train_gpt.py configs/fineweb_124m_aurora.toml     (everything is there)
    python train_gpt.py --help                                                         (every field of a config)

Top to bottom: settings, set-up, evaluation, one training step, the run, main.
Exit status: 0 done, 1 the loss diverged, 2 a mistake in what was asked for or a full disk, 3 target missed under
--require_target, 4 another rank was lost, 130 interrupted (the run directory is whole and says so).
"""

import contextlib
import copy
import dataclasses
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main: Ctrl-C while torch is imported, which takes seconds

import torch
import torch.distributed as dist
from torch import Tensor

from data import console
from data.files import user_path, user_text
from data.loader import TokenLoader, TokenStream, validation_batches
from data.shards import DataError, find_shards, head_fingerprint, refuse_overlap, set_fingerprint
from data.tokenizer import end_of_text, get_tokenizer
from harness.checkpoint import CheckpointWriter, load_checkpoint
from harness.machine import Clock, Machine, find_machine, lost_rank, peak_memory_mib, prepare_compiler, print_error
from harness.neuron_stats import NeuronStats
from harness.outcome import exit_status, first_summary, status_after
from harness.profiling import StepProfiler
from harness.resume import Start, find_start
from harness.runlog import RunLog
from harness.settings import parse_settings
from model import GPT, ModelConfig
from optim import MatrixOptimizer, build_optimizers, routing_table
from rules import check_config
from schedule import lr_scale, set_schedule, steps_of_each_kind, window_at

Optimizers = list[torch.optim.Optimizer]

# ------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Config:
    # The run
    name: str = "run"  # first part of the run directory's name
    track: str = ""  # data + val_tokens + target_loss under one name; only runs of one track compare
    author: str = ""  # who ran it
    description: str = ""  # what is new about it
    seed: int = 0  # of the initial weights
    run_dir: str = "runs"  # where run directories are made
    device: str = "auto"  # auto (a GPU if there is one), cuda or cpu
    dtype: str = "auto"  # of matrix products: auto (bfloat16 where hardware has it), bfloat16 or float32
    compile: bool = False  # torch.compile the model; what it makes stays in .cache/inductor
    profile: bool = False  # trace a step and log its ten largest costs
    # Data
    train_files: str = "data/sotu_byte/sotu_train_*.bin"  # pattern of the training shards
    val_files: str = "data/sotu_byte/sotu_val_*.bin"  # pattern of the validation shards
    tokenizer: str = "byte"  # gpt2, byte, or none for token ids of your own (then set vocab_size)
    vocab_size: int = 257  # tokens the data may hold; the model pads it to a multiple of 64
    val_tokens: int = 131072  # validation tokens: the first ones of the validation shards
    # Model
    num_layers: int = 4  # blocks
    num_heads: int = 2  # attention heads
    head_dim: int = 64  # width of a head; even
    model_dim: int = 128  # width of the residual stream
    mlp_hidden: int = 0  # hidden width of the MLP; 0: 8/3 of model_dim rounded up to a multiple of 64
    seq_len: int = 256  # tokens in a training row
    softcap: float = 15.0  # logits are kept within +- this
    # The step's speed: the same numbers to rounding
    attention: str = "auto"  # sdpa, blocks (a CPU), flex (CUDA), or auto: sdpa, and with doc_mask or window the others
    fused_norm: bool = False  # gradients of RMSNorm and rotation written out; for models not compiled
    fused_mlp: bool = False  # make the neurons' outputs again in the backward pass: less memory
    fused_head: bool = False  # logits and loss a chunk at a time: much less memory (kernels/cross_entropy.py)
    # Options of the model
    doc_mask: bool = False  # attention stays within documents
    window: int = 0  # tokens that one attends to, itself included; 0: all
    window_start: int = 0  # the window grows from this to `window`, in multiples of it; 0: no growth
    value_embeds: int = 0  # n tables of values looked up by token, for the first and the last n blocks
    embed_skip: bool = False  # every block also sees the embedding
    unet_skips: bool = False  # the second half of the blocks also see the first half's outputs
    joint_matrices: bool = False  # the optimizer sees Q, K, V as one matrix, and gate and up
    mask_padding: bool = False  # the vocabulary's padding to a multiple of 64 stays out of the softmax
    z_loss: float = 0.0  # weight of log sum exp(logits) squared in training and its logged loss; 1e-4 is usual
    tie_head_steps: int = 0  # first steps in which embedding and head are one matrix; needs embed_lr = head_lr
    # Optimizers
    matrix_optimizer: str = "aurora"  # muon, aurora, riemannian_aurora, normuon, unormuon, adamw, sgd or rmsprop
    matrix_lr: float = 0.02  # learning rate of those matrices
    matrix_weight_decay: float = 0.0  # decoupled: a step multiplies weights by 1 - lr * this
    matrix_scale: str = "spectral"  # of muon's and relatives' updates: spectral, match_rms_adamw or none
    cautious: bool = False  # muon and relatives: that decay only where it does not work against the update
    momentum: float = 0.95  # of all but adamw
    momentum_warmup_steps: int = 0  # steps over which momentum rises from 0.85
    polar_method: str = "auto"  # polar_express (auto), simple_quintic (auto for riemannian_aurora), quintic or svd
    polar_steps: int = 0  # Newton-Schulz steps; 0: the method's own number
    kernels: str = "auto"  # of muon and relatives: auto (Triton on a GPU), triton or torch
    aurora_variant: str = "release"  # release, warm (one polar factor a step, with memory) or paper
    aurora_iterations: int = 2  # polar factors in an Aurora update
    aurora_beta: float = 0.5  # strength of its row correction, 0 to 1
    aurora_sides: str = "both"  # matrices it balances: both, tall or wide
    comm_dtype: str = "float32"  # of muon's and relatives' gradients between ranks: float32 or bfloat16
    embed_lr: float = 0.3  # AdamW, token embedding
    head_lr: float = 0.004  # AdamW, output head
    scalar_lr: float = 0.015  # AdamW, whatever is not a matrix
    adam_betas: tuple[float, float] = (0.8, 0.95)  # AdamW, everywhere
    adam_eps: float = 1e-10  # AdamW, everywhere
    weight_decay: float = 0.0  # AdamW, embedding, head and scalars
    # Schedule
    train_steps: int = 300  # optimizer steps of the whole schedule
    batch_tokens: int = 4096  # tokens in a step, over all ranks and micro-batches
    micro_batch_tokens: int = 4096  # tokens a rank takes through the model at once
    small_batch_steps: int = 0  # first steps, which take half of batch_tokens
    short_row_steps: int = 0  # first steps, in which rows are cut in two
    warmup_steps: int = 0  # steps of linear learning-rate warm-up
    cooldown_frac: float = 0.7  # last part of the schedule, in which the rate falls linearly to 0
    # Target, validation, log, checkpoints
    target_loss: float = 0.0  # nats a token; 0: none
    stop_at_target: bool = False  # end the run when the target is reached
    require_target: bool = False  # exit with status 3 when it was not
    val_every: int = 25  # steps between validations
    log_every: int = 10  # steps between training-loss lines
    neuron_stats: int = 0  # steps between looks at the MLPs' neurons (harness/neuron_stats.py); 0: none
    checkpoint_every: int = 0  # steps between checkpoints; 0: none
    checkpoint_keep: int = 2  # newest checkpoints that stay
    checkpoint_async: bool = False  # write them in a thread while training goes on; costs host memory
    resume: str = ""  # go on from: auto (the newest checkpoint of this very run), a checkpoint file or a run directory


def load_config(argv: list[str]) -> Config:
    """Defaults, then the TOML file named first (if one is), then --key=value. ValueError says what is wrong."""
    recipe = [word for word in argv[:1] if not word.startswith("-")]  # a file by its name, the rest words
    words = [user_text(word) for word in argv[len(recipe) :]]
    config = parse_settings(Config, [*recipe, *words], description=__doc__)
    check_config(config)
    paths = {key: getattr(config, key) for key in ("run_dir", "resume", "train_files", "val_files")}
    meant: dict[str, Any] = {key: str(user_path(path)) for key, path in paths.items() if user_path(path) != Path(path)}
    return dataclasses.replace(config, **meant)


def model_config(config: Config) -> ModelConfig:
    same = {field.name for field in dataclasses.fields(ModelConfig)} & {
        field.name for field in dataclasses.fields(Config)
    }
    return ModelConfig(
        **{name: getattr(config, name) for name in same},
        doc_token=end_of_text(config.tokenizer) if config.doc_mask else None, tie_head=config.tie_head_steps > 0,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Set-up, evaluation, one step


@dataclass
class Run:
    """What set_up makes and train uses."""

    config: Config
    machine: Machine
    clock: Clock
    model: GPT
    compiled: Callable[..., Tensor]  # the model, through torch.compile if asked for
    optimizers: Optimizers
    loader: TokenLoader
    val_stream: TokenStream
    data: dict[str, str]  # fingerprints of train_files and val_files
    start: Start  # anew, or from which checkpoint
    resumed: dict[str, Any] | None = None  # what that checkpoint holds besides model and optimizers
    neurons: NeuronStats | None = None
    summary: dict[str, Any] = field(default_factory=dict)  # of what was trained so far; train fills it
    # Of this step: keys that attention sees, on a GPU in its memory, where another compiles nothing anew ...
    window: int | Tensor | None = None
    is_tied: bool = False  # ... and whether embedding and head are one matrix

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets [micro-batches, rows, tokens]; short rows are two to one of the loader's."""
        inputs, targets = self.loader.batch(step)
        seq_len = self.config.seq_len // 2 if step < self.config.short_row_steps else self.config.seq_len
        return inputs.view(len(inputs), -1, seq_len), targets.view(len(targets), -1, seq_len)


def set_up(config: Config, machine: Machine) -> Run:
    """Everything that can be refused is looked at here, before the run directory exists. Raises ValueError."""
    clock = Clock(machine.device)
    loader = TokenLoader(
        TokenStream(find_shards(config.train_files), config.vocab_size), config.batch_tokens, config.seq_len,
        config.micro_batch_tokens, machine.rank, machine.world_size, machine.device,
        config.small_batch_steps,
    )  # fmt: skip
    loader.batch(0)
    val_stream = TokenStream(find_shards(config.val_files), config.vocab_size)
    validation(config, machine, val_stream)
    data = dict(
        train_files=set_fingerprint(loader.stream.shards),
        val_files=head_fingerprint([val_stream.read(0, config.val_tokens)], config.val_tokens),
    )
    start = find_start(config, data, machine)
    refuse_overlap(loader.stream.files, val_stream.files)
    torch.manual_seed(config.seed)
    with machine.device:
        model = GPT(model_config(config), machine.dtype)
    if machine.world_size > 1:
        for p in model.parameters():
            dist.broadcast(p.data, src=0)
    optimizers = build_optimizers(model, config)
    compiled: Callable[..., Tensor] = torch.compile(model, dynamic=False) if config.compile else model
    run = Run(config, machine, clock, model, compiled, optimizers, loader, val_stream, data, start)
    if start.path:
        problem = None
        try:
            run.resumed = load_checkpoint(start.path, model, optimizers, machine.device)
        except ValueError as error:
            problem = f"{error}; every node has to see the same run_dir" if machine.world_size > 1 else str(error)
        problem = machine.agree(problem)
        if problem:
            raise ValueError(problem)
    if config.window and machine.device.type == "cuda":
        run.window = torch.tensor(config.window, device=machine.device)
    if config.neuron_stats:
        run.neurons = NeuronStats(model, (run.resumed or {}).get("neurons"))
    return run


def validation(config: Config, machine: Machine, stream: TokenStream) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the validation rows; wrong sizes are refused by the call itself."""
    return validation_batches(
        stream, config.val_tokens, config.seq_len, config.micro_batch_tokens,
        machine.rank, machine.world_size, machine.device,
    )  # fmt: skip


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean loss in nats over the validation tokens, the same for any number of ranks."""
    total = torch.zeros((), dtype=torch.float64, device=run.machine.device)
    for inputs_BT, targets_BT in validation(run.config, run.machine, run.val_stream):
        total += run.compiled(inputs_BT, targets_BT, run.window)
    return run.machine.sum(total).item() / run.config.val_tokens


def train_step(run: Run, inputs: Tensor, targets: Tensor) -> Tensor:
    """One update from this rank's [micro-batches, rows, seq_len]; returns its summed loss in nats, on the device.

    Gradients are of the mean loss over this rank's tokens; the optimizers average them over the ranks.
    """
    total = torch.zeros((), device=run.machine.device)
    for left, inputs_BT, targets_BT in zip(range(len(inputs))[::-1], inputs, targets, strict=True):
        loss = run.compiled(inputs_BT, targets_BT, run.window)
        if left == 0 and isinstance(run.optimizers[0], MatrixOptimizer):
            run.optimizers[0].start_reduction()  # gradients are final in the last micro-batch
        (loss / targets.numel()).backward()
        total += loss.detach()
    if run.is_tied:
        run.model.tie_gradients()
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total


def warm_up(run: Run) -> None:
    """Compile and load every kernel on dummy tokens of every shape; then model, optimizers and RNG are as before."""
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in run.optimizers]
    c, is_cuda = run.config, run.machine.device.type == "cuda"
    with torch.random.fork_rng([run.machine.device] if is_cuda else []):
        # Shapes, and on a CPU the window, which is part of what is compiled.
        def kind(step: int) -> tuple[Any, ...]:
            window = c.compile and not is_cuda and window_at(step, c)
            return step < c.small_batch_steps, step < c.short_row_steps, window

        for step in steps_of_each_kind(kind, run.resumed["step"] if run.resumed else 0, c.train_steps):
            set_schedule(run, step)
            for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
                group["lr"] = 0.0  # the dummy tokens must not make weights overflow
            dummies = [torch.randint_like(tokens[:1], c.vocab_size) for tokens in run.batch(step)]
            for _ in range(2):
                train_step(run, *dummies)
            with torch.no_grad():
                run.compiled(*next(validation(c, run.machine, run.val_stream)), run.window)
    run.model.load_state_dict(weights)
    for optimizer, state in zip(run.optimizers, states, strict=True):
        optimizer.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------
# The run


def check_finite(run: Run, value: float, what: str) -> None:
    if isinstance(run.optimizers[0], MatrixOptimizer):
        run.optimizers[0].raise_if_not_finite()
    if not math.isfinite(value):
        raise FloatingPointError(f"the {what} is {value}; lower the learning rates")


def train(run: Run, log: RunLog, opening: Sequence[str] = ()) -> dict[str, Any]:
    """Train until the schedule ends, the target stops the run, Ctrl-C or divergence; returns the summary, which is
    run.summary from the first. opening: the log's first lines."""
    config, machine, start = run.config, run.machine, run.start
    summary = run.summary = first_summary(run, log.directory)
    checkpoints = CheckpointWriter(
        log.directory, config.checkpoint_keep, config.checkpoint_async, machine, start.earlier, start.path or "none"
    )
    try:
        for line in opening:
            log.line(line)
        if start.path:
            log.continue_from(start.path, summary["steps"])
        take_steps(run, log, checkpoints)
    except (DataError, OSError, FloatingPointError, RuntimeError, KeyboardInterrupt) as error:
        if lost_rank(error):
            console.ignore_stops()  # torchrun sends one to those that are left
        checkpoints.wait()
        summary["status"] = status_after(error, summary["steps"], config.micro_batch_tokens, checkpoints.newest)
    run.clock.switch("summary")
    return summary


def take_steps(run: Run, log: RunLog, checkpoints: CheckpointWriter) -> None:
    """The steps themselves, with all that is done between them; run.summary tells how far they have come."""
    config, machine, clock, summary = run.config, run.machine, run.clock, run.summary
    first_step = summary["steps"]
    if run.resumed:
        clock.seconds["train"] = run.resumed["train_time_s"]

    def progress(step: int) -> str:
        seconds = clock.seconds["train"]
        return f"train_time:{seconds:.3f}s step_avg:{1000 * seconds / max(1, step):.2f}ms"

    profiler = None
    if config.profile and machine.rank == 0:
        profiler = StepProfiler(log, clock, config.train_steps - first_step)
    clock.switch("warmup")
    if config.compile:
        log.line("compiling and warming up, off the clock ...")
    warm_up(run)
    for step in range(first_step, config.train_steps + 1):
        is_last = step == config.train_steps
        summary["steps"] = step
        tokens, tokens_after = run.loader.tokens_before(step), run.loader.tokens_before(step + 1)
        set_schedule(run, step)
        if (step % config.val_every == 0 or is_last) and step != summary["val_step"]:
            clock.switch("validation")
            loss = evaluate(run)
            check_finite(run, loss, "validation loss")
            seconds = clock.seconds["train"]
            summary.update(val_loss=loss, val_step=step)
            log.metric(step=step, tokens=tokens, train_time_s=seconds, val_loss=loss)
            log.line(f"step:{step}/{config.train_steps} val_loss:{loss:.5f} {progress(step)}")
            if loss <= config.target_loss and summary["steps_to_target"] is None:
                summary.update(time_to_target_s=seconds, steps_to_target=step, tokens_to_target=tokens)
            if config.stop_at_target and summary["steps_to_target"] is not None:
                summary["status"] = "stopped at target"
                break
        if config.checkpoint_every and step > first_step and (step % config.checkpoint_every == 0 or is_last):
            clock.switch("checkpoint")
            checkpoints.save(
                step, run.model, run.optimizers, train_time_s=clock.seconds["train"], summary=dict(summary),
                config=dataclasses.asdict(config), data=run.data, job=machine.job, lineage=summary["lineage"],
                neurons=run.neurons and run.neurons.state,
            )  # fmt: skip
        if is_last:
            break
        neurons = run.neurons if machine.rank == 0 and (step + 1) % (config.neuron_stats or 1) == 0 else None
        if neurons:
            clock.switch("neurons")
            neurons.before_step()
        clock.switch("train")
        if run.loader.epoch(step) > run.loader.epoch(max(step - 1, 0)):
            log.line(f"step:{step} epoch {run.loader.epoch(step) + 1} of the training data begins")
        with profiler.step() if profiler else contextlib.nullcontext():
            loss_sum = train_step(run, *run.batch(step))
        log.bar.update()
        if neurons:
            clock.switch("neurons")
            found = neurons.look(step + 1, *next(validation(config, machine, run.val_stream)), run.window)
            seconds = clock.seconds["train"]
            log.metric(step=step + 1, tokens=tokens_after, train_time_s=seconds, neurons=found)
        if (step + 1) % config.log_every == 0:
            clock.switch("logging")
            loss = machine.sum(loss_sum).item() / (tokens_after - tokens)
            check_finite(run, loss, "training loss")
            values = dict(train_time_s=clock.seconds["train"], train_loss=loss, lr_scale=lr_scale(step, config))
            log.metric(step=step + 1, tokens=tokens_after, **values)
            log.line(f"step:{step + 1}/{config.train_steps} train_loss:{loss:.5f} {progress(step + 1)}")
    if config.checkpoint_every:
        clock.switch("checkpoint")
        checkpoints.settle()


def finish(run: Run, log: RunLog, summary: dict[str, Any]) -> None:
    """Complete and write the summary; end the terminal's output with what people look for, and a sample."""
    run.clock.switch("summary")
    config, machine, seconds = run.config, run.machine, run.clock.seconds
    tokens = run.loader.tokens_before(summary["steps"])
    tokens_per_s = tokens / seconds["train"] if seconds["train"] else 0.0
    peak = machine.peak_flops if machine.dtype == torch.bfloat16 else None
    if config.window_start or config.short_row_steps:  # FLOPs a token that change over the run
        peak = None
    mfu = run.model.flops_per_token() * tokens_per_s / (peak * machine.world_size) if peak else None
    summary.update(
        train_time_s=seconds["train"], tokens=tokens, tokens_per_s=tokens_per_s, mfu=mfu,
        peak_memory_mib=peak_memory_mib(machine.device), phase_s=dict(seconds), num_params=run.model.num_params(),
        neurons=run.neurons and run.neurons.state["last"], **log.facts,
    )  # fmt: skip
    log.summary(summary)
    log.closing(summary)
    if machine.rank != 0:
        return
    if config.tokenizer != "none" and summary["status"] in ("finished", "stopped at target"):
        with contextlib.suppress(DataError, KeyboardInterrupt):  # no files of the tokenizer; no patience
            try:
                console.accept_stops()
                prompt, generator = [end_of_text(config.tokenizer)], torch.Generator().manual_seed(config.seed)
                sample = run.model.generate(prompt, 200 if config.tokenizer == "byte" else 60, generator)
                text = get_tokenizer(config.tokenizer).decode(sample)
                log.line(f"sample       {' '.join(text[:200].split())}")
            finally:
                console.ignore_stops()


def main(argv: list[str]) -> int:
    console.prepare()
    try:
        return run_to_end(argv)
    except KeyboardInterrupt:  # before there is a run
        console.ignore_stops()
        return 130


def run_to_end(argv: list[str]) -> int:
    try:
        config = load_config(argv)
        if config.compile:
            prepare_compiler()
        machine = find_machine(config.device, config.dtype)
        run = set_up(config, machine)
        if run.start.ended:  # torchrun restarts whatever ended with another status than 0
            return exit_status(run.start.ended, config)
        log = RunLog(config, machine, run.data, run.start.lineage)
    except (ValueError, OSError) as error:  # OSError: a full disk
        print_error(str(error))
        return 2
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        print_error(f"another rank was lost before training began ({lost_rank(error)})", event="lost")
        return 4
    try:
        try:
            facts = [f"{run.model.num_params():,} parameters", *machine.notes]
            facts += [f"{run.loader.epochs(config.train_steps):.2f} epochs of training data"]
            opening = ["; ".join(facts), routing_table(run.optimizers), *log.notes, *run.start.notes]
            summary = train(run, log, opening)
        finally:  # a further stop ends nothing now, and one that came in the last moment ends the run
            console.ignore_stops()
    except KeyboardInterrupt:
        summary = (run.summary or first_summary(run, log.directory)) | {"status": "interrupted"}
    run.loader.close()
    log.bar.close()
    try:
        finish(run, log, summary)
    except OSError as error:  # a full disk
        summary["status"] = f"failed at the end: {error}; {log.directory} is not whole"
    if summary["status"].startswith("failed"):
        # the ranks that see the loss of another one see it in different ways
        print_error(summary["status"], event="lost" if exit_status(summary, config) == 4 else "")
    status = exit_status(summary, config)
    if status in (0, 3) and machine.world_size > 1:
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
