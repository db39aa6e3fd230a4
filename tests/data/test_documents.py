"""Documents out of files of every kind, and every fault that such a file can have."""

import bz2
import gzip
import json
import lzma
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from data.documents import check_paths, read_documents, sources_fingerprint
from data.formats import interpreter
from data.shards import DataError

TEXTS = ["hello", "naïve 漢", " <|endoftext|> in it", "\ufeffnot the first", "a\x00b\r\n"]
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def fault(path: Path) -> str:
    """The line that refuses the file."""
    with pytest.raises(DataError) as error:
        check_paths([path])
        list(read_documents([path], "text"))
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("packed", PACK)
def test_packed_files_hold_what_plain_ones_do(tmp_path: Path, packed: str) -> None:
    jsonl = write(tmp_path / f"a.jsonl{packed}", PACK[packed](lines(TEXTS)))
    text = write(tmp_path / f"b.TXT{packed.upper()}", PACK[packed](b"one\r\n"))
    check_paths([jsonl, text])
    documents = list(read_documents([jsonl, text], "text"))
    assert documents == [*TEXTS, "one\r\n"]
    places = [f"{jsonl}: line {number}" for number in range(1, 6)]
    assert [document.place for document in documents] == [*places, str(text)]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_a_byte_order_mark_is_no_content(tmp_path: Path, kind: str, packed: str) -> None:
    mark = b"\xef\xbb\xbf"  # a .jsonl may be of several files put together
    content = mark + (mark + b"x" if kind == ".txt" else lines(["\ufeffx"]) + mark + lines(["y"]))
    path = write(tmp_path / f"a{kind}{packed}", PACK[packed](content))
    assert list(read_documents([path], "text")) == (["\ufeffx"] if kind == ".txt" else ["\ufeffx", "y"])


def test_end_of_text_in_a_txt_ends_a_document(tmp_path: Path) -> None:
    """As TinyStories has it. Nothing but whitespace between two is no document; without any, all of a file is one."""
    stories = write(tmp_path / "a.txt", b"<|endoftext|>one \n<|endoftext|>\ntwo<|endoftext|>\n<|endoftext|> \n")
    empty, jsonl = write(tmp_path / "b.txt", b""), write(tmp_path / "c.jsonl", lines(TEXTS))
    markers: Counter[str] = Counter()
    documents = list(read_documents([stories, empty, jsonl], "text", markers))
    assert documents == ["one \n", "\ntwo", "", *TEXTS]
    assert [document.place for document in documents[:3]] == [
        f"{stories}: document 1",
        f"{stories}: document 2",
        str(empty),
    ]
    assert markers == {"ends": 4, "documents": 2, "text": 1}


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["cut", "empty", "plain", "flipped"])
def test_damaged_packed_files(tmp_path: Path, packed: str, damage: str) -> None:
    whole = bytearray(PACK[packed](lines([str(number) * 9 for number in range(9999)])))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    content = {"cut": whole[: len(whole) // 2], "empty": b"", "plain": lines(TEXTS), "flipped": flipped}[damage]
    message = fault_of_set(tmp_path, f"a.jsonl{packed}", bytes(content))
    if damage == "flipped":  # may show first in the text that comes out
        assert re.search("byte|line", message)
        return
    advice = "it is not packed: rename it to .*/a.jsonl$" if damage == "plain" else "fetch or make"
    assert re.match(rf"byte \d+ of the text: found .*, expected a whole (gzip|bzip2|xz) file; {advice}", message)


def test_a_file_packed_otherwise_is_named(tmp_path: Path) -> None:
    message = fault(write(tmp_path / "a.txt.gz", lzma.compress(b"x")))
    assert message.endswith(f"it is packed by xz: rename it to {tmp_path}/a.txt.xz")


def fault_of_set(folder: Path, name: str, content: bytes) -> str:
    """As `fault`, of a file that is not the only one: no file is empty by itself."""
    write(folder / "good.txt", b"good")
    path = write(folder / name, content)
    check_paths([folder / "good.txt", path])
    with pytest.raises(DataError) as error:
        list(read_documents([folder / "good.txt", path], "text"))
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-32", "latin-1", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]
)
def test_other_encodings_are_named_and_the_advice_works(tmp_path: Path, name: str, encoding: str) -> None:
    text = lines(["é"]).decode() if "jsonl" in name else "é"
    folder = tmp_path / "a folder"
    folder.mkdir()
    message = fault(write(folder / name, PACK[Path(name).suffix if name.endswith("gz") else ""](text.encode(encoding))))
    known = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    assert {"latin-1": "if it is LATIN1"}.get(encoding, f"it is {known}") in message
    subprocess.run(["bash", "-c", message[message.index("mkdir -p") :]], check=True)
    (converted,) = (folder / "converted").iterdir()
    check_paths([converted])
    assert list(read_documents([converted], "text")) == ["é"]


@pytest.mark.parametrize("text", ["hello, world\n", "это просто текст, в нём только кириллица\n"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_that_could_be_utf_8_is_named(tmp_path: Path, encoding: str, text: str) -> None:
    message = fault(write(tmp_path / "a.txt", text.encode(encoding)))
    assert "NUL bytes in the first" in message
    assert f"| iconv -f UTF-16{encoding[-2:].upper()} -t UTF-8" in message


def test_a_few_nul_bytes_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"some text, then a NUL: \0 and on\n" * 9)
    assert list(read_documents([path], "text")) == ["some text, then a NUL: \0 and on\n" * 9]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", gzip.compress(b"x"), "byte 1: found 0x8b, expected UTF-8; it is packed by gzip: mkdir -p"),
        ("a.txt", b"PAR1\xff", "it is a parquet file: mkdir"),
        ("a.txt", b"PK\x03\x04\xff", "it is a zip archive"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer; git lfs pull"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\n",
            "line 1: found no text, expected some; it is a Git",
        ),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        ("a.parquet", b"", "found an empty file"),
        ("a.txt", b"", "found an empty file"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 200_000, "line 2: found invalid JSON (maximum recursion"),
        ("a.jsonl", b'\n{"text": "a"}\n{"text": null}\n', "line 3: 'text': found null, expected a string; leave"),
        ("a.jsonl", b'{"text": ["a"]}\n', "line 1: 'text': found a list, expected a string"),
        ("a.jsonl", b'"a"\n', "line 1: found a str, expected a string in field 'text'"),
        ("a.jsonl", b"[1]\n", "line 1: found a list, expected a string in field 'text'; make each line an object"),
        ("a.jsonl", b"\x00\x00\n", "line 1: found 2 NUL bytes in the first 3, expected UTF-8; it holds zeros"),
        (
            "a.jsonl",
            b'{"text": "a"}\n' + bytes(99),
            "line 2: found 99 NUL bytes in the first 99, expected UTF-8; it ho",
        ),
        ("a.txt", b"text, and then" + bytes(4096), "expected UTF-8; it holds zeros, as a crash leaves them; fetch or"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: byte 10: found 0xff, expected UTF-8"),
        (
            "a.jsonl",
            json.dumps({f"field {n}": 0 for n in range(999)}).encode(),
            "line 1: found fields field 0, field 1",
        ),
        ("a.csv", b"text\na\n", "found suffix '.csv', expected .txt, .jsonl or .parquet, the first two maybe with .gz"),
        ("a.txt.zst", b"", "; zstd -d "),
        ("a.tar.gz", b"", "; tar -xf "),
        ("a.csv.gz", b"", "; gzip -dc "),
        ("a.gz", b"", "rename it, for example to "),
        ("a", b"x", "if it is plain text, rename it to "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_file_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    message = fault(write(tmp_path / name, content))
    assert words in message and len(message) < 600


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_advice_for_tables_works(tmp_path: Path, kind: str) -> None:
    content = "id,text\n1,hello\n" if kind == "csv" else '[{"text": "hello"}]'
    message = fault(write(tmp_path / f"a b.{kind}", content.encode()))
    command = message[message.index(f"{interpreter()} -c") :]
    subprocess.run(["bash", "-c", command], check=True, env={})
    (made,) = set(tmp_path.iterdir()) - {tmp_path / f"a b.{kind}"}
    assert list(read_documents([made], "text")) == ["hello"]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    for name, files in (("a.txt", "*.txt"), ("texts", "*")):
        (tmp_path / name).mkdir()
        advice = f"found a folder, expected a file; name the files in it: {tmp_path / name}/{files}"
        assert fault(tmp_path / name) == advice
    assert fault(tmp_path / "gone").startswith("found no such file, expected a file")
    os.mkfifo(tmp_path / "pipe")
    assert fault(tmp_path / "pipe").startswith("found neither a file nor a folder")


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_strings_of_every_arrow_type_are_text(tmp_path: Path, kind: str) -> None:
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.array(["a", "b", "a"])
    if kind != "dictionary":
        text = text.cast(
            {"string": pyarrow.string, "large_string": pyarrow.large_string}.get(kind, pyarrow.string_view)()
        )
    else:
        text = text.dictionary_encode()
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    assert list(read_documents([tmp_path / "a.parquet"], "text")) == ["a", "b", "a"]


def test_a_bad_row_of_a_parquet_is_named(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    offsets, content = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")
    parquet.write_table(pyarrow.table({"text": pyarrow.StringArray.from_buffers(2, offsets, content)}), path)
    assert fault(path).startswith("row 2: found no UTF-8")
    parquet.write_table(
        pyarrow.table({"text": [str(number) * 99 for number in range(3000)]}), path, row_group_size=1000
    )
    whole = bytearray(path.read_bytes())
    assert "found no readable parquet" in fault(write(path, bytes(whole[: len(whole) // 2])))
    for position in range(len(whole) // 2, len(whole) - 2000, 7):
        whole[position] ^= 255
    assert re.match(r"(after row \d+: )?found no readable parquet", fault(write(path, bytes(whole))))


def test_names_that_are_no_utf8_have_fingerprints_too(tmp_path: Path) -> None:
    one, other = (write(tmp_path / name, b"x") for name in ("a.txt", "a\udce9.txt"))
    assert sources_fingerprint([one], "text") != sources_fingerprint([other], "text")
