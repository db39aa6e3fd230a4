"""How good a trained model is: its loss on text, in bits per byte, which compare models whatever their tokenizers, and
its accuracy on tasks.

    ./run.sh evaluate runs/<the run's directory>                     (its own validation tokens)
    ./run.sh evaluate runs/<the run's directory> --files=data/mine/mine_val_*.bin --num_tokens=0
    ./run.sh evaluate runs/<the run's directory> --tasks hellaswag_val.jsonl piqa.jsonl BLiMP.zip

Rows of seq_len tokens, each without what came before it, as in training's validation, whose number the defaults give.
Bits per byte are given in two ways. <|endoftext|>, which separates documents, is no text, so it never adds bytes; its
loss is counted in the first, as in a run's summary, and not in the second.

Tasks are files of JSON lines, zip archives of such, or from the Hugging Face Hub: hub:hellaswag, hub:piqa,
hub:arc_easy, hub:arc_challenge, hub:copa, hub:winogrande, hub:lambada_openai, hub:blimp. inference/tasks.py says which
keys their lines have and how they are scored. Beside each accuracy: its standard error, what guessing gives, and how
many standard errors of guessing lie between.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from data import console
from data.files import path_as_meant
from data.loader import TokenStream, validation_batches
from data.masking import masking
from data.shards import DataError, find_shards
from data.tokenizer import end_of_text, token_bytes
from harness.log_format import bits_per_byte
from harness.settings import parse_settings
from harness.tables import Row, table
from inference.load import Loaded, check_writes_text, load
from inference.tasks import Outcome, Task, run_task, standard_error, tasks_of
from model import IGNORE_INDEX


@dataclass(frozen=True)
class Options:
    run: str = ""  # run directory, checkpoint or export; comes first
    files: str = ""  # pattern of the shards; empty: the run's val_files
    num_tokens: Annotated[int | None, ">= 0"] = None  # the first so many; none: the run's val_tokens; 0: all whole rows
    tasks: tuple[str, ...] = ()  # files of tasks or hub:NAME, in place of the loss
    limit: Annotated[int, ">= 0"] = 0  # items of each task; 0: all
    micro_batch_tokens: Annotated[int, ">= 1"] = 16384  # at once
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of matrix products


@dataclass(frozen=True)
class Evaluation:
    """Sums over the targets. Without a tokenizer, or of a masked model, num_bytes is 0."""

    nats: float
    num_tokens: int
    separator_nats: float  # of these: what separates documents
    num_separators: int
    num_bytes: int  # of text

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float | None:
        return bits_per_byte(self.loss, self.num_tokens, self.num_bytes)

    @property
    def bits_per_byte_of_text(self) -> float | None:
        """Without what the separators cost."""
        return (self.nats - self.separator_nats) / (self.num_bytes * math.log(2)) if self.num_bytes else None


@torch.no_grad()
def evaluate(loaded: Loaded, stream: TokenStream, num_tokens: int, micro_batch_tokens: int) -> Evaluation:
    """Over the first num_tokens tokens of a stream. Raises DataError where there are fewer."""
    model, config, device = loaded.model, loaded.model.config, loaded.machine.device
    micro_batch_tokens = max(1, min(micro_batch_tokens, num_tokens) // config.seq_len) * config.seq_len
    has_text = loaded.tokenizer != "none" and config.objective == "causal"
    separator = end_of_text(loaded.tokenizer) if has_text else IGNORE_INDEX
    nats = torch.zeros(2, dtype=torch.float64, device=device)
    batches = validation_batches(
        stream, num_tokens, config.seq_len, micro_batch_tokens, device=device, masking=masking(config, 0)
    )
    num_separators = torch.zeros((), dtype=torch.int64, device=device)
    for inputs_BT, targets_BT in batches:
        hidden_BTD = model.hidden(inputs_BT)
        if not has_text:
            nats[0] += model.loss(hidden_BTD, targets_BT)
            continue
        for kind, of_kind_BT in enumerate(separated(targets_BT, separator)):
            nats[kind] += model.loss(hidden_BTD, of_kind_BT)
        num_separators += (targets_BT == separator).sum()
    num_bytes = int(token_bytes(loaded.tokenizer)[stream.read(1, num_tokens)].sum()) if has_text else 0
    return Evaluation(float(nats.sum()), num_tokens, float(nats[1]), int(num_separators), num_bytes)


def separated(targets_BT: Tensor, separator: int) -> tuple[Tensor, Tensor]:
    """The targets without the separators, and the separators alone."""
    is_separator = targets_BT == separator
    return targets_BT.masked_fill(is_separator, IGNORE_INDEX), targets_BT.masked_fill(~is_separator, IGNORE_INDEX)


def report(found: Evaluation, what: str) -> str:
    lines = [("loss", f"{found.loss:.5f} nats per token over the first {found.num_tokens:,} of {what}")]
    if found.bits_per_byte is not None:
        counted = f"with the loss of {found.num_separators:,} separators"
        lines.append(("bits per byte", f"{found.bits_per_byte:.5f} over {found.num_bytes:,} bytes of text, {counted}"))
        lines.append(("", f"{found.bits_per_byte_of_text:.5f} without it"))
    return "\n".join(f"{name:14} {text}" for name, text in lines)


def task_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """A row for each task; for several that know accuracy alone, as BLiMP's, also their mean."""
    rows = [task_row(each.name, [each]) for each in outcomes]
    alike = [each for each in outcomes if not each.right_norm and not each.log_p]
    return [*rows, task_row(f"mean of {len(alike)}", alike)] if len(alike) > 1 else rows


def task_row(name: str, outcomes: Sequence[Outcome]) -> Row:
    """The mean over tasks, whose items count as independent; of one task all that is known."""
    n, first = len(outcomes), outcomes[0]
    accuracy = float(np.mean([each.acc for each in outcomes]))
    chance = float(np.mean([each.chance for each in outcomes]))
    chance_error = math.hypot(*(each.chance_error for each in outcomes)) / n
    row: Row = {"task": name, "items": sum(len(each.right) for each in outcomes)}
    row["acc"] = with_error(accuracy, math.hypot(*(standard_error(each.right) for each in outcomes)) / n)
    has_norm = n == 1 and first.right_norm
    row["acc_norm"] = with_error(first.acc_norm, standard_error(first.right_norm)) if has_norm else ""
    row["chance"] = f"{chance:.4f}" if chance else ""
    row["from chance"] = f"{(accuracy - chance) / chance_error:+.1f}" if chance_error else ""
    row["perplexity"] = with_error(*first.perplexity, digits=2) if n == 1 and first.perplexity else ""
    return row


def with_error(value: float, error: float, digits: int = 4) -> str:
    return f"{value:,.{digits}f}" + ("" if math.isnan(error) else f" ± {error:,.{digits}f}")


def main(argv: list[str]) -> int:
    return console.run(lambda: _main(argv), "nothing was kept")


def _main(argv: list[str]) -> None:
    options = parse_settings(Options, argv, __doc__, leading="run")
    if not options.run:
        raise ValueError("name a run directory, checkpoint or export first, such as ./run.sh evaluate runs/<directory>")
    if options.tasks and (options.files or options.num_tokens is not None):
        raise ValueError("tasks come in place of the loss: leave out either --tasks or --files and --num_tokens")
    if options.limit and not options.tasks:
        raise ValueError(f"limit = {options.limit} is of --tasks; of the loss it is --num_tokens")
    tasks = tasks_of(options.tasks, options.limit)
    loaded = load(options.run, options.device, options.dtype)
    try:
        print(table(_scored(loaded, tasks, options)) if tasks else _measured(loaded, options))
    except torch.OutOfMemoryError:
        asked = f"micro_batch_tokens = {options.micro_batch_tokens}"
        raise ValueError(f"out of memory with {asked}; a smaller one changes no result but to rounding") from None


def _scored(loaded: Loaded, tasks: Sequence[Task], options: Options) -> list[Row]:
    check_writes_text(loaded)
    return task_rows([run_task(loaded, task, options.micro_batch_tokens) for task in tasks])


def _measured(loaded: Loaded, options: Options) -> str:
    config, files = loaded.model.config, options.files or str(loaded.settings["val_files"])
    stream = TokenStream(find_shards(path_as_meant(files)), config.vocab_size)
    num_tokens = int(loaded.settings["val_tokens"]) if options.num_tokens is None else options.num_tokens
    num_tokens = num_tokens or (stream.num_tokens - 1) // config.seq_len * config.seq_len
    if num_tokens % config.seq_len:
        works = max(1, min(num_tokens, stream.num_tokens - 1) // config.seq_len) * config.seq_len
        raise ValueError(f"num_tokens = {num_tokens} must be whole rows of seq_len = {config.seq_len}; {works} works")
    if not num_tokens:
        raise DataError(f"{stream}: found {stream.num_tokens} tokens, not one whole row of seq_len = {config.seq_len}")
    found = evaluate(loaded, stream, num_tokens, options.micro_batch_tokens)
    masked = ", of which a part is hidden" if config.objective == "masked" else ""
    return report(found, f"{stream.num_tokens:,} tokens{masked}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
