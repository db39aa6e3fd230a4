"""A trained model, from what a run left on the disk: a checkpoint, or what ./run.sh export made of one."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from architectures import class_of
from data.files import user_path
from data.tokenizer import check_vocab_size, end_of_text, get_tokenizer
from harness.checkpoint import checkpoints_in, evaluated_weights, read_checkpoint, verify
from harness.log_format import bits_per_byte
from harness.machine import Machine, find_machine
from harness.runlog import read_json
from harness.settings import check_settings
from model import GPT, ModelConfig

WEIGHTS = "model.safetensors"  # of an export


@dataclass
class Trained:
    """What is on the disk."""

    source: Path  # the file that the weights are from
    settings: dict[str, Any]  # the run's; of an export, those that say what the model is and was validated on
    weights: dict[str, Tensor]  # that the run validates: averaged ones, if it has them
    step: int = 0  # of a checkpoint
    summary: dict[str, Any] = field(default_factory=dict)  # of the run, as far as it is known

    @property
    def config(self) -> ModelConfig:
        """The model's part of the settings; those that have come since are as by default. It is computed as is usual on
        this device."""
        names = [setting.name for setting in dataclasses.fields(ModelConfig)]
        known = {name: self.settings[name] for name in names if name in self.settings}
        known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}  # JSON's
        config = ModelConfig(**known | {"fused": ("auto",), "float8": ()})
        check_settings(config)
        return config


@dataclass
class Loaded:
    model: GPT  # on the machine's device, for inference
    tokenizer: str
    machine: Machine
    source: Path  # the file that the weights are from
    settings: dict[str, Any] = field(default_factory=dict)  # as Trained's, and so the rest
    step: int = 0
    summary: dict[str, Any] = field(default_factory=dict)


def load(path: str, device: str = "auto", dtype: str = "auto") -> Loaded:
    """The model of a checkpoint, of a run directory's newest one, or of an export. dtype auto: float32 if the run asked
    for that, else what is fast here. Raises ValueError for what holds no model."""
    trained = read_trained(path)
    config, tokenizer = trained.config, trained.settings["tokenizer"]
    is_wide = dtype == "auto" and trained.settings.get("dtype") == "float32"
    machine = find_machine(device, "float32" if is_wide else dtype)
    with machine.device:
        model = class_of(config)(config, machine.dtype, end_of_text(tokenizer) if config.doc_mask else None)
    try:
        model.load_state_dict(trained.weights)
    except RuntimeError as error:
        what = f"another model than its settings say ({str(error).splitlines()[-1].strip()})"
        raise ValueError(f"{trained.source} holds {what}") from None
    return Loaded(
        model.eval(), tokenizer, machine, trained.source, trained.settings, trained.step, trained.summary
    )  # fmt: skip


def read_trained(path: str) -> Trained:
    """Raises ValueError for what holds no model."""
    source = find_source(user_path(path))
    trained = _read_export(source) if source.name == WEIGHTS else _read_checkpoint(source)
    if missing := sorted({"tokenizer", "val_files", "val_tokens"} - trained.settings.keys()):
        raise ValueError(f"{source}: its settings lack {', '.join(missing)}")
    try:
        check_vocab_size(trained.config.vocab_size, trained.settings["tokenizer"])
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: its settings are none of this trainer ({error})") from None
    return trained


def find_source(path: Path) -> Path:
    """The file itself, the newest checkpoint of a run directory, or an export's weights."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(
            f"{path} is no run directory, checkpoint or export; runs are in runs/, unless run_dir says else"
        )
    if (path / WEIGHTS).exists():
        return path / WEIGHTS
    if not (checkpoints := checkpoints_in(path)):
        if (path / "config.json").exists():
            raise ValueError(f"{path} has a config.json and no {WEIGHTS}; export the run once more")
        if inside := sorted(path.glob("*/checkpoint_*.pt")):
            raise ValueError(f"{path} holds run directories; name one of them, such as {inside[-1].parent}")
        raise ValueError(f"{path} has no checkpoint; with --checkpoint_every=1000, say, a run writes one at its end")
    return checkpoints[-1]


def _read_checkpoint(source: Path) -> Trained:
    try:
        state = read_checkpoint(source)
        verify(source)
        settings = dict(state["config"])
        if state.get("window"):  # of its step, in a run whose window grows
            settings["window"] = state["window"]
        weights, step = evaluated_weights(state), state["step"]
    except (LookupError, TypeError, ValueError) as error:
        other = "name the run's directory, or another checkpoint of it"
        raise ValueError(f"{source} is not a checkpoint of this trainer, or damaged ({error}); {other}") from None
    return Trained(source, settings, weights, step, _summary_of(state, read_json(source.with_name("summary.json"))))


def _summary_of(state: dict[str, Any], at_the_end: dict[str, Any]) -> dict[str, Any]:
    """What is known of a run up to a checkpoint, whose own summary lacks what the run writes at its end."""
    if at_the_end.get("steps") == state["step"]:
        return at_the_end
    summary = {**state.get("summary", {})}
    summary |= {key: at_the_end[key] for key in ("device", "world_size", "git_commit") if key in at_the_end}
    config, step, val_loss = state["config"], state["step"], summary.get("val_loss")
    small = min(step, config.get("small_batch_steps", 0))
    summary["tokens"] = step * config["batch_tokens"] - small * (config["batch_tokens"] // 2)
    summary["train_time_s"] = state.get("train_time_s")
    if summary.get("val_step") != step:
        summary["val_loss"] = val_loss = None
    summary["bits_per_byte"] = bits_per_byte(val_loss, config["val_tokens"], summary.get("val_bytes"))
    return summary


def _read_export(source: Path) -> Trained:
    found = read_json(source.with_name("config.json"))
    if not found:
        raise ValueError(f"{source.with_name('config.json')} is missing or no JSON; export the run once more")
    settings = found.get("training")
    if not isinstance(settings, dict):
        raise ValueError(
            f"{source.parent}: its config.json has no settings under 'training'; ./run.sh export writes it"
        )
    try:
        return Trained(source, settings, load_file(source))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{source} cannot be read, or is not whole ({error}); export the run once more") from None


def check_writes_text(loaded: Loaded) -> None:
    """Raises ValueError for a model of anything but the next token of a text."""
    if loaded.model.config.objective != "causal":
        raise ValueError(f"{loaded.source} predicts masked tokens, from both sides; it writes no text")
    if loaded.tokenizer == "none":
        raise ValueError(f"{loaded.source} was trained on ids of your own (tokenizer = 'none'), which are no text")
    get_tokenizer(loaded.tokenizer)  # or DataError, where its files cannot be had


# What makes the loaded weights compute another function of the tokens that they see, or not fit. How many these are, by
# seq_len, window and doc_mask, is free: a run may go on with longer rows, or documents apart.
OF_THE_WEIGHTS = (
    "tokenizer vocab_size num_layers num_heads head_dim model_dim mlp_hidden architecture objective activation softcap "
    "value_embeds ngrams ngram_rows embed_skip mask_padding"
)


def initialize(model: GPT, config: Any, machine: Machine) -> None:
    """Give the trainer's new model, before it is sharded, the weights that config.init_from names (as load's path).

    config: the trainer's Config. Raises ValueError, on every rank, for a model of another shape or with other options.
    """
    problem = None
    try:
        trained = read_trained(config.init_from)
        theirs = {**dataclasses.asdict(trained.config), "tokenizer": trained.settings["tokenizer"]}
        names = {*OF_THE_WEIGHTS.split()} - ({"ngram_rows"} if not trained.config.ngrams else set())
        names -= {"mlp_hidden"} if trained.config.hidden_dim == config.hidden_dim else set()
        if differing := {name: theirs[name] for name in sorted(names) if theirs[name] != getattr(config, name)}:
            flags = " ".join(f"--{name}={_as_typed(value)}" for name, value in differing.items())
            raise ValueError(f"init_from = {config.init_from!r} is another model than this run's; set {flags}")
        model.load_state_dict(trained.weights)
        if config.tie_head_steps and not torch.equal(model.embed.weight, model.head.weight):
            found = f"tie_head_steps = {config.tie_head_steps} begins with embedding and head as one matrix"
            raise ValueError(f"{found}, and those of init_from are two; set --tie_head_steps=0")
    except (ValueError, OSError, RuntimeError) as error:
        problem = str(error).splitlines()[-1].strip()
    machine.raise_together(problem)


def _as_typed(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
