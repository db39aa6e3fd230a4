"""Preparing data goes on after a kill with the same bytes, one process at a time."""

import errno
import fcntl
import itertools
import json
import os
import platform
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

from data.console import STOPS
from data.prepare import main
from data.processes import pid_scope, start_ticks
from data.sets import Settings, _remove_stale, sole_writer, write_set
from data.shards import open_shard, write_shard
from tests.conftest import PATIENCE_S
from tests.data.prepared import (
    ROOT,
    byte_tokens,
    command,
    modification_times,
    patterns,
    shards_of,
    some_documents,
    write_jsonl,
)

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
    monkeypatch.setattr("data.sets.write_set", lambda *_: signal.raise_signal(stop))
    for each in STOPS:
        signal.signal(each, lambda *_: pytest.fail("taken as before"))
    assert main(["sotu", f"--out={tmp_path}"]) == 130
    signal.raise_signal(stop)  # a second one is not heard
    assert capsys.readouterr().err == "interrupted; the same command goes on from the last whole shard\n"
