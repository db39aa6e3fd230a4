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
from functools import partial
from typing import Any

import numpy as np

from data.documents import read_documents
from data.prepare import sotu_speeches
from data.processes import leave_stops
from data.shards import Tokens
from data.tokenizer import encode_documents, end_of_text, get_tokenizer
from harness.results import command, report
from harness.step_timer import median_seconds
from harness.tables import Row

CHUNK_SIZES = (1, 16)  # of the baseline


@dataclass(frozen=True)
class Args:
    cores: int = os.cpu_count() or 1  # our threads, and the baseline's processes
    repeats: int = 2  # copies of the 12 MB of text
    passes: int = 15  # timed passes; the table has medians


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

    variants: dict[str, Callable[[], Tokens]] = {f"imap {size}": partial(imap, size) for size in CHUNK_SIZES}
    variants["ours"] = ours
    right = np.concatenate([encode_one(document) for document in documents])
    for variant, function in variants.items():
        if not np.array_equal(function(), right):
            raise SystemExit(f"{name}, {variant}: the tokens are wrong; nothing was timed")
    seconds = median_seconds(variants, args.passes)
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    (wall, cpu), row = seconds.pop("ours"), dict[str, Any](text=name, documents=len(documents), MB=megabytes)
    row |= {"MB_per_s": megabytes / wall, "Mtokens_per_s": len(right) / wall / 1e6}
    row |= {f"imap_{n}_MB_per_s": megabytes / seconds[f"imap {n}"].wall for n in CHUNK_SIZES}
    row |= {f"ratio_{n}": seconds[f"imap {n}"].wall / wall for n in CHUNK_SIZES}
    return row | {f"cpu_ratio_{n}": seconds[f"imap {n}"].cpu / cpu for n in CHUNK_SIZES}


def encode_one(document: str) -> Tokens:
    return np.array([end_of_text("gpt2"), *get_tokenizer("gpt2").encode_ordinary(document)], dtype=np.uint16)


if __name__ == "__main__":
    command(main, Args, __doc__)
