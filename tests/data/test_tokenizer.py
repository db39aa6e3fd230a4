"""The encodings, and the fast path of `encode_documents` against `encode_ordinary` one document at a time."""

import random
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken

from data import tokenizer
from data.documents import Document
from data.shards import DataError
from data.tokenizer import encode_documents, end_of_text, get_tokenizer, token_bytes, vocab_size

pytestmark = pytest.mark.usefixtures("gpt2_vocabulary")

# What can go wrong around runs of whitespace. Texts of these take the fast path:
USUAL = [
    *"   \n\n\t\r\x0b\x0c",
    *"\x00\x1c\x1d\u200b\ufeff",  # whitespace to Python only, or not at all
    *"aZ7'.,!-_<|>é漢½🙂\u0301\u0431\u0663\u2019",
    *["'s", "'ll", " the", "don't", "  x", "\n\nA", " 12", "<|endoftext|>", "'\u017f", "'S"],
]
# One of these sends a document down the slow one: whitespace beyond ASCII, and the two markers.
UNUSUAL = list("\x85\xa0\u1680\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000\x1e\x1f")


def naive_tokens(documents: list[str], name: str) -> np.ndarray:
    encoding = get_tokenizer(name)
    tokens = [token for text in documents for token in (end_of_text(name), *encoding.encode_ordinary(text))]
    return np.array(tokens, dtype=np.uint16)


def fast_tokens(documents: list[str], name: str, threads: int = 1) -> np.ndarray:
    arrays = list(encode_documents(iter(documents), name, threads))
    assert all(array.dtype == np.uint16 for array in arrays)
    return np.concatenate(arrays)


def random_documents(seed: int, count: int, alphabet: list[str] = USUAL) -> list[str]:
    choose = random.Random(seed)
    return ["".join(choose.choices(alphabet, k=choose.randrange(60))) for _ in range(count)]


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_bytes_of_tokens_are_those_of_their_text(name: str) -> None:
    documents = ["naïve 日本 🙂\n\n  word", "", "<|endoftext|> written out"]
    tokens = naive_tokens(documents, name)
    sizes = token_bytes(name)
    assert len(sizes) == vocab_size(name)
    assert sizes[tokens].sum() == len("".join(documents).encode())
    assert sizes[end_of_text(name)] == 0
    assert sizes[:-1].min() == 1


def test_byte_encoding_is_utf8_and_needs_no_vocabulary() -> None:
    encoding = get_tokenizer("byte")
    text = "naïve <|endoftext|>\n\x00 漢🙂"
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode([*text.encode(), 256]) == text + "<|endoftext|>"
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [256]
    assert encoding.n_vocab == vocab_size("byte") == 257
    assert end_of_text("byte") == encoding.eot_token == 256


def test_gpt2_encoding() -> None:
    encoding = get_tokenizer("gpt2")
    assert encoding.encode_ordinary("Hello world") == [15496, 995]
    assert encoding.n_vocab == vocab_size("gpt2") == 50257
    assert end_of_text("gpt2") == encoding.eot_token == 50256


@pytest.mark.parametrize("function", [get_tokenizer, vocab_size, end_of_text], ids=lambda function: function.__name__)
def test_unknown_name_lists_the_choices(function) -> None:
    with pytest.raises(ValueError, match="tokenizer: found 'gpt4', expected one of byte, gpt2"):
        function("gpt4")


@pytest.mark.parametrize("name", ["byte", "gpt2"])
@pytest.mark.parametrize("batch_chars", [1, 30, 500, 1 << 18])
@pytest.mark.parametrize("alphabet", [USUAL, USUAL * 9 + UNUSUAL], ids=["usual", "mixed"])
def test_same_tokens_as_one_document_at_a_time(
    monkeypatch: pytest.MonkeyPatch, name: str, batch_chars: int, alphabet: list[str]
) -> None:
    """With tiny batches every document is long, and is cut wherever it can be."""
    monkeypatch.setattr(tokenizer, "BATCH_CHARS", batch_chars)
    documents = random_documents(seed=batch_chars, count=2000, alphabet=alphabet)
    np.testing.assert_array_equal(fast_tokens(documents, name), naive_tokens(documents, name))


def test_every_pair_and_triple_around_whitespace() -> None:
    """Each kind of whitespace, beside and between each kind of character, at both ends of a document."""
    spaces = [character for character in map(chr, range(0x3001)) if character.isspace()]
    documents = [f"{left}{first}{second}{right}" for first in spaces for second in spaces
                 for left in ("", "a") for right in ("", "b", ".", "1", "'s")]  # fmt: skip
    for text, document in zip(documents, tokens_per_document(documents), strict=True):
        assert document == get_tokenizer("gpt2").encode_ordinary(text), repr(text)


def tokens_per_document(documents: list[str]) -> Iterator[list[int]]:
    tokens = fast_tokens(documents, "gpt2")
    starts = np.flatnonzero(tokens == end_of_text("gpt2"))
    for document in np.split(tokens, starts[1:]):
        yield document[1:].tolist()


def test_no_character_is_whitespace_to_one_engine_only() -> None:
    """Two of a character between letters show whether an engine takes it for whitespace."""
    codes = [code for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    documents = [
        "".join(f"a{chr(code)}{chr(code)}b" for code in codes[start : start + 100])
        for start in range(0, len(codes), 100)
    ]
    np.testing.assert_array_equal(fast_tokens(documents, "gpt2"), naive_tokens(documents, "gpt2"))


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_lone_surrogates_become_replacement_characters(name: str) -> None:
    documents = ["good", "bad \ud800 half", "\udfff", "good"]
    np.testing.assert_array_equal(
        fast_tokens(documents, name), naive_tokens(["good", "bad \ufffd half", "\ufffd", "good"], name)
    )
    np.testing.assert_array_equal(fast_tokens(documents, "gpt2"), naive_tokens(documents, "gpt2"))


@pytest.mark.parametrize("space", [" ", "\n", "\xa0", "\u3000", " \t\r\n\u2003"], ids=ascii)
def test_long_runs_of_whitespace_are_cut_where_the_lookahead_cuts(monkeypatch: pytest.MonkeyPatch, space: str) -> None:
    monkeypatch.setattr(tokenizer, "LONG_RUN", re.compile(tokenizer.LONG_RUN.pattern.replace("1000", "3")))
    runs = [space * 2, space * 3, (space * 5)[:-1], space * 6]
    documents = [f"\xa0{left}{run}{right}{run}{end}" for left in ("", "a", "\x1c") for run in runs
                 for right in ("b", ".", "7", "'s", " c", "\x1c") for end in ("", "d")]  # fmt: skip
    np.testing.assert_array_equal(fast_tokens(documents, "gpt2"), naive_tokens(documents, "gpt2"))
    pieces = [list(tokenizer._without_long_runs(document)) for document in documents]
    assert ["".join(each) for each in pieces] == documents and max(map(len, pieces)) > 1


@pytest.mark.parametrize("first", ["", "\xa0"], ids=["usual", "unusual"])
def test_a_million_spaces_do_not_overflow_a_stack(first: str) -> None:
    """tiktoken itself fails on them where a word follows: a panic, which is no Exception."""
    run = " " * 1_200_000
    tokens = fast_tokens([f"{first}a{run}b{run}"], "gpt2")
    encoding = get_tokenizer("gpt2")
    expected = [50256, *encoding.encode_ordinary(f"{first}a"), *encoding.encode_ordinary(run[1:])]
    np.testing.assert_array_equal(tokens, [*expected, *encoding.encode_ordinary(f" b{run}")])


class Panic(BaseException):
    """As tiktoken's, which no module exports."""


@pytest.mark.parametrize("threads", [1, 2])
def test_what_cannot_be_encoded_is_named(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Many documents share a batch; and the last one is cut into parts."""

    def encode(text: str) -> list[int]:
        if "bad" in text:
            raise Panic("overflow")
        return [1]

    monkeypatch.setattr(tokenizer, "get_tokenizer", lambda _: SimpleNamespace(encode_ordinary=encode))
    monkeypatch.setattr(tokenizer, "BATCH_CHARS", 50)
    documents = [Document("\xa0 good", f"a.txt: line {number}") for number in range(99)]
    assert len(fast_tokens([*documents, *documents], "gpt2", threads)) == 4 * 99
    long = Document("\xa0 good " * 99 + "bad " * 99, "b.txt: line 7")
    for bad, place in ((Document("\xa0 bad", "a.txt: line 100"), "a.txt: line 100"), (long, "b.txt: line 7"),
                       ("\xa0 bad", "document 100")):  # fmt: skip
        with pytest.raises(DataError, match=f"^{place}: found text that the gpt2 encoding fails on .overflow"):
            fast_tokens([*documents, bad, *documents], "gpt2", threads)


def test_threads_keep_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "BATCH_CHARS", 1000)
    documents = [*random_documents(seed=1, count=3000), "one very long document, " * 5000]
    np.testing.assert_array_equal(fast_tokens(documents, "gpt2", threads=2), naive_tokens(documents, "gpt2"))


def test_stream_is_read_only_a_little_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set that is larger than memory must not be pulled in whole."""
    monkeypatch.setattr(tokenizer, "BATCH_CHARS", 100)
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "word " * 20

    stream = encode_documents(endless(), "gpt2", threads=2)
    for _ in range(10):
        next(stream)
    stream.close()
    assert taken <= 10 + 2 * tokenizer.BATCHES_AHEAD + 1


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache and a server address nobody answers at."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    get_tokenizer.cache_clear()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # without listening: connections are refused
        monkeypatch.setattr(tokenizer, "GPT2_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        yield tmp_path
    get_tokenizer.cache_clear()


def test_gpt2_without_a_network_says_what_to_do(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("tiktoken.load.read_file", asked.append)
    with pytest.raises(DataError) as error:
        get_tokenizer("gpt2")
    assert not asked  # tiktoken has no time limit
    message = str(error.value)
    assert message.startswith(f"gpt2 tokenizer: found neither sound files in {offline}")
    assert "set TIKTOKEN_CACHE_DIR" in message and "byte encoding" in message


def test_gpt2_with_damaged_files_and_no_network(
    gpt2_vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in gpt2_vocabulary.iterdir():
        (tmp_path / file.name).write_bytes(b"damaged")

    def no_network(_: str) -> bytes:
        raise ConnectionError

    monkeypatch.setattr("tiktoken.load.read_file", no_network)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    get_tokenizer.cache_clear()
    with pytest.raises(DataError, match="gpt2 tokenizer: found neither sound files"):
        get_tokenizer("gpt2")


def test_silent_server_is_given_up() -> None:
    """A server that takes the connection and never answers: without a time limit, this would never end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not tokenizer.reachable(f"http://127.0.0.1:{server.getsockname()[1]}/", timeout_s=0.3)


def test_pattern_is_that_of_tiktoken_but_for_the_lookahead() -> None:
    """The fast path stands on this pattern: when tiktoken changes it, somebody has to look again."""
    assert tiktoken.get_encoding("gpt2")._pat_str == (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    )
