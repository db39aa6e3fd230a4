"""Text files as shards: bytes against a naive tokenization, and every refusal."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from data.prepare import main
from data.shards import open_shard
from data.tokenizer import get_tokenizer
from tests.data.prepared import byte_tokens, modification_times, run, shards_of, some_documents, write_jsonl


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "all three"])
def test_files_of_each_kind(tmp_path: Path, kind: str) -> None:
    import pyarrow
    from pyarrow import parquet

    documents = [text + "\r\n" for text in some_documents(60)]
    for number, text in enumerate(documents[:20]):
        (tmp_path / f"{number:02}.txt").write_bytes(text.encode())
    jsonl = write_jsonl(tmp_path / "a.jsonl", documents[20:40], field="body")
    jsonl.write_text(jsonl.read_text(encoding="utf-8") + "\n  \n", encoding="utf-8")  # blank lines are no documents
    parquet.write_table(pyarrow.table({"n": range(20), "body": documents[40:]}), tmp_path / "b.parquet")
    paths, expected = {
        "txt": (sorted(tmp_path.glob("*.txt")), documents[:20]),
        "jsonl": ([jsonl], documents[20:40]),
        "parquet": ([tmp_path / "b.parquet"], documents[40:]),
        "all three": ([*sorted(tmp_path.glob("*.txt")), jsonl, tmp_path / "b.parquet"], documents),
    }[kind]
    options = ["--encoding=byte", "--text_field=body", "--val_tokens=1000", "--shard_tokens=700", "--name=x"]
    assert main(["files", *map(str, paths), f"--out={tmp_path / 'out'}", *options]) == 0
    tokens, cuts = byte_tokens(expected), range(1000, len(byte_tokens(expected)), 700)
    names = ["x_val_000000.bin", *(f"x_train_{index + 1:06d}.bin" for index in range(len(cuts)))]
    assert list(shards_of(tmp_path / "out")) == sorted(names)
    for name, part in zip(names, np.split(tokens, cuts), strict=True):
        np.testing.assert_array_equal(open_shard(tmp_path / "out" / name), part)


def test_gpt2_on_all_cores_is_encode_ordinary(tmp_path: Path, gpt2_vocabulary: Path) -> None:
    documents = some_documents(3000)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    assert main(["files", str(source), f"--out={tmp_path / 'out'}", "--val_tokens=99", "--shard_tokens=50000"]) == 0
    encoding = get_tokenizer("gpt2")
    expected = [token for text in documents for token in (50256, *encoding.encode_ordinary(text))]
    shards = [tmp_path / "out" / "out_val_000000.bin", *sorted(tmp_path.glob("out/out_train_*.bin"))]
    assert len(shards) > 3
    np.testing.assert_array_equal(np.concatenate([open_shard(path) for path in shards]), expected)


def bad_files(folder: Path) -> dict[str, tuple[list[object], str]]:
    """Arguments that `files` has to refuse, and what it has to say."""
    import pyarrow
    from pyarrow import parquet

    good = write_jsonl(folder / "good.jsonl", some_documents(50))
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "a.csv").write_text("text\na\n", encoding="utf-8")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    (folder / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (folder / "list.jsonl").write_text('{"text": "a"}\n\n["b"]\n', encoding="utf-8")
    (folder / "number.jsonl").write_text('{"id": 1, "text": 5}\n', encoding="utf-8")
    (folder / "not.parquet").write_text("PAR", encoding="utf-8")
    parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["a", None]}), folder / "holes.parquet")
    return {
        "no path": ([], "files: found no path, expected at least one"),
        "missing": ([folder / "gone.txt"], f"{folder}/gone.txt: found no such file"),
        "suffix": ([folder / "a.csv"], f"{folder}/a.csv: found suffix '.csv', expected .txt, .jsonl or .parquet"),
        "not utf-8": ([folder / "latin.txt"], f"{folder}/latin.txt: byte 3: found 0xe9, expected UTF-8"),
        "broken json": ([folder / "broken.jsonl"], f"{folder}/broken.jsonl: line 2: found invalid JSON"),
        "json not utf-8": ([folder / "latin.jsonl"], f"{folder}/latin.jsonl: line 1: byte 13: found 0xe9"),
        "no object": ([folder / "list.jsonl"], "line 3: found a list, expected a string in field 'text'"),
        "no string": ([folder / "number.jsonl"], "line 1: 'text': found a int, expected a string; leave the line out"),
        "no field": ([good, "--text_field=body"], "line 1: found fields id, text, expected a string in field 'body'"),
        "no parquet": ([folder / "not.parquet"], f"{folder}/not.parquet: found no readable parquet"),
        "no column": (
            [folder / "holes.parquet"],
            "found columns id (int64), body (string), expected a string column 'text'",
        ),
        "not a string": ([folder / "holes.parquet", "--text_field=id"], "expected a string column 'id'"),
        "null": ([folder / "holes.parquet", "--text_field=body"], "row 2: found no text"),
        "too short": ([good, "--val_tokens=1000000"], "--val_tokens: found 1000000, expected less than the "),
        "zero": ([good, "--val_tokens=0"], "--val_tokens: found 0, expected 1 to 2147483647"),
        "too large": (
            [good, "--shard_tokens=2147483648"],
            "--shard_tokens: found 2147483648, expected 1 to 2147483647",
        ),
    }


@pytest.mark.parametrize(
    "fault",
    [
        "no path",
        "missing",
        "suffix",
        "not utf-8",
        "broken json",
        "json not utf-8",
        "no object",
        "no string",
        "no field",
        "no parquet",
        "no column",
        "not a string",
        "null",
        "too short",
        "zero",
        "too large",
    ],
)
def test_bad_input_is_one_line_and_leaves_no_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    arguments, message = bad_files(tmp_path)[fault]
    out = tmp_path / "out"
    assert main(["files", *map(str, arguments), f"--out={out}", "--encoding=byte"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(out.glob("*.bin*"))
    good = tmp_path / "good.jsonl"  # and the folder is as good as new
    assert main(["files", str(good), f"--out={out}", "--encoding=byte", "--val_tokens=1000"]) == 0


def test_packed_text_goes_on_where_it_stopped(tmp_path: Path) -> None:
    documents = some_documents(200)
    plain = write_jsonl(tmp_path / "a.jsonl", documents)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    options = ["--encoding=byte", "--name=x", "--val_tokens=1000", "--shard_tokens=999"]
    assert main(["files", str(plain), f"--out={tmp_path / 'plain'}", *options]) == 0
    arguments = ["files", str(packed), f"--out={tmp_path / 'packed'}", *options]
    assert main(arguments) == 0
    assert shards_of(tmp_path / "packed") == shards_of(tmp_path / "plain")
    kept = modification_times(tmp_path / "packed")
    (tmp_path / "packed" / "x_train_000009.bin").unlink()
    assert main(arguments) == 0
    assert shards_of(tmp_path / "packed") == shards_of(tmp_path / "plain")
    assert all(modification_times(tmp_path / "packed")[path] == kept[path] for path in sorted(kept)[:8])


def test_end_of_text_in_the_text_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one<|endoftext|>two<|endoftext|>three<|endoftext|>\n", encoding="utf-8")
    jsonl = write_jsonl(tmp_path / "b.jsonl", ["four<|endoftext|>"])
    arguments = [f"--out={tmp_path / 'out'}", "--encoding=byte", "--val_tokens=4"]
    assert main(["files", str(tmp_path / "a.txt"), str(jsonl), *arguments]) == 0
    said = capsys.readouterr().out
    assert "written 3 times in .txt files: taken as the end of a document, which makes 3 documents" in said
    assert "written 1 times in other documents: taken as text like any other" in said
    expected = byte_tokens(["one", "two", "three", "four<|endoftext|>"])
    paths = [tmp_path / "out" / name for name in ("out_val_000000.bin", "out_train_000001.bin")]
    np.testing.assert_array_equal(np.concatenate([open_shard(path) for path in paths]), expected)


def test_paths_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "my run[1]"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", some_documents(50))
    arguments = ["files", "~/my run[1]/a.jsonl", "--out=~/my run[1]", "--encoding=byte", "--val_tokens=100"]
    assert main(arguments) == 0
    names = ["--train_files=~/my run[1]/my run[1]_train_*.bin", "--val_files=~/my run[1]/my run[1]_val_*.bin"]
    assert main(["ensure", *names]) == 0
    assert main([*arguments, "--name=../x"]) == 2
    assert "--name: found '../x', expected no folder in it; 'x' works" in capsys.readouterr().err


def test_text_of_exactly_val_tokens_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("x" * 99, encoding="utf-8")
    arguments = ["files", str(tmp_path / "a.txt"), f"--out={tmp_path / 'out'}", "--encoding=byte"]
    assert main([*arguments, "--val_tokens=100"]) == 2
    assert "found 100, expected less than the 100 tokens of the text; 10 works" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.bin*"))
    assert main([*arguments, "--val_tokens=99"]) == 0


def test_refusal_from_the_shell_has_no_traceback(tmp_path: Path) -> None:
    result = run("files", tmp_path / "gone.txt", f"--out={tmp_path}")
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path}/gone.txt: found no such file, expected a file to read; check the path\n"
