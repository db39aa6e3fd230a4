"""The lines of a run's log.txt, written and parsed in one place.

    step:125/3250 val_loss:4.58616 train_time:66.065s step_avg:528.52ms

Other speedruns write the same, with times in ms. The file begins with the sources that ran, each under `# file: PATH`,
a ruler, the machine and the facts as JSON, and a ruler; it ends with a block after `---`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

RULER = "=" * 100
_LINE = re.compile(
    r"step:(?P<step>\d{1,12})/(?P<planned>\d{1,12})\s+(?P<kind>val|train)_loss:(?P<loss>[\w.+-]{1,24})\s+"
    r"train_time:(?P<time>\d{1,12}(?:\.\d{1,12})?)(?P<unit>ms|s)(?:\s+step_avg:(?P<step_avg>\d{1,12}\.?\d{0,12}|nan|inf)ms)?"
)


class Line(NamedTuple):
    """A step line of a log, in seconds and nats, as far as its digits go."""

    text: str
    step: int
    planned: int  # steps of the whole schedule
    kind: str  # val or train
    loss: float
    time_s: float
    step_avg_ms: float | None
    half_digit_s: float  # half of the last printed digit of the time


def step_line(
    kind: str, step: int, train_steps: int, loss: float, train_time_s: float,
    extra: Mapping[str, float | None] | None = None,
) -> str:  # fmt: skip
    """The line of a loss: `kind` is val or train, `extra` has further metrics by name."""
    clock = f"train_time:{train_time_s:.3f}s step_avg:{1000 * train_time_s / max(1, step):.2f}ms"
    further = "".join(f" {name}:{'-' if value is None else f'{value:.5g}'}" for name, value in (extra or {}).items())
    return f"step:{step}/{train_steps} {kind}_loss:{loss:.5f} {clock}{further}"


def parse_step_line(text: str) -> Line | None:
    """A step line of this trainer or another speedrun's; None for any other line."""
    found = _LINE.match(text)
    if not found:
        return None
    scale = 1e-3 if found["unit"] == "ms" else 1.0
    digits = len(found["time"].partition(".")[2])
    try:
        loss = float(found["loss"])
    except ValueError:
        loss = math.nan
    step_avg = float(found["step_avg"]) if found["step_avg"] else None
    time_s, half_digit_s = float(found["time"]) * scale, 0.5 * 10**-digits * scale
    return Line(text, int(found["step"]), int(found["planned"]), found["kind"], loss, time_s, step_avg, half_digit_s)


def is_before_step(text: str, step: int) -> bool:
    """Whether a line of the log's body tells of what happened before training step `step`."""
    found = re.match(r"step:(\d+)(/?)", text)  # without / it is told after the losses of that step
    return found is not None and (int(found[1]) < step or (int(found[1]) == step and found[2] == "/"))


def ending(summary: Mapping[str, Any], target_loss: float) -> dict[str, str]:
    """The block after `---`: the first word of each line, and the rest. All of it but the directory is in a summary."""
    from harness.neuron_stats import in_words  # brings torch along, which reading a log does without

    s, told = summary, dict[str, str]()
    measured = s["steps"] if s.get("val_step") is None else s["val_step"]  # the step of val_loss
    if s["steps_to_target"] is not None:
        where = f"{s['steps_to_target']} steps, {s['tokens_to_target']:,} tokens"
        told["target"] = f"{target_loss:g} nats reached after {s['time_to_target_s']:.1f} s of training, {where}"
    elif target_loss and s["val_loss"] is not None:
        gap = s["val_loss"] - target_loss
        told["target"] = f"{target_loss:g} nats not reached: {gap:.4f} short after {measured} steps"
    told["run"] = f"{s['status']} {s.get('reason', '')}".rstrip()
    if s["val_loss"] is not None:
        when = f"after {s['tokens']:,} tokens" if measured == s["steps"] else f"at step {measured}, the last measured"
        of_text = f", {s['bits_per_byte']:.4f} bits per byte" if s.get("bits_per_byte") else ""
        # "a token", and not per token: logs of records are held to these words
        told["val_loss"] = f"{s['val_loss']:.5f} nats a token{of_text} {when}"
    if s.get("neurons"):
        told["neurons"] = in_words(s["neurons"])
    told["speed"] = f"{s['tokens_per_s']:,.0f} tokens/s" + (f", MFU {s['mfu']:.1%}" if s["mfu"] else "")
    told["machine"] = f"{s['world_size']} x {s['device']}, peak memory {s['peak_memory_mib']:,.0f} MiB"
    told["seconds"] = ", ".join(f"{phase} {time_s:.1f}" for phase, time_s in s["phase_s"].items())
    return told


def bits_per_byte(loss: float | None, num_tokens: int, num_bytes: int | None) -> float | None:
    """Of a mean loss in nats per token over tokens that stand for so many bytes of text: the measure that compares
    models whatever their tokenizers. What separates documents, <|endoftext|>, is among the tokens and is no text. None
    where the loss or the number of bytes is unknown."""
    return loss * num_tokens / (num_bytes * math.log(2)) if num_bytes and loss is not None else None


def join_sources(sources: Mapping[str, str]) -> str:
    """The sources that ran, path to text, as the log begins with them."""
    return "\n".join(f"# file: {path}\n{source}" for path, source in sources.items())


def split_sources(head: str) -> list[tuple[str, str]]:
    """(path, source) pairs from the part of a log before the first ruler; another speedrun's log has its one script
    there, which gets the path `script`."""
    script, *files = re.split(r"\n# file: (?=\S+\.py\n)", f"\n{head}")
    pairs = [(path, source) for path, _, source in (part.partition("\n") for part in files)]
    return pairs if pairs or not script.strip() else [("script", script.removeprefix("\n"))]
