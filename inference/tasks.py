"""Multiple-choice and last-word tasks by the usual rules, from JSON lines.

A choice is scored by the log-probability of its tokens after the context's; the item counts as right if the best choice
is the right one: by the sum (acc), or by the sum over the choice's length in characters (acc_norm). A last word counts
as right if each of its tokens is the likeliest. One line is an item, by the keys that it has:

    query, choices, gold                    choices after the query and a space; a query that begins with "Question: "
                                            goes on with a line "Answer:" (PIQA, ARC, COPA)
    ctx_a, ctx_b, activity_label, endings, label    HellaSwag's own lines; brackets, which are markup, are taken out
    context_options, continuation, gold     the same continuation after several contexts; acc alone (WinoGrande)
    context, continuation                   a last word (LAMBADA); its perplexity is of whole words
    sentence_good, sentence_bad             whole sentences, after a space; acc alone (BLiMP)

hub:piqa and other names of inference/hub_tasks.py stand for the same from the Hugging Face Hub.

How text becomes tokens is that of lm_eval 0.4.11, so that the numbers compare: context and continuation are encoded
together and cut where the context's own tokens end, whitespace at the context's end goes to the continuation, an empty
context is <|endoftext|>, and of what is longer than a row the end is kept. A continuation that is itself longer than a
row, which lm_eval refuses, is scored in pieces of half a row, each after what comes before it.
"""

import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.files import user_path
from data.tokenizer import end_of_text, get_tokenizer
from inference.hub_tasks import HUB, fetch
from inference.load import Loaded


@dataclass(frozen=True)
class Item:
    """Pairs of context and continuation, one for each choice, and which of them is right. A last word has one."""

    requests: tuple[tuple[str, str], ...]
    gold: int = 0
    sizes: tuple[int, ...] = ()  # characters of each choice; none where lengths say nothing


@dataclass(frozen=True)
class Task:
    name: str
    items: list[Item]


@dataclass(frozen=True)
class Score:
    log_p: float  # nats, summed over the continuation's tokens
    is_greedy: bool  # each of them was the likeliest


def item_of(row: dict[str, Any]) -> Item:
    """Raises LookupError, TypeError or ValueError for what is none."""
    if "choices" in row:
        query = row["query"]
        if query.startswith("Question: "):
            query = query.rstrip("\n") + "\nAnswer:"
        return _of_choices(query, row["choices"], row["gold"])
    if "endings" in row:
        query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        endings = [_without_markup(end) for end in _texts(row["endings"])]
        return _of_choices(_without_markup(query), endings, row["label"])
    if "context_options" in row:
        (continuation,) = _texts([row["continuation"]])
        requests = [(context, f" {continuation}") for context in _texts(row["context_options"])]
        return _checked(Item(tuple(requests), _gold(row["gold"])))
    if "sentence_good" in row:
        sentences = _texts([row["sentence_good"], row["sentence_bad"]])
        return Item(tuple(("", f" {sentence}") for sentence in sentences))
    context, continuation = _texts([row["context"], row["continuation"]])
    if not continuation:
        raise ValueError("the continuation is empty")
    return Item(((context, f" {continuation}"),))


def _of_choices(context: str, choices: Any, gold: int | str) -> Item:
    if "" in _texts(choices):
        raise ValueError("one of the choices is empty")
    requests = tuple((context, f" {choice}") for choice in choices)
    return _checked(Item(requests, _gold(gold), tuple(map(len, choices))))


def _gold(value: Any) -> int:
    if type(value) is int or (isinstance(value, str) and value.isascii() and value.isdigit()):
        return int(value)
    raise ValueError(f"the right choice is {value!r}, and has to be its number, from 0")


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{str(values)[:60]} is no list of texts")
    return values


def _checked(item: Item) -> Item:
    if len(item.requests) < 2:
        raise ValueError("there are fewer than two choices")
    if not 0 <= item.gold < len(item.requests):
        raise ValueError(f"the right one is number {item.gold} of {len(item.requests)} choices")
    return item


def _without_markup(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def tasks_of(names: Sequence[str], limit: int = 0) -> list[Task]:
    """Of files as read_tasks reads, and of tasks on the Hub as `hub:NAME`. Raises ValueError for what is neither."""
    found: list[Task] = []
    for name in names:
        if name.startswith(HUB):
            found += [_read(task, f"hub:{task}", rows, limit) for task, rows in fetch(name.removeprefix(HUB))]
            continue
        try:
            found += read_tasks(user_path(name), limit)
        except OSError as error:
            works = f"name a file of JSON lines, or {HUB}piqa, say"
            raise ValueError(f"{user_path(name)} is no file of tasks ({error.strerror or error}); {works}") from None
    return found


def read_tasks(path: Path, limit: int = 0) -> list[Task]:
    """The task of a file of JSON lines, or those of all such files in a zip archive; the first `limit` items, 0: all.

    Raises ValueError, with file and line, for what is no item.
    """
    if path.suffix != ".zip":
        with path.open(encoding="utf-8-sig") as file:
            return [_read(path.stem, str(path), _decoded(file, str(path)), limit)]
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".jsonl") and "__MACOSX" not in name)
            found = []
            for name in names:
                with io.TextIOWrapper(archive.open(name), encoding="utf-8-sig") as file:
                    where = f"{path}: {name}"
                    found.append(_read(Path(name).stem, where, _decoded(file, where), limit))
    except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:  # the last where it is encrypted
        raise ValueError(f"{path} is not a zip archive that can be read ({error})") from None
    if not found:
        raise ValueError(f"{path} has no .jsonl files")
    return found


def _read(name: str, where: str, lines: Iterable[str | dict[str, Any]], limit: int) -> Task:
    items: list[Item] = []
    for number, line in enumerate(lines, start=1):
        if limit and len(items) == limit:
            break
        try:
            if isinstance(line, dict):
                items.append(item_of(line))
            elif line.strip():
                items.append(item_of(json.loads(line)))
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            told = f"no key {error}" if isinstance(error, LookupError) else error
            keys = "query, choices, gold; context, continuation; sentence_good, sentence_bad; or others, see --help"
            raise ValueError(f"{where}, line {number} is not an item of a task ({told}); its keys are {keys}") from None
    if not items:
        raise ValueError(f"{where} has no items")
    return Task(name, items)


def _decoded(lines: Iterable[str], where: str) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error})") from None


def encode_pair(tokenizer: str, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of the context, at least one, and of the continuation."""
    encode = get_tokenizer(tokenizer).encode_ordinary
    if not context:
        return [end_of_text(tokenizer)], encode(continuation)
    stem = context.rstrip()
    if not stem:
        return [end_of_text(tokenizer)], encode(context + continuation)
    context_ids = encode(stem)
    return context_ids, encode(context + continuation)[len(context_ids) :]


@torch.no_grad()
def scores(
    loaded: Loaded, requests: Sequence[tuple[str, str]], micro_batch_tokens: int, what: str,
    window: int | Tensor | None = None,
) -> list[Score]:  # fmt: skip
    """In the order of the requests; computed longest first, in batches whose rows are filled up at their ends, of which
    each rank takes its share. Raises ValueError for a continuation without tokens, FloatingPointError for weights that
    are not finite."""
    model, config, machine = loaded.model, loaded.model.config, loaded.machine
    pieces = [piece for index, request in enumerate(requests)
              for piece in pieces_of(index, *encode_pair(loaded.tokenizer, *request), config.seq_len)]  # fmt: skip
    has_piece = {piece.request for piece in pieces}
    for index, (_, continuation) in enumerate(requests):
        if index not in has_piece:
            raise ValueError(f"{what}: the continuation {continuation!r} has no tokens")
    pieces.sort(key=lambda piece: -len(piece.row))
    batches: list[list[Piece]] = []
    while pieces:
        count = max(1, micro_batch_tokens // (len(pieces[0].row) - 1))
        batches.append(pieces[:count])
        pieces = pieces[count:]
    batches += [[]] * (-len(batches) % machine.world_size)  # sharded weights want all ranks to take each pass
    found_N2 = torch.zeros(
        len(requests), 2, dtype=torch.float64, device=machine.device
    )  # nats, tokens not the likeliest
    mine = batches[machine.rank :: machine.world_size]
    for batch in tqdm(mine, desc=what, unit="batch", leave=False, disable=True if machine.rank else None):
        inputs_BT = torch.zeros(max(1, len(batch)), len(batch[0].row) - 1 if batch else 1, dtype=torch.int64)
        for place, piece in enumerate(batch):
            inputs_BT[place, : len(piece.row) - 1] = torch.tensor(piece.row[:-1])
        hidden_BTD = model.hidden(inputs_BT.to(machine.device), window, kind="sdpa")
        for place, piece in enumerate(batch):
            ids_N, last = torch.tensor(piece.row[-piece.num_scored :], device=machine.device), len(piece.row) - 1
            logits_NV = model.logits(hidden_BTD[place, last - piece.num_scored : last])[:, : config.vocab_size]
            found_N2[piece.request, 0] += logits_NV.log_softmax(-1).gather(1, ids_N[:, None]).double().sum()
            found_N2[piece.request, 1] += (logits_NV.argmax(-1) != ids_N).sum()
    if not machine.sum(found_N2).isfinite().all():
        raise FloatingPointError(f"log-probabilities of {what} are not finite; lower the learning rates")
    return [Score(log_p, not misses) for log_p, misses in found_N2.tolist()]


@dataclass(frozen=True)
class Piece:
    """Tokens of one row and the next one, of which the last few are scored."""

    request: int
    row: list[int]
    num_scored: int


def pieces_of(request: int, context: list[int], continuation: list[int], seq_len: int) -> Iterator[Piece]:
    """The continuation in one piece, or, where it is longer than a row, in pieces of half a row; before each as much as
    there is room for."""
    size, tokens = len(continuation) if len(continuation) <= seq_len else max(1, seq_len // 2), context + continuation
    for start in range(0, len(continuation), max(1, size)):
        end = min(start + size, len(continuation))
        yield Piece(request, tokens[: len(context) + end][-(seq_len + 1) :], end - start)


@dataclass(frozen=True)
class Outcome:
    """Of a task. `chance` is the accuracy of guessing, 0 for a last word; right, right_norm: of each item."""

    name: str
    right: list[bool]
    right_norm: list[bool]  # empty where lengths say nothing
    log_p: list[float]  # of last words
    chance: float
    chance_error: float  # standard error of guessing

    @property
    def acc(self) -> float:
        return float(np.mean(self.right))

    @property
    def acc_norm(self) -> float:
        return float(np.mean(self.right_norm))

    @property
    def perplexity(self) -> tuple[float, float] | None:
        """Of last words, and its standard error."""
        if not self.log_p:
            return None
        nats = -float(np.mean(self.log_p))
        value = math.exp(nats) if nats < 700 else math.inf  # of a model that has learnt nothing
        return value, value * standard_error(self.log_p)


def standard_error(values: Sequence[float]) -> float:
    """Of their mean; NaN for one."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def run_task(loaded: Loaded, task: Task, micro_batch_tokens: int, window: int | Tensor | None = None) -> Outcome:
    """window: keys that a query sees, as the model's; none: what its settings say."""
    requests = [pair for item in task.items for pair in item.requests]
    found = iter(scores(loaded, requests, micro_batch_tokens, task.name, window))
    right, right_norm, log_p, chances = [], [], [], []
    for item in task.items:
        of_item = [next(found) for _ in item.requests]
        if len(of_item) == 1:
            right.append(of_item[0].is_greedy)
            log_p.append(of_item[0].log_p)
            chances.append(0.0)
            continue
        sums = np.array([score.log_p for score in of_item])
        right.append(int(sums.argmax()) == item.gold)
        if item.sizes:
            right_norm.append(int((sums / item.sizes).argmax()) == item.gold)
        chances.append(1 / len(of_item))
    variance = sum(chance * (1 - chance) for chance in chances)
    return Outcome(task.name, right, right_norm, log_p, float(np.mean(chances)), math.sqrt(variance) / len(chances))
