"""The two encodings, and text to tokens on all cores.

`byte` needs no download: 256 byte values and <|endoftext|> = 256. `gpt2` is tiktoken's. Both ids fit in uint16.

How `encode_documents` is fast. GPT-2's splitting pattern ends in a look-ahead, `\\s+(?!\\S)`, which leaves the last of
a run of whitespace characters to what follows it; it keeps the regular expression engine on its slow, backtracking
path. So a marker token is put before the last of each run of two or more, the text is encoded by the pattern
without the look-ahead, and the markers are dropped: the same tokens in half the time. Documents are encoded many at a
time, without Python integers in between, and almost all of it outside the interpreter's lock: threads suffice.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import re
import tempfile
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiktoken

from data.documents import END_OF_TEXT, Document
from data.shards import DataError, Tokens

VOCAB_SIZES = {"byte": 257, "gpt2": 50257}  # <|endoftext|> is the last id of each

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = ("vocab.bpe", "encoder.json")


# ---------------------------------------------------------------------------------------------------------
# Encodings


def vocab_size(name: str) -> int:
    """Number of tokens, <|endoftext|> included; needs no download."""
    if name not in VOCAB_SIZES:
        raise ValueError(f"tokenizer: found {name!r}, expected one of {', '.join(VOCAB_SIZES)}")
    return VOCAB_SIZES[name]


def check_vocab_size(size: int, name: str) -> None:
    """ValueError unless it is the tokenizer's own; `none` has ids of the user's."""
    if name != "none" and size != vocab_size(name):
        raise ValueError(
            f"vocab_size = {size} does not fit tokenizer = {name!r}, which has {vocab_size(name)} tokens; set that, or "
            "tokenizer = 'none' for ids of your own"
        )


def end_of_text(name: str) -> int:
    """The id of <|endoftext|>, which stands before every document."""
    return vocab_size(name) - 1


@functools.cache
def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The encoding called `name`. gpt2 is downloaded once; DataError within seconds where that is impossible."""
    last = end_of_text(name)  # refuses other names
    if name == "byte":
        return tiktoken.Encoding(
            "byte",
            pat_str=r"[\s\S]",
            mergeable_ranks={bytes([value]): value for value in range(256)},
            special_tokens={END_OF_TEXT: last},
        )
    if _gpt2_is_cached() or reachable(GPT2_URL + GPT2_FILES[0]):
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError):  # a damaged cache without a network, a download that breaks off
            pass
    raise DataError(
        f"gpt2 tokenizer: found neither sound files in {_cache_folder()} nor a way to download them from "
        f"{GPT2_URL}; set TIKTOKEN_CACHE_DIR to a tiktoken cache that has them, or use the byte encoding"
    )


@functools.cache
def token_bytes(name: str) -> npt.NDArray[np.int64]:
    """Bytes of text that each id stands for; <|endoftext|> stands for none. Raises DataError without the files."""
    encoding, last = get_tokenizer(name), end_of_text(name)
    return np.array([*(len(encoding.decode_single_token_bytes(token)) for token in range(last)), 0], dtype=np.int64)


def reachable(url: str, timeout_s: float = 3.0) -> bool:
    """Whether a server answers at `url`, proxies included. In a thread, since a name look-up knows no timeout."""
    import requests

    answers: list[int] = []

    def probe() -> None:
        with contextlib.suppress(requests.RequestException):
            answers.append(requests.head(url, timeout=timeout_s).status_code)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(answers)


def _cache_folder() -> Path:
    """Where tiktoken keeps what it downloaded, by its own rules."""
    chosen = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return Path(chosen) if chosen else Path(tempfile.gettempdir(), "data-gym-cache")


def _gpt2_is_cached() -> bool:
    names = (hashlib.sha1((GPT2_URL + file).encode()).hexdigest() for file in GPT2_FILES)
    return all((_cache_folder() / name).is_file() for name in names)


# ---------------------------------------------------------------------------------------------------------
# Documents to tokens

BATCH_CHARS = 1 << 18  # text that a thread takes at once
BATCHES_AHEAD = 4  # per thread, so that a set larger than memory streams through

# Within a batch U+001E stands before each document and U+001F where the look-ahead would cut. A document that has one
# of them, or whitespace beyond ASCII (the rest of the list), is encoded as it is.
DOCUMENT, CUT = "\x1e", "\x1f"
UNUSUAL = f"{DOCUMENT}{CUT}\x85\xa0\u1680{''.join(map(chr, range(0x2000, 0x200B)))}\u2028\u2029\u202f\u205f\u3000"
CUT_ID = VOCAB_SIZES["gpt2"]
GPT2_PATTERN_WITHOUT_LOOKAHEAD = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
PART_END = re.compile(r"\S(?=[ \n])")
# Of whitespace. The engine that looks ahead has each character of a run on its stack, which overflows at a million.
LONG_RUN = re.compile(f"[\t-\r {UNUSUAL[2:]}]{{1000,}}")


def encode_documents(documents: Iterable[str], name: str, threads: int) -> Generator[Tokens, None, None]:
    """The tokens of the documents in order, <|endoftext|> before each: exactly what `encode_ordinary` gives one
    document at a time. An array may hold many documents, or a part of a very long one."""
    get_tokenizer(name)  # loaded once, before the threads ask for it; or refused here
    pending: deque[Future[Tokens]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for documents_of_batch, continues in _batches(documents):
            pending.append(pool.submit(_encode_batch, documents_of_batch, continues, name))
            if len(pending) > BATCHES_AHEAD * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # who leaves early, for an error or a stop, waits for no more than he must


def _batches(documents: Iterable[str]) -> Iterator[tuple[list[Document], bool]]:
    """Lists of about BATCH_CHARS of text, and whether the first of the list continues the document before.

    A long document is cut between a character that is no whitespace and a space or line feed: no match of GPT-2's
    pattern reaches across such a place, nor looks across it.
    """
    batch: list[Document] = []
    size, continues = 0, False
    for number, document in enumerate(documents, start=1):
        place = document.place if isinstance(document, Document) else f"document {number}"
        start = 0
        while len(document) - start > 2 * BATCH_CHARS and (end := PART_END.search(document, start + BATCH_CHARS)):
            batch.append(Document(document[start : end.end()], place))
            yield batch, continues
            batch, size, continues, start = [], 0, True, end.end()
        batch.append(Document(document[start:], place))
        size += len(document) - start
        if size >= BATCH_CHARS:
            yield batch, continues
            batch, size, continues = [], 0, False
    if batch:
        yield batch, continues


def _encode_batch(documents: list[Document], continues: bool, name: str) -> Tokens:
    try:
        tokens = _encode_valid(documents, name)
    except BaseException:  # one of them cannot be encoded; a panic of tiktoken's is not even an Exception
        tokens = np.concatenate([_encode_alone(document, name) for document in documents])
    return tokens[1:] if continues else tokens


def _encode_alone(document: Document, name: str) -> Tokens:
    """Lone surrogates, which JSON can spell, are replaced as tiktoken does."""
    text = document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    try:
        return _encode_valid([text], name)
    except BaseException as error:
        found = f"found text that the {name} encoding fails on ({error})"
        raise DataError(f"{document.place}: {found}, expected any other; leave it out") from None


def _encode_valid(documents: Sequence[str], name: str) -> Tokens:
    pieces: list[Tokens] = []
    for usual, group in itertools.groupby(documents, lambda text: not any(mark in text for mark in UNUSUAL)):
        if name == "gpt2" and usual:
            pieces.append(_encode_usual(list(group)))
            continue
        for document in group:
            pieces.append(np.array([end_of_text(name)], dtype=np.uint16))
            if name == "byte":
                pieces.append(np.frombuffer(document.encode(), dtype=np.uint8).astype(np.uint16))
            else:
                for part in _without_long_runs(document):
                    pieces.append(np.array(get_tokenizer(name).encode_ordinary(part), dtype=np.uint16))
    return np.concatenate(pieces)


def _without_long_runs(document: str) -> Iterator[str]:
    """The document cut where the look-ahead cuts it: before the last of a long run of whitespace, unless the document
    ends with the run."""
    start = 0
    for run in LONG_RUN.finditer(document):
        if run.end() < len(document):
            yield document[start : run.end() - 1]
            start = run.end() - 1
    yield document[start:]


def _encode_usual(documents: list[str]) -> Tokens:
    """GPT-2 tokens of documents without any of UNUSUAL, by the pattern without look-ahead."""
    text = np.frombuffer((DOCUMENT + DOCUMENT.join(documents)).encode(), dtype=np.uint8)
    space = (text == ord(" ")) | (text - np.uint8(9) < 5)  # 9 to 13: tab to carriage return
    before_last_of_run = space[:-2] & space[1:-1] & ~space[2:] & (text[2:] != ord(DOCUMENT))
    marked = np.insert(text, np.flatnonzero(before_last_of_run) + 1, ord(CUT)).tobytes().decode()
    tokens = _gpt2_without_lookahead().encode_to_numpy(marked, allowed_special={DOCUMENT, CUT})
    return np.compress(tokens != CUT_ID, tokens).astype(np.uint16)


@functools.cache
def _gpt2_without_lookahead() -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "gpt2 without look-ahead",
        pat_str=GPT2_PATTERN_WITHOUT_LOOKAHEAD,
        mergeable_ranks=get_tokenizer("gpt2")._mergeable_ranks,
        special_tokens={DOCUMENT: end_of_text("gpt2"), CUT: CUT_ID},
    )
