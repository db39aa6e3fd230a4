"""Documents out of text files: a .txt is one, a .jsonl has one a line, a .parquet one a row.

.txt and .jsonl may be packed, with .gz, .bz2 or .xz behind the name. Every document knows its place, and whatever is
wrong with one, or with its file, is a DataError that names it.
"""

import bz2
import contextlib
import gzip
import hashlib
import json
import lzma
import os
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from data.formats import LFS, UNPACK, interpreter, is_text, kind_by_zeros, kind_of, text_advice
from data.shards import DataError

END_OF_TEXT = "<|endoftext|>"
PACKED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}
OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, "": Path.open}
BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError)  # raised in reading a damaged packed file, or by a bad disk
CONVERT = {  # how to come to what is read, from files of other suffixes
    ".zst": "zstd -d {path}",
    ".zip": "unzip {path}",
    ".tar": "tar -xf {path}",
    ".tgz": "tar -xf {path}",
    ".json": 'a list becomes lines by: {python} -c "import json, sys; [print(json.dumps(row)) for row in '
    "json.load(open(sys.argv[1], encoding='utf-8'))]\" {path} > {stem}.jsonl",
    ".csv": '{python} -c "import sys; from pyarrow import csv, parquet; '
    'parquet.write_table(csv.read_csv(sys.argv[1]), sys.argv[2])" {path} {stem}.parquet',
}


class Document(str):
    """A document's text that knows its place: the file, and the line or row."""

    place: str

    def __new__(cls, text: str, place: str = "") -> "Document":
        document = super().__new__(cls, text)
        document.place = place
        return document


def check_paths(paths: Sequence[Path]) -> None:
    """DataError for a file that cannot be read by its name."""
    for path in paths:
        kind, packed = _suffixes(path)
        if path.is_dir():
            raise DataError(f"{path}: found a folder, expected a file; name the files in it: {path}/*{kind}")
        if not path.is_file():
            found = "neither a file nor a folder" if path.exists() else "no such file"
            raise DataError(f"{path}: found {found}, expected a file to read; check the path")
        if kind not in (".txt", ".jsonl", ".parquet") or (packed and kind == ".parquet"):
            if packed and kind != ".tar":
                unpack = f"{UNPACK[PACKED[packed]]} {{path}} > {{stem}}"
                advice = unpack if kind else f"rename it, for example to {{stem}}.txt{packed}"
            else:
                advice = CONVERT.get(kind, "if it is plain text, rename it to {stem}.txt")
            quoted, stem = (shlex.quote(str(each)) for each in (path, path.with_suffix("")))
            advice = advice.format(path=quoted, stem=stem, python=interpreter())
            raise DataError(
                f"{path}: found suffix {path.suffix!r}, expected .txt, .jsonl or .parquet, the first two maybe with "
                f"{', '.join(PACKED)} behind; {advice}"
            )
    if not any(path.stat().st_size for path in paths):
        raise DataError(f"{paths[0]}: found an empty file, expected text; check what made it")


def read_documents(paths: Sequence[Path], text_field: str, markers: Counter[str] | None = None) -> Iterator[Document]:
    """The documents of the files in order. In a .jsonl or .parquet the text is in `text_field`.

    <|endoftext|>, written in a .txt, ends a document, and nothing but whitespace is none there; elsewhere it is text
    like any other. `markers` counts it by what came of it.
    """
    markers = Counter() if markers is None else markers
    for path in paths:
        kind, _ = _suffixes(path)
        if kind == ".txt":
            yield from _read_text(path, markers)
            continue
        for document in _read_jsonl(path, text_field) if kind == ".jsonl" else _read_parquet(path, text_field):
            markers["text"] += document.count(END_OF_TEXT)
            yield document


def sources_fingerprint(paths: Sequence[Path], text_field: str) -> str:
    """Identifies the text without reading all of it: names, sizes, and 64 KiB at each end of every file."""
    digest = hashlib.sha256(text_field.encode())
    for path in paths:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name};{size};".encode(errors="surrogateescape"))  # names need not be UTF-8
            for start in (0, max(0, size - 65536)):
                file.seek(start)
                digest.update(file.read(65536))
    return digest.hexdigest()[:16]


def _suffixes(path: Path) -> tuple[str, str]:
    """The suffix that says what is in it, and that of how it is packed ("" if it is not), both in lower case."""
    packed = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    return (path.with_suffix("") if packed else path).suffix.lower(), packed


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    _, packed = _suffixes(path)
    with OPEN[packed](path, "rb") as file:
        try:
            if packed and path.stat().st_size == 0:
                raise EOFError("the file is empty")
            yield file
        except BROKEN as error:
            expected = f"a whole {PACKED[packed]} file" if packed else "a readable one"
            raise DataError(
                f"{path}: byte {file.tell()} of the text: found {error}, expected {expected}; {_damage_advice(path)}"
            ) from None


def _damage_advice(path: Path) -> str:
    """What can be done about a file that cannot be read to its end, or is not packed as its name says."""
    _, packed = _suffixes(path)
    with contextlib.suppress(OSError), path.open("rb") as file:
        head, stem = file.read(64), shlex.quote(str(path.with_suffix("")))
        if packed and (kind := kind_of(head)) in PACKED.values() and kind != PACKED[packed]:
            return f"it is packed by {kind}: rename it to {stem}{next(end for end in PACKED if PACKED[end] == kind)}"
        if packed and head and is_text(head):
            return f"it is not packed: rename it to {stem}"
    return "fetch or make it again"


def _decoded(raw: bytes, path: Path, place: str, is_start: bool) -> str:
    """UTF-8 without a byte-order mark, with which a file may begin, and a line of several put together. `place` is
    where in `path` the bytes are from."""
    _, packed = _suffixes(path)
    show = UNPACK[PACKED[packed]] if packed else "cat"
    if is_start and kind_of(raw[:64]) == LFS:
        raise DataError(f"{place}: found no text, expected some; {text_advice(path, raw[:64], show)}")
    head = raw[:65536]
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        advice = text_advice(path, head if is_start else b"", show)
        found = f"byte {error.start}: found {raw[error.start]:#04x}, expected UTF-8"
        raise DataError(f"{place}: {found}; {advice}") from None
    if kind_by_zeros(head):
        found = f"{head.count(0)} NUL bytes in the first {len(head)}"
        raise DataError(f"{place}: found {found}, expected UTF-8; {text_advice(path, head, show)}")
    return text.removeprefix("\ufeff")


def _read_text(path: Path, markers: Counter[str]) -> Iterator[Document]:
    with _unpacked(path) as file:
        raw = file.read()
    first, *rest = _decoded(raw, path, str(path), is_start=True).split(END_OF_TEXT)
    if not rest:
        yield Document(first, str(path))
        return
    markers["ends"] += len(rest)
    number = 0
    for part in (first, *rest):
        if part and not part.isspace():
            number += 1
            yield Document(part, f"{path}: document {number}")
    markers["documents"] += number


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    with _unpacked(path) as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}: line {number}"
            text = _decoded(line, path, place, is_start=number == 1)
            if not text or text.isspace():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: found invalid JSON ({error}), expected an object") from None
            if not isinstance(row, dict) or text_field not in row:
                found = f"fields {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
                advice = "name the field with --text_field" if isinstance(row, dict) else "make each line an object"
                raise DataError(f"{place}: found {found[:200]}, expected a string in field {text_field!r}; {advice}")
            if not isinstance(row[text_field], str):
                found = "null" if row[text_field] is None else f"a {type(row[text_field]).__name__}"
                raise DataError(f"{place}: {text_field!r}: found {found}, expected a string; leave the line out")
            yield Document(row[text_field], place)


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = {
                field.name: str(field.type.value_type if pyarrow.types.is_dictionary(field.type) else field.type)
                for field in file.schema_arrow
            }
            if columns.get(text_field) not in ("string", "large_string", "string_view"):
                found = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
                raise DataError(
                    f"{path}: found columns {found}, expected a string column {text_field!r}; name it with --text_field"
                )
            for batch in file.iter_batches(batch_size=1000, columns=[text_field]):
                for value in batch.column(0):
                    number += 1
                    place = f"{path}: row {number}"
                    if (text := value.as_py()) is None:
                        raise DataError(f"{place}: found no text, expected a string in column {text_field!r}")
                    yield Document(text, place)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: row {number}: found no UTF-8 ({error}), expected text; leave the row out") from None
    except (pyarrow.ArrowException, OSError) as error:
        with path.open("rb") as head:
            kind = kind_of(head.read(64))
        state = f"after row {number}: " if number else ""
        advice = f"it is {kind}" if kind != "parquet" and kind else "fetch or make it again"
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: {state}found no readable parquet ({reason}); {advice}") from None
