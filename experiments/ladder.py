"""How good is a model of text? Its bits per byte beside those of xz and of n-grams, on the same bytes.

    python -m experiments.ladder runs/<the run's directory> --out=runs/ladder.json

A rung that a model does not pass says that something is wrong: with the model, or with how it is measured. All are
given the run's training text, and measured on the text of its first val_tokens validation tokens:

    1-gram, 3-gram, 5-gram         bytes given those before, counted in the training text; Witten-Bell smoothing, which
                                   has no settings: P(c|h) = (n(hc) + t(h) P(c|h')) / (n(h) + t(h)), where t(h) kinds of
                                   bytes have come after h, and h' is h without its first byte (Witten and Bell 1991)
    xz, alone                      xz -9e of the validation text, the only one that has not seen the training text
    xz, after the training text    what it adds to xz -9e of the training text before it
    the run, by its name           as ./run.sh evaluate says

What separates documents is a symbol of its own for n-grams and model; xz sees text alone, one document after another.
Where it counts, bits are given both ways: with what separators cost and without.
"""

import lzma
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import console
from data.files import check_writable, path_as_meant, user_path, write_json
from data.loader import TokenStream
from data.shards import find_shards
from data.tokenizer import end_of_text, get_tokenizer
from harness.settings import parse_settings
from harness.tables import Row, table
from inference.evaluate import evaluate
from inference.load import check_writes_text, load

SEPARATOR, SYMBOLS = 256, 257  # bytes, and what separates documents
Symbols = NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    run: str = ""  # run directory or checkpoint; comes first
    out: str = "runs/ladder.json"


def symbols_of(tokens: Sequence[int], tokenizer: str) -> Symbols:
    """The bytes that tokens stand for, and the separators between documents."""
    last, encoding = end_of_text(tokenizer), get_tokenizer(tokenizer)
    if tokenizer == "byte":
        return np.asarray(tokens, dtype=np.int64)
    of_token = {token: [*encoding.decode_single_token_bytes(token)] for token in {*tokens} - {last}}
    of_token[last] = [SEPARATOR]
    return np.array([symbol for token in tokens for symbol in of_token[token]], dtype=np.int64)


def bits_of_ngrams(train: Symbols, text: Symbols, order: int) -> NDArray[np.float64]:
    """Of each symbol of a text, float64 [len(text)], given the order - 1 before it in the text."""
    p = np.full(len(text), 1 / SYMBOLS)
    for length in range(1, order + 1):
        grams, counts = np.unique(windows(train, length), return_counts=True)
        contexts, first, num_after = np.unique(grams // SYMBOLS, return_index=True, return_counts=True)
        num_context = np.add.reduceat(counts, first)
        of_text = windows(text, length, [SEPARATOR] * (length - 1))
        n_hc = looked_up(of_text, grams, counts)
        n_h, t_h = (looked_up(of_text // SYMBOLS, contexts, values) for values in (num_context, num_after))
        p = np.where(n_h > 0, (n_hc + t_h * p) / np.maximum(1, n_h + t_h), p)
    return -np.log2(p)


def windows(symbols: Symbols, length: int, before: Sequence[int] = ()) -> Symbols:
    """The number of each run of `length` symbols, in base 257."""
    symbols = np.concatenate([np.array(before, dtype=np.int64), symbols])
    found = np.zeros(len(symbols) - length + 1, dtype=np.int64)
    for place in range(length):
        found = found * SYMBOLS + symbols[place : len(symbols) - length + 1 + place]
    return found


def looked_up(keys: Symbols, known: Symbols, values: Symbols) -> Symbols:
    """values[i] where a key is known[i], which is sorted; 0 where it is none of them."""
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[place] == keys, values[place], 0)


def xz_bytes(text: bytes) -> int:
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def climb(run: str) -> dict[str, Any]:
    """Bits per byte of every rung: [with separators or None, without]."""
    loaded = load(run)
    check_writes_text(loaded)
    if "train_files" not in loaded.settings:
        raise ValueError(f"{loaded.source.parent} is an export, which does not know its training text; name the run")
    settings, vocab_size = loaded.settings, loaded.model.config.vocab_size
    train_stream, val_stream = (
        TokenStream(find_shards(path_as_meant(str(settings[key]))), vocab_size) for key in ("train_files", "val_files")
    )
    num_tokens = int(settings["val_tokens"])
    train = symbols_of(train_stream.read(0, train_stream.num_tokens).tolist(), loaded.tokenizer)
    val = symbols_of(val_stream.read(0, num_tokens + 1).tolist(), loaded.tokenizer)
    skipped = len(symbols_of(val_stream.read(0, 1).tolist(), loaded.tokenizer))  # before the first target
    is_text = val[skipped:] != SEPARATOR
    num_bytes = int(is_text.sum())
    rungs: dict[str, list[float | None]] = {}
    for order in (1, 3, 5):
        bits = bits_of_ngrams(train, val, order)[skipped:]
        rungs[f"{order}-gram"] = [float(bits.sum()) / num_bytes, float(bits[is_text].sum()) / num_bytes]
    text, before = (bytes(part[part != SEPARATOR].astype(np.uint8)) for part in (val[skipped:], train))
    rungs["xz, alone"] = [None, 8 * xz_bytes(text) / num_bytes]
    rungs["xz, after the training text"] = [None, 8 * (xz_bytes(before + text) - xz_bytes(before)) / num_bytes]
    found = evaluate(loaded, val_stream, num_tokens, 16384)
    if found.num_bytes != num_bytes:
        raise AssertionError(f"the model was measured on {found.num_bytes} bytes, the rest on {num_bytes}")
    rungs[str(settings["name"])] = [found.bits_per_byte, found.bits_per_byte_of_text]
    rounded = {name: [None if value is None else round(value, 5) for value in values] for name, values in rungs.items()}
    return dict(
        name=settings["name"], num_bytes=num_bytes, train_bytes=len(before), num_params=loaded.model.num_params(),
        step=loaded.step, device=loaded.machine.name, dtype=str(loaded.machine.dtype), rungs=rounded,
    )  # fmt: skip


def rows_of(record: dict[str, Any]) -> list[Row]:
    return [
        {"model": name, "bits per byte": "-" if both is None else f"{both:.3f}", "without separators": f"{text:.3f}"}
        for name, (both, text) in sorted(record["rungs"].items(), key=lambda rung: -rung[1][1])
    ]


def main(argv: list[str]) -> int:
    return console.run(lambda: _main(argv), "nothing was kept")


def _main(argv: list[str]) -> None:
    options = parse_settings(Options, argv, __doc__, leading="run")
    if not options.run:
        raise ValueError("name a run directory first, such as python -m experiments.ladder runs/<directory>")
    out = user_path(options.out)
    check_writable(out.parent, "choose another place, such as --out=/tmp/ladder.json")
    record = climb(options.run)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, record, indent=1)
    print(table(rows_of(record)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
