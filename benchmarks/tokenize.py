"""Throughput of text to GPT-2 tokens on all cores, starting the threads or processes included.

    python -m benchmarks.tokenize      # never as a file: it would hide the standard library's tokenize

Needs the GPT-2 vocabulary: a network, or TIKTOKEN_CACHE_DIR naming a folder that has it.

The baseline is the loop that most data scripts have: multiprocessing.Pool.imap over documents, each worker encoding
one and returning a numpy uint16 array, with chunksize 1 (the default) and 16 (the widespread choice). The text is
that of the package sotu, as it is (documents of about 50 KB) and cut into pieces of 3 KB (as long as web pages are).
cpu_ratio compares processor time, all processes together; it holds on a machine with other work too.
"""

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data.documents import read_documents
from data.prepare import sotu_speeches
from data.processes import leave_stops
from data.shards import Tokens
from data.tokenizer import encode_documents, end_of_text, get_tokenizer
from harness.results import command, report
from harness.step_timer import median_seconds
from harness.tables import Row


@dataclass(frozen=True)
class Args:
    cores: int = os.cpu_count() or 1
    """Our threads, and the baseline's processes."""
    repeats: int = 2
    """Copies of the 12 MB of text."""
    passes: int = 15
    """Timed passes; the table has medians."""


def main(args: Args) -> None:
    speeches = list(read_documents(sotu_speeches(), "")) * args.repeats
    pieces = [speech[start : start + 3000] for speech in speeches for start in range(0, len(speech), 3000)]
    rows = [measure("speeches", speeches, args), measure("pieces of 3 KB", pieces, args)]
    report("tokenize", rows, "cpu", **dataclasses.asdict(args))


def measure(name: str, documents: Sequence[str], args: Args) -> Row:
    """One row of the table: a set of documents through every variant."""

    def imap(chunksize: int) -> Tokens:
        with multiprocessing.get_context("fork").Pool(args.cores, leave_stops) as pool:
            return np.concatenate(list(pool.imap(encode_one, documents, chunksize)))

    def ours() -> Tokens:
        return np.concatenate(list(encode_documents(documents, "gpt2", args.cores)))

    variants: dict[str, Callable[[], Tokens]] = {"ours": ours, "imap 1": lambda: imap(1), "imap 16": lambda: imap(16)}
    right = np.concatenate([encode_one(document) for document in documents])
    for variant, function in variants.items():
        if not np.array_equal(function(), right):
            raise SystemExit(f"{name}, {variant}: the tokens are wrong; nothing was timed")
    seconds = median_seconds(variants, args.passes)
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    return {
        "text": name,
        "documents": len(documents),
        "MB": megabytes,
        "MB_per_s": megabytes / seconds["ours"].wall,
        "Mtokens_per_s": len(right) / seconds["ours"].wall / 1e6,
        "imap_1_MB_per_s": megabytes / seconds["imap 1"].wall,
        "imap_16_MB_per_s": megabytes / seconds["imap 16"].wall,
        "ratio_1": seconds["imap 1"].wall / seconds["ours"].wall,
        "ratio_16": seconds["imap 16"].wall / seconds["ours"].wall,
        "cpu_ratio_1": seconds["imap 1"].cpu / seconds["ours"].cpu,
        "cpu_ratio_16": seconds["imap 16"].cpu / seconds["ours"].cpu,
    }


def encode_one(document: str) -> Tokens:
    return np.array([end_of_text("gpt2"), *get_tokenizer("gpt2").encode_ordinary(document)], dtype=np.uint16)


if __name__ == "__main__":
    command(main, Args, __doc__)
