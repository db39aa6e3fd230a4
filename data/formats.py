"""Files of other kinds: what one is by its first bytes, and how to come from it to what is read here. A leaf.

The commands that are given run in the repository's root and leave the file itself as it is.
"""

import codecs
import os
import shlex
import sys
import unicodedata
from pathlib import Path

UNPACK = {"gzip": "gzip -dc", "bzip2": "bzip2 -dc", "xz": "xz -dc", "zstd": "zstd -dc"}
ZEROS = "zeros"
LFS = "a Git LFS pointer"
NPY = "a .npy array"
SIGNATURES = {
    b"\x1f\x8b\x08": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PAR1": "parquet",
    b"PK\x03\x04": "a zip archive, as torch.save and numpy.savez also write",
    b"\x93NUMPY": NPY,
    b"MMIDIDX": "the index of a Megatron set, whose tokens are in the .bin of that name",
    b"%PDF": "a PDF",
    b"version https://git-lfs": LFS,
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"<?xml": "an XML message",
}
LLM_C = {  # by the first int32
    20240326: "a model of llm.c",
    20240328: "a tokenizer of llm.c",
    20240522: "multiple-choice questions of llm.c",
}
LLM_C_32_BIT = 20240801
MEGATRON_TYPES = {1: "u1", 4: "<i4", 5: "<i8", 8: "<u2"}  # the code of the tokens' type in an index
MAKE_AGAIN = "the data.prepare command that made it will make it again; one from elsewhere has to be fetched again"


def interpreter() -> str:
    """The Python that runs this, for a command in the current folder: it has the packages, others may not."""
    path = sys.executable
    return shlex.quote(os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path)


def is_text(head: bytes) -> bool:
    """Whether these first bytes, maybe cut within a character, are those of UTF-8 text without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character in "\t\n\r" or unicodedata.category(character) != "Cc" for character in text)


def kind_of(head: bytes) -> str:
    """What the file is that begins with `head`; "" if nothing tells."""
    if head.lstrip().startswith(b"<"):
        head = head.lstrip().lower()
    return next((kind for start, kind in SIGNATURES.items() if head.startswith(start)), "")


def kind_by_zeros(head: bytes) -> str:
    """What a text file is that begins with `head` and holds many NUL bytes: zeros, or an encoding of characters of 2 or
    4 bytes; "" if they are few."""
    if bytes(8) in head or (0 in head and not head.strip(b"\0\r\n")):
        return ZEROS
    if head.count(0) * 20 < len(head) or not head:
        return ""
    width = 4 if head.count(bytes(2)) * 8 >= len(head) else 2
    is_little = head[width - 1 :: width].count(0) > head[::width].count(0)
    return f"UTF-{8 * width}{'LE' if is_little else 'BE'}"


def text_advice(path: Path, head: bytes, show: str) -> str:
    """What `path`, which is no UTF-8 text, looks like, and how to make one of it. `show` is the command that prints
    its bytes, of which `head` are the first."""
    kind = kind_of(head) or kind_by_zeros(head)
    if kind == ZEROS:
        return "it holds zeros, as a crash leaves them; fetch or make it again"
    if kind in UNPACK:
        return f"it is packed by {kind}: {_into(path, UNPACK[kind], path)}"
    if kind == "parquet":
        return f"it is a parquet file: {_into(path.with_suffix('.parquet'), 'cat', path)}"
    if kind == LFS:
        return f"it is {LFS}; git lfs pull fetches the file itself"
    if kind and not kind.startswith("UTF"):
        return f"it is {kind}; give the text in it"
    name = path if show == "cat" else path.with_suffix("")  # shown, it is no longer packed
    encoding, state = kind or "LATIN1", "it is" if kind_of(head) else "if it is"
    return f"{state} {encoding}: {_into(name, show, path, f' | iconv -f {encoding} -t UTF-8')}"


def shard_advice(path: Path, magic: int) -> str:
    """What `path`, no whole shard, looks like, and how to come to one. A shard begins with the int32 `magic`."""
    with path.open("rb") as file:
        head = file.read(64)
    kind, found = kind_of(head), int.from_bytes(head[:4], "little")
    if found == magic or not any(head):  # empty, or zeros, as a crash leaves
        return MAKE_AGAIN
    if int.from_bytes(head[:4], "big") == magic:
        return f"it is big-endian: {_converted(path, '>u2', 1024)}"
    if found == LLM_C_32_BIT:
        return f"it is in llm.c's format for 32-bit tokens (Llama 3): {_converted(path, '<u4', 1024)}"
    if kind in UNPACK:
        return f"it is packed by {kind}: {_into(path, UNPACK[kind], path)}"
    if kind == NPY:
        return f"it is {NPY}: {_converted(path, load='numpy.load(sys.argv[1]).ravel()')}"
    if kind == "parquet":
        return f"it is a parquet file, for data.prepare to tokenize: {_into(path.with_suffix('.parquet'), 'cat', path)}"
    if kind == LFS:
        return f"it is {LFS}; git lfs pull fetches the file itself"
    if kind in ("an HTML page", "an XML message"):
        return f"it is {kind}, a server's answer in place of the file; fetch the file again"
    if kind or found in LLM_C:
        return f"it is {kind or LLM_C[found]}; correct the pattern"
    if dtype := _megatron_type(path.with_suffix(".idx")):
        return f"it is of a Megatron set: {_converted(path, dtype)}"
    if is_text(head):
        return f"it is text, for data.prepare to tokenize: {_into(path.with_suffix('.txt'), 'cat', path)}"
    is_wide = max(head[2::4], default=0) < 4 and not any(head[3::4])  # the upper halves of ids below 2**18
    dtype, words = ("<u4", "uint32") if is_wide else ("<u2", "uint16")
    if path.stat().st_size % int(dtype[2:]):
        return MAKE_AGAIN
    alone = f"if it is {words} token ids alone, as nanoGPT writes them"
    return f"{alone}: {_converted(path, dtype)}; otherwise {MAKE_AGAIN}"


def _megatron_type(index: Path) -> str:
    """The numpy type of the tokens that a Megatron index is of; "" if it is none."""
    if not index.is_file():
        return ""
    with index.open("rb") as file:
        head = file.read(18)  # a magic of 9 bytes, the version in 8, the type
    return MEGATRON_TYPES.get(head[17], "") if len(head) == 18 and kind_of(head) else ""


def _converted(path: Path, dtype: str = "", offset: int = 0, load: str = "") -> str:
    """The command that makes a shard of the tokens in `path`."""
    load = load or f"numpy.fromfile(sys.argv[1], '{dtype}', offset={offset})"
    code = f"import sys, numpy; from data.shards import write_shard; write_shard(sys.argv[2], {load})"
    limit = "" if dtype[-2:] in ("u1", "u2") else " (ids above 65535 cannot be converted: tokenize the text anew)"
    return _into(path, f'{interpreter()} -c "{code}"', path, to=" ") + limit


def _into(target: Path, command: str, path: Path, pipe: str = "", to: str = " > ") -> str:
    """The command on `path`, its output under the name of `target` in the folder `converted`."""
    folder = path.parent / "converted"
    words = [shlex.quote(str(each)) for each in (folder, path, folder / target.name)]
    return f"mkdir -p {words[0]} && {command} {words[1]}{pipe}{to}{words[2]}"
