"""A trained model, from what a run left on the disk."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from architectures import class_of
from data.files import user_path
from data.tokenizer import end_of_text, get_tokenizer
from harness.checkpoint import checkpoints_in, evaluated_weights, read_checkpoint, verify
from harness.machine import Machine, find_machine
from harness.runlog import read_json
from model import GPT, ModelConfig


@dataclass
class Loaded:
    model: GPT  # on the machine's device, for inference
    tokenizer: str
    machine: Machine
    source: Path  # the file that the weights are from
    settings: dict[str, Any]  # the run's
    step: int = 0  # of the checkpoint
    summary: dict[str, Any] = field(default_factory=dict)  # of the run, as far as it is known


def load(path: str, device: str = "auto", dtype: str = "auto") -> Loaded:
    """The model of a checkpoint, or of a run directory's newest one, with the weights that the run validates: averaged
    ones, if it has them. dtype auto: float32 if the run asked for that, else what is fast here. Raises ValueError for
    what holds no model."""
    source = find_checkpoint(user_path(path))
    try:
        state = read_checkpoint(source)
        verify(source)
        settings = dict(state["config"])
        config = model_config(settings)
        if state.get("window"):  # of its step, in a run whose window grows
            config = dataclasses.replace(config, window=state["window"])
        doc_token = end_of_text(settings["tokenizer"]) if config.doc_mask else None
        weights = evaluated_weights(state)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{source} is not a checkpoint of this trainer ({error})") from None
    is_wide = dtype == "auto" and settings.get("dtype") == "float32"
    machine = find_machine(device, "float32" if is_wide else dtype)
    with machine.device:
        model = class_of(config)(config, machine.dtype, doc_token)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{source} holds another model than its settings say ({str(error).splitlines()[-1].strip()})"
        ) from None
    summary = {**state.get("summary", {}), **_summary_beside(source, state["step"])}
    return Loaded(model.eval(), settings["tokenizer"], machine, source, settings, state["step"], summary)


def _summary_beside(checkpoint: Path, step: int) -> dict[str, Any]:
    """The run's summary.json, if it is of that step: the checkpoint's own lacks what was known at the end."""
    found = read_json(checkpoint.with_name("summary.json"))
    return found if found.get("steps") == step else {}


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
    """The model's part of a run's settings; those that have come since are as by default. It is computed as is
    usual on this device."""
    known = {field.name: settings[field.name] for field in dataclasses.fields(ModelConfig) if field.name in settings}
    return ModelConfig(**known | {"fused": ("auto",)})
