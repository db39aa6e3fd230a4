"""A trained model, from what a run left on the disk."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from architectures import class_of
from data.files import user_path
from data.tokenizer import end_of_text, get_tokenizer
from harness.checkpoint import checkpoints_in, evaluated_weights, read_checkpoint
from harness.machine import Machine, find_machine
from model import GPT, ModelConfig


@dataclass
class Loaded:
    model: GPT  # on the machine's device, for inference
    tokenizer: str
    machine: Machine
    source: Path  # the file that the weights are from
    settings: dict[str, Any]  # the run's


def load(path: str, device: str = "auto", dtype: str = "auto") -> Loaded:
    """The model of a checkpoint, or of a run directory's newest one, with the weights that the run validates: averaged
    ones, if it has them. Raises ValueError for what holds no model."""
    source = find_checkpoint(user_path(path))
    try:
        state = read_checkpoint(source)
        settings = dict(state["config"])
        config = model_config(settings)
        doc_token = end_of_text(settings["tokenizer"]) if config.doc_mask else None
        weights = evaluated_weights(state)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{source} is not a checkpoint of this trainer ({error})") from None
    machine = find_machine(device, dtype)
    with machine.device:
        model = class_of(config)(config, machine.dtype, doc_token)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{source} holds another model than its settings say ({str(error).splitlines()[-1].strip()})"
        ) from None
    return Loaded(model.eval(), settings["tokenizer"], machine, source, settings)


def check_writes_text(loaded: Loaded) -> None:
    """Raises ValueError for a model of anything but the next token of a text."""
    if loaded.model.config.objective != "causal":
        raise ValueError(f"{loaded.source} predicts masked tokens, from both sides; it writes no text")
    if loaded.tokenizer == "none":
        raise ValueError(f"{loaded.source} was trained on ids of your own (tokenizer = 'none'), which are no text")
    get_tokenizer(loaded.tokenizer)  # or DataError, where its files cannot be had


def find_checkpoint(path: Path) -> Path:
    """The file itself, or the newest checkpoint of a run directory."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(
            f"{path} is neither a run directory nor a checkpoint; runs are in runs/, unless run_dir says else"
        )
    if not (checkpoints := checkpoints_in(path)):
        raise ValueError(f"{path} has no checkpoint; with --checkpoint_every=1000, say, a run writes one at its end")
    return checkpoints[-1]


def model_config(settings: dict[str, Any]) -> ModelConfig:
    """The model's part of a run's settings; those that have come since are as by default. How it is computed is plain:
    what `fused` changes pays in training."""
    known = {field.name: settings[field.name] for field in dataclasses.fields(ModelConfig) if field.name in settings}
    return ModelConfig(**known | {"fused": ("none",)})
