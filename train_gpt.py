"""Train a GPT to a target loss and report how long it took.

    ./run.sh configs/sotu_cpu.toml --matrix_lr=0.03                                    (installs, fetches, launches)
    torchrun --standalone --nproc_per_node=8 train_gpt.py configs/fineweb_124m_aurora.toml     (everything is there)
    python train_gpt.py --help                                                         (every field of a config)

Top to bottom: settings, what changes over a run, set-up, evaluation, one training step, the run, main.
Exit status: 0 done, 1 the loss diverged, 2 a mistake in what was asked for or a full disk, 3 target missed under
--require_target, 4 another rank was lost, 130 interrupted (the run directory is whole and says so).
"""

import contextlib
import dataclasses
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main: Ctrl-C while torch is imported, which takes seconds

import torch
from torch import Tensor

import optim
from architectures import class_of
from data import console
from data.files import is_file, path_as_meant, user_text
from data.loader import TokenLoader, TokenStream, validation_batches
from data.masking import masking
from data.shards import find_shards, head_fingerprint, refuse_overlap, set_fingerprint
from data.tokenizer import check_vocab_size, end_of_text
from harness import dry_run, outcome
from harness.checkpoint import CheckpointWriter, unchanged
from harness.compiling import compile_model, first_of_each
from harness.fsdp import check_fsdp, place
from harness.machine import Clock, Machine, find_machine
from harness.micro_batch import check_shapes, with_micro_batch
from harness.neuron_stats import NeuronStats
from harness.profiling import StepProfiler
from harness.reporters import Service
from harness.resume import StartingPoint, find_start, load_start
from harness.runlog import RunLog, check_name, write_loss
from harness.settings import check_settings, parse_settings, peek
from inference.load import initialize
from inference.sample import sample_text
from inference.training_tasks import TasksConfig, TrainingTasks
from model import GPT, ModelConfig
from optim.averages import Averages, AveragesConfig

# ------------------------------------------------------------------------------------------------------------
# Settings: those of the model are in model.py, those of the optimizers and of averages over steps in optim/


@dataclass(frozen=True)
class Config(ModelConfig, optim.OptimizerConfig, AveragesConfig, TasksConfig):
    # The run
    name: str = "run"  # first part of the run directory's name
    track: str = ""  # data + val_tokens + target_loss under one name; only runs of one track compare
    author: str = ""  # who ran it
    description: str = ""  # what is new about it
    seed: Annotated[int, ">= 0", "< 9e18"] = 0  # of the initial weights, and of data_start
    num_seeds: Annotated[int, ">= 0"] = 0  # runs of a leaderboard entry, declared before the first of them; 0: no entry
    run_dir: str = "runs"  # where run directories are made
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: a GPU if there is one
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of matrix products; auto: bfloat16 where hardware has it
    fsdp: bool = False  # shard weights, gradients and state over the ranks (torch's FSDP2), a block at a time
    compile: bool = False  # torch.compile the model; what it makes stays in .cache/inductor
    compile_blocks: bool = True  # block by block, so that reductions overlap with backward; false: as one graph
    profile: bool = False  # trace a step and log its ten largest costs
    dry_run: bool = False  # train nothing: print parameters, memory by number of ranks, estimated time
    # Data
    train_files: str = "data/sotu_byte/sotu_train_*.bin"  # pattern of the training shards
    val_files: str = "data/sotu_byte/sotu_val_*.bin"  # pattern of the validation shards
    data_start: Literal["first", "seed"] = "first"  # token that training begins at; seed: one that depends on the seed
    tokenizer: str = "byte"  # gpt2, byte, or none for token ids of your own (then set vocab_size)
    shard_tail: Literal["keep", "drop"] = "keep"  # tokens at a shard's end that fill no batch; drop: as modded-nanogpt
    val_tokens: Annotated[int, "> 0"] = 131072  # validation tokens: the first ones of the validation shards
    # Schedule
    train_steps: Annotated[int, "> 0"] = 300  # optimizer steps of the whole schedule
    batch_tokens: Annotated[int, "> 0"] = 4096  # tokens per step, over all ranks and micro-batches
    micro_batch_tokens: Annotated[int, ">= 0"] = 4096  # tokens a rank takes through the model at once; 0: what fits
    small_batch_steps: Annotated[int, ">= 0"] = 0  # first steps, which take half of batch_tokens
    short_row_steps: Annotated[int, ">= 0"] = 0  # first steps, in which rows are cut in two
    window_start: Annotated[int, ">= 0"] = 0  # the window grows from this to `window`, in multiples; 0: no growth
    warmup_steps: Annotated[int, ">= 0"] = 0  # steps of linear learning-rate warm-up
    cooldown: Literal["linear", "cosine", "sqrt", "power"] = "linear"  # shape of the rate's fall
    cooldown_frac: Annotated[float, ">= 0", "<= 1"] = 0.7  # last part of the schedule, in which the rate falls
    cooldown_power: Annotated[float, "> 0"] = 2.0  # exponent of the power shape
    min_lr_frac: Annotated[float, ">= 0", "<= 1"] = 0.0  # what the rate falls to, as a share of its full value
    adamw_cooldown: Literal["linear", "cosine", "sqrt", "power"] | None = None  # of all but matrices; none: as theirs
    adamw_cooldown_frac: Annotated[float | None, ">= 0", "<= 1"] = None  # of all but matrices; none: cooldown_frac
    adamw_min_lr_frac: Annotated[float | None, ">= 0", "<= 1"] = None  # of all but matrices; none: min_lr_frac
    decay_schedule: Literal["constant", "rate"] = "constant"  # rate: weight decay itself goes as the learning rate
    momentum_warmup_steps: Annotated[int, ">= 0"] = 0  # steps over which momentum rises from 0.85
    momentum_cooldown_steps: Annotated[int, ">= 0"] = 0  # last steps, over which it falls back to that
    grad_clip: Annotated[float, ">= 0"] = 0.0  # largest norm of all gradients together; 0: no clipping
    # Target, validation, log, checkpoints
    target_loss: Annotated[float, ">= 0"] = 0.0  # nats per token; 0: none
    stop_at_target: bool = False  # end the run when the target is reached
    require_target: bool = False  # exit with status 3 when it was not
    val_every: Annotated[int, "> 0"] = 25  # steps between validations
    log_every: Annotated[int, "> 0"] = 10  # steps between training-loss lines
    report_to: tuple[Service, ...] = ()  # write metrics also for these, which are optional packages
    neuron_stats: Annotated[int, ">= 0"] = 0  # steps between measurements of the MLPs' neurons; 0: none
    checkpoint_every: Annotated[int, ">= 0"] = 0  # steps between checkpoints; 0: none
    checkpoint_keep: Annotated[int, "> 0"] = 2  # newest checkpoints that stay
    checkpoint_async: bool = False  # write them in a thread while training goes on; costs host memory
    init_from: str = ""  # begin with the weights of an export, a checkpoint or a run directory; empty: random ones
    resume: str = ""  # go on from: auto (the newest checkpoint of this very run), a checkpoint file or a run directory

    def __post_init__(self) -> None:
        """Raises ValueError for a value that breaks its rule, and for settings that do not go together."""
        check_settings(self)
        super().__post_init__()
        self.check_averages(self.train_steps)
        check_name(self.name)
        check_fsdp(self)
        optim.check_matrix_optimizer(self.matrix_optimizer)
        check_vocab_size(self.vocab_size, self.tokenizer)
        self.check_tasks()
        if self.doc_mask and self.tokenizer == "none":
            raise ValueError("doc_mask needs a tokenizer, whose <|endoftext|> begins documents; set tokenizer = 'gpt2'")
        if self.window_start > self.window:
            raise ValueError(f"window_start = {self.window_start} is more than window = {self.window}; raise window")
        if self.short_row_steps and self.seq_len % 2:
            raise ValueError(f"short_row_steps cuts rows in two, and seq_len = {self.seq_len} is odd; 1024 is usual")
        if self.tie_head_steps and (self.embed_lr, self.embed_betas) != (self.head_lr, self.head_betas):
            found = f"embed_lr = {self.embed_lr}, head_lr = {self.head_lr}; set --embed_lr={self.head_lr}"
            raise ValueError(f"tie_head_steps needs one rate and the same betas for both, not {found}")


def load_config(argv: list[str]) -> Config:
    """Defaults, then the TOML file on the command line (if one is), then --key=value. ValueError says what is wrong."""
    words = [word if is_file(word) else user_text(word) for word in argv]
    rule = peek(words, "matrix_optimizer")
    kind = optim.with_rule_options(Config, [optim.find_rule(rule)]) if ":" in rule else Config  # the user's own rule
    config = parse_settings(kind, words, description=__doc__)
    paths = {key: getattr(config, key) for key in ("run_dir", "init_from", "resume", "train_files", "val_files")}
    meant: dict[str, Any] = {key: path_as_meant(path) for key, path in paths.items()}
    return dataclasses.replace(config, **meant)


def model_config(config: Config) -> ModelConfig:
    """The model's settings alone."""
    return ModelConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig)})


# ------------------------------------------------------------------------------------------------------------
# What changes over a run

COOLDOWNS: dict[str, Callable[[float, Config], float]] = {  # of x, which falls from 1 to 0 over the cooldown
    "linear": lambda x, config: x,
    "cosine": lambda x, config: (1 - math.cos(math.pi * x)) / 2,
    "sqrt": lambda x, config: 1 - math.sqrt(1 - x),
    "power": lambda x, config: x**config.cooldown_power,
}


@dataclass(frozen=True)
class StepPlan:
    """Everything that changes over a run, as it is in one step."""

    lr_factor: float  # on the learning rate of matrices
    adamw_lr_factor: float  # on those of embedding, head and scalars
    momentum: float
    lookahead: tuple[float, float]  # mean steps by which matrices, and all else, go ahead before the step
    is_averaged: bool  # whether the weights after the step count in the average that is evaluated
    window: int | None  # keys that a query sees; None: all
    first_token: int  # place in the training stream where the step's batch begins
    batch_tokens: int
    row_tokens: int
    is_tied: bool  # whether embedding and head are one matrix


def lr_shares(config: Config, step: int) -> tuple[float, float]:
    """Shares of the full learning rates: of matrices, and of embedding, head and scalars."""

    def share(shape: str, frac: float, least: float) -> float:
        left = 1 - step / config.train_steps
        cooled = COOLDOWNS[shape](left / frac, config) if left < frac else 1.0
        return min((step + 1) / max(1, config.warmup_steps), least + (1 - least) * cooled)

    frac = config.cooldown_frac if config.adamw_cooldown_frac is None else config.adamw_cooldown_frac
    least = config.min_lr_frac if config.adamw_min_lr_frac is None else config.adamw_min_lr_frac
    of_matrices = share(config.cooldown, config.cooldown_frac, config.min_lr_frac)
    return of_matrices, share(config.adamw_cooldown or config.cooldown, frac, least)


def plan_step(config: Config, step: int) -> StepPlan:
    """The plan of a step, from 0. That of step train_steps is what holds after the last one."""
    lr_factor, adamw_lr_factor = lr_shares(config, step)
    is_ahead = config.lookahead_start <= step < (config.lookahead_end or config.train_steps)
    ahead = config.lookahead if is_ahead else 0.0
    matrices_before, others_before = lr_shares(config, step - 1)  # the mean is of the steps so far
    warm = min(1.0, step / config.momentum_warmup_steps) if config.momentum_warmup_steps else 1.0
    if config.momentum_cooldown_steps:
        warm = min(warm, (config.train_steps - step) / config.momentum_cooldown_steps)
    window = config.window
    if config.window_start:  # grows in proportion to the step, in multiples of window_start
        grown = config.window_start + (window - config.window_start) * step / config.train_steps
        window = min(window, math.ceil(grown / config.window_start) * config.window_start)
    small = config.batch_tokens - config.batch_tokens // 2
    return StepPlan(
        lr_factor=lr_factor,
        adamw_lr_factor=adamw_lr_factor,
        lookahead=(ahead * matrices_before, ahead * others_before),
        is_averaged=config.average_steps > 0 and config.average_start <= step + 1,
        momentum=config.momentum - (1 - warm) * max(0.0, config.momentum - 0.85),
        window=window or None,
        first_token=step * config.batch_tokens - min(step, config.small_batch_steps) * (config.batch_tokens // 2),
        batch_tokens=small if step < config.small_batch_steps else config.batch_tokens,
        row_tokens=config.seq_len // 2 if step < config.short_row_steps else config.seq_len,
        is_tied=step < config.tie_head_steps,
    )


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
    optimizers: list[torch.optim.Optimizer]
    averages: Averages
    loader: TokenLoader
    val_stream: TokenStream
    data: dict[str, str]  # fingerprints of train_files and val_files
    start: StartingPoint  # anew, or from which checkpoint
    plan: StepPlan  # of the step under way
    resumed: dict[str, Any] | None = None  # what that checkpoint holds besides model and optimizers
    neurons: NeuronStats | None = None
    tasks: TrainingTasks | None = None
    summary: dict[str, Any] = field(default_factory=dict)  # of what was trained so far; train fills it
    extra: dict[str, Any] = field(default_factory=dict)  # metrics, numbers or 0-d tensors, for the next log line
    window: int | Tensor | None = None  # the plan's; on a GPU in its memory, where another compiles nothing anew

    def follow(self, plan: StepPlan) -> None:
        """Put everything that changes over a run to what it is in a step."""
        self.plan = plan
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            factor = plan.lr_factor if group["name"] == "matrix" else plan.adamw_lr_factor
            group["lr"] = group["initial_lr"] * factor
            if self.config.decay_schedule == "rate":  # a step's decay then goes as the square of the factor
                group["weight_decay"] = group["initial_weight_decay"] * factor
            if "momentum" in group:
                group["momentum"] = plan.momentum
        if isinstance(self.window, Tensor) and plan.window:
            self.window.fill_(plan.window)
        else:
            self.window = plan.window

    def batch(self) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the step under way, [micro-batches, rows, tokens]."""
        start = self.plan.first_token
        if self.config.data_start == "seed":  # multiples of the golden ratio: a few seeds in a row are far apart
            start += self.config.seed * 0x9E3779B97F4A7C15 % 2**64 * self.loader.stream.num_tokens >> 64
        return self.loader.batch(start, self.plan.batch_tokens, self.plan.row_tokens)


def set_up(config: Config, machine: Machine) -> Run:
    """A run whose every setting has been checked, before its directory exists. Raises ValueError."""
    if not config.micro_batch_tokens:
        config, machine = with_micro_batch(config, machine, set_up, train_step)
    clock, first, hide = Clock(machine.device), plan_step(config, 0), masking(config, config.seed)
    unit = config.batch_tokens if config.shard_tail == "drop" else 0
    stream = TokenStream(find_shards(config.train_files), config.vocab_size, unit)
    loader = TokenLoader(stream, config.micro_batch_tokens, machine.rank, machine.world_size, machine.device, hide)
    check_shapes(config, loader, plans_to_warm_up(config, 0, windows_count=False))
    loader.batch(0, first.batch_tokens, first.row_tokens)
    val_stream = TokenStream(find_shards(config.val_files), config.vocab_size)
    validation(config, machine, val_stream)
    val_fingerprint = head_fingerprint([val_stream.read(0, config.val_tokens)], config.val_tokens)
    data = dict(train_files=set_fingerprint(loader.stream.shards), val_files=val_fingerprint)
    start = find_start(config, data, machine)
    refuse_overlap(loader.stream.files, val_stream.files)
    torch.manual_seed(config.seed)
    with machine.device:
        doc_token = end_of_text(config.tokenizer) if config.doc_mask else None
        model = class_of(config)(model_config(config), machine.dtype, doc_token)
    if config.init_from and not (start.path or start.ended):
        initialize(model, config, machine)
    place(model, model.blocks, machine, config.fsdp)
    optimizers = optim.build_optimizers(model, config)
    averages = Averages(model, optimizers, config)
    compiled: Callable[..., Tensor] = compile_model(model, config.compile_blocks) if config.compile else model
    run = Run(config, machine, clock, model, compiled, optimizers, averages, loader, val_stream, data, start, first)
    if start.path:
        run.resumed = load_start(start, model, optimizers, machine)
        averages.resume(run.resumed, plan_step(config, run.resumed["step"] - 1).is_averaged)
    if config.window and machine.device.type == "cuda":
        run.window = torch.tensor(config.window, device=machine.device)
    if config.neuron_stats:
        run.neurons = NeuronStats(model, optimizers, config.train_steps, (run.resumed or {}).get("neurons"))
    run.tasks = TrainingTasks(config, machine) if config.eval_every else None
    return run


def validation(config: Config, machine: Machine, stream: TokenStream) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the validation rows; wrong sizes are refused by the call itself."""
    return validation_batches(
        stream, config.val_tokens, config.seq_len, config.micro_batch_tokens,
        machine.rank, machine.world_size, machine.device, masking(config, 0),
    )  # fmt: skip


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean loss in nats over the validation tokens, of averaged weights if any; the same on any number of ranks."""
    total = torch.zeros((), dtype=torch.float64, device=run.machine.device)
    with run.averages.tail.in_place():
        for inputs_BT, targets_BT in validation(run.config, run.machine, run.val_stream):
            total += run.compiled(inputs_BT, targets_BT, run.window)
    return run.machine.sum(total).item() / run.config.val_tokens


def train_step(run: Run, inputs: Tensor, targets: Tensor) -> Tensor:
    """One update from this rank's [micro-batches, rows, tokens]; returns its summed loss in nats, on the device."""
    run.averages.lookahead.shift(*run.plan.lookahead)
    # Forward and backward: gradients of the mean loss over this rank's tokens
    total = torch.zeros((), device=run.machine.device)
    for left, inputs_BT, targets_BT in zip(range(len(inputs))[::-1], inputs, targets, strict=True):
        loss = run.compiled(inputs_BT, targets_BT, run.window)
        if left == 0:  # gradients are final in the last micro-batch
            optim.start_reduction(run.optimizers)
        (loss / targets.numel()).backward()
        total += loss.detach()
    if run.plan.is_tied:
        run.model.tie_gradients()
    # Gradients of the mean loss over all ranks
    optim.finish_reduction(run.optimizers)
    if run.config.grad_clip:
        run.extra["grad_norm"] = optim.clip_gradients(run.optimizers, run.config.grad_clip)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    run.averages.lookahead.note_step()
    if run.plan.is_averaged:
        run.averages.tail.update()
    return total


def warm_up(run: Run) -> None:
    """Compile and load every kernel on dummy tokens of every shape; then model, optimizers and RNG are as before."""
    config, device = run.config, run.machine.device
    windows_count = config.compile and device.type != "cuda"  # they are a part of what is compiled
    with unchanged(run.model, [*run.optimizers, run.averages], device):
        for plan in plans_to_warm_up(config, run.resumed["step"] if run.resumed else 0, windows_count):
            run.follow(dataclasses.replace(plan, lr_factor=0.0, adamw_lr_factor=0.0))  # dummy tokens move no weight
            dummies = [torch.randint_like(tokens[:1], config.vocab_size) for tokens in run.batch()]
            for _ in range(2):
                train_step(run, *dummies)
            with torch.no_grad():
                run.compiled(*next(validation(config, run.machine, run.val_stream)), run.window)
    run.extra.clear()


def plans_to_warm_up(config: Config, first_step: int, windows_count: bool) -> list[StepPlan]:
    """The first plan of each shape of batch, and of each window if they count; no shape comes back."""

    def shape(step: int) -> tuple[Any, ...]:
        plan = plan_step(config, step)
        return plan.batch_tokens, plan.row_tokens, plan.window if windows_count else None

    return [plan_step(config, step) for step in first_of_each(shape, range(first_step, config.train_steps))]


# ------------------------------------------------------------------------------------------------------------
# The run


def train(run: Run, log: RunLog, opening: Sequence[str] = ()) -> dict[str, Any]:
    """Train until the schedule ends, the target stops the run, Ctrl-C or divergence; returns the summary, which is
    run.summary from the first. opening: the log's first lines."""
    config, start = run.config, run.start
    summary = run.summary = outcome.first_summary(run, log.directory)
    checkpoints = CheckpointWriter(
        log.directory, config.checkpoint_keep, config.checkpoint_async, run.machine, start.earlier, start.path or "none"
    )
    with outcome.recorded_in(summary, checkpoints, config.micro_batch_tokens):
        for line in opening:
            log.line(line)
        if start.path:
            log.continue_from(start.path, summary["steps"])
        take_steps(run, log, checkpoints)
    run.clock.switch("summary")
    return summary


def take_steps(run: Run, log: RunLog, checkpoints: CheckpointWriter) -> None:
    """The steps themselves, with all that is done between them; run.summary tells how far they have come."""
    config, machine, clock, summary = run.config, run.machine, run.clock, run.summary
    first_step = summary["steps"]
    previous = plan_step(config, max(0, first_step - 1))
    if run.resumed:
        clock.seconds["train"] = run.resumed["train_time_s"]
    profiler = StepProfiler(log, clock, config.train_steps - first_step) if config.profile and log.active else None
    clock.switch("warmup")
    if config.compile:
        log.line("compiling and warming up, off the clock ...")
    warm_up(run)
    for step in range(first_step, config.train_steps + 1):
        plan, is_last = plan_step(config, step), step == config.train_steps
        summary["steps"] = step
        run.follow(plan)
        if (step % config.val_every == 0 or is_last) and step != summary["val_step"]:
            clock.switch("validation")
            loss = evaluate(run)
            write_loss(run, log, "val", step, plan.first_token, loss)
            summary.update(val_loss=loss, val_step=step)
            if loss <= config.target_loss and summary["steps_to_target"] is None:
                reached = dict(steps_to_target=step, tokens_to_target=plan.first_token)
                summary.update(time_to_target_s=clock.seconds["train"], **reached)
        if config.stop_at_target and summary["steps_to_target"] is not None:
            summary["status"], is_last = outcome.STOPPED, True
        if run.tasks and (step % config.eval_every == 0 or is_last) and (step > first_step or not run.resumed):
            clock.switch("tasks")
            run.tasks.measure(run, log, step, plan.first_token)
        if config.checkpoint_every and step > first_step and (step % config.checkpoint_every == 0 or is_last):
            clock.switch("checkpoint")
            checkpoints.save(
                step, run.model, run.optimizers, train_time_s=clock.seconds["train"], summary=dict(summary),
                config=dataclasses.asdict(config), data=run.data, job=machine.job, lineage=summary["lineage"],
                neurons=run.neurons and run.neurons.state, window=plan.window, **run.averages.state_dict(),
            )  # fmt: skip
        if is_last:
            break
        neurons = run.neurons if machine.rank == 0 and (step + 1) % (config.neuron_stats or 1) == 0 else None
        if neurons:
            clock.switch("neurons")
            neurons.before_step()
        clock.switch("train")
        if step and plan.first_token != previous.first_token + previous.batch_tokens:
            raise AssertionError(f"plan_step: step {step} does not begin where the one before ended in the stream")
        epoch, epoch_before = (each.first_token // run.loader.stream.num_tokens for each in (plan, previous))
        if epoch > epoch_before:
            log.line(f"step:{step} epoch {epoch + 1} of the training data begins")
        previous = plan
        with profiler.step() if profiler else contextlib.nullcontext():
            loss_sum = train_step(run, *run.batch())
        log.bar.update()
        tokens_after = plan.first_token + plan.batch_tokens
        if neurons:
            clock.switch("neurons")
            measured = neurons.measure(step + 1, *next(validation(config, machine, run.val_stream)), run.window)
            log.metric(step=step + 1, tokens=tokens_after, train_time_s=clock.seconds["train"], neurons=measured)
        if (step + 1) % config.log_every == 0:
            clock.switch("logging")
            loss = machine.sum(loss_sum).item() / plan.batch_tokens
            write_loss(run, log, "train", step + 1, tokens_after, loss, lr_scale=plan.lr_factor)
    if config.checkpoint_every:
        clock.switch("checkpoint")
        checkpoints.settle()


def main(argv: list[str]) -> int:
    console.prepare()
    try:
        config = load_config(argv)
        total_tokens = plan_step(config, config.train_steps).first_token
        if config.dry_run:
            return dry_run.print_report(config, model_config(config), plans_to_warm_up(config, 0, False), total_tokens)
        run = set_up(config, find_machine(config.device, config.dtype))
        if run.start.ended:  # torchrun restarts whatever ended with another status than 0
            return outcome.exit_status(run.start.ended, config.require_target)
        log = RunLog(run.config, run.machine, run.data, run.start.lineage)
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
        return outcome.exit_status_before(error)
    try:
        epochs = total_tokens / run.loader.stream.num_tokens
        facts = [f"{run.model.num_params():,} parameters", *run.machine.notes, f"{epochs:.2f} epochs of training data"]
        summary = train(run, log, ["; ".join(facts), optim.routing_table(run.optimizers), *log.notes, *run.start.notes])
        console.ignore_stops()
    except KeyboardInterrupt:  # in the moments around training
        console.ignore_stops()
        summary = (run.summary or outcome.first_summary(run, log.directory)) | {"status": outcome.INTERRUPTED}
    run.loader.close()
    log.bar.close()
    try:
        tokens = plan_step(config, summary["steps"]).first_token
        outcome.finish(run, log, summary, tokens, lambda: sample_text(run.model, config.tokenizer, config.seed))
    except OSError as error:  # a full disk
        summary.update(status=outcome.FAILED, reason=f"at the end: {error}; {log.directory} is not whole")
    status = outcome.exit_status(summary, config.require_target)
    if status in (0, 3) and run.machine.world_size > 1:
        torch.distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
