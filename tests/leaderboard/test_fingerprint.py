"""The published validation shard's fingerprint: entered once it is known to be that shard, refused otherwise."""

import hashlib
import re
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import leaderboard.__main__ as cli
from data.shards import head_fingerprint, open_shard, write_shard
from leaderboard import fingerprint, tracks
from tests.data.hub import Hub, info, serve

NAME = "fineweb_val_000000.bin"
TOKENS = 2000  # of the published shard in these tests
VAL_TOKENS = 1500


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    tokens = np.arange(TOKENS) * 17 % 50257
    tokens[0] = 50256
    write_shard(tmp_path / NAME, tokens)
    return tmp_path / NAME


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tracks.toml as it is in the repository but for the number of validation tokens, and no fingerprint."""
    path = tmp_path / "tracks.toml"
    text = tracks.TRACKS.read_text(encoding="utf-8")
    text = re.sub(r"(?<=\n)(val_source = .*\nval_fingerprint = ).*", r'\1""', text)
    path.write_text(text.replace("10485760", str(VAL_TOKENS)), encoding="utf-8")
    monkeypatch.setattr(tracks, "TRACKS", path)
    monkeypatch.setattr(fingerprint, "SHARD_TOKENS", TOKENS)
    return path


@pytest.fixture
def hub(shard: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Publishes that very shard."""
    with serve({NAME: shard.read_bytes()}) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        yield server


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # without listening: connections are refused
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        yield


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refused(capsys: pytest.CaptureFixture[str], table: Path, *arguments: object) -> str:
    """What the command says on a shard that it does not take."""
    before = table.read_bytes()
    capsys.readouterr()
    assert cli.main(["fingerprint", *map(str, arguments)]) == 2
    assert table.read_bytes() == before
    told = capsys.readouterr()
    assert not told.out and len(told.err.splitlines()) == 1
    return told.err


def test_it_is_entered_for_all_tracks_of_the_same_tokens(
    table: Path, shard: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    before = table.read_text(encoding="utf-8")
    assert cli.main(["fingerprint", "fineweb-3.28", str(shard)]) == 0
    expected = head_fingerprint([open_shard(shard)[:VAL_TOKENS]], VAL_TOKENS)
    names = [name for name, track in tracks.load_tracks().items() if track.val_source]
    assert {"fineweb-3.28", "fineweb-2.92"} <= {*names}
    assert all(tracks.find_track(name).val_fingerprint == expected for name in names)
    out = capsys.readouterr().out
    assert (
        f"is the published file: sha256 {sha256(shard)}, as {hub.url}/datasets/kjj0/fineweb10B-gpt2/blob/main/{NAME}"
        in out
    )
    assert all(f"{name}: val_fingerprint = {expected}" in out for name in names)

    # One line of each section is another one, and says which file it is of
    after = table.read_text(encoding="utf-8")
    changed = [(one, other) for one, other in zip(before.splitlines(), after.splitlines(), strict=True) if one != other]
    assert changed == [
        ('val_fingerprint = ""', f'val_fingerprint = "{expected}"  # sha256 of the shard: {sha256(shard)}')
    ] * len(names)
    assert cli.main(["fingerprint", "fineweb-2.92", str(shard)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert table.read_text(encoding="utf-8") == after


def test_tracks_of_other_tokens_stay(table: Path, shard: Path, hub: Hub) -> None:
    text = table.read_text(encoding="utf-8").replace(f"val_tokens = {VAL_TOKENS}", "val_tokens = 99", 1)
    table.write_text(text, encoding="utf-8")
    assert cli.main(["fingerprint", "fineweb-2.92", str(shard)]) == 0
    found = {name: track.val_fingerprint for name, track in tracks.load_tracks().items()}
    assert not found["fineweb-3.28"] and found["fineweb-2.92"]


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (np.full(TOKENS + 1, 50256), "has 2,001 tokens; the published shard has 2,000, in a file of 5,024 bytes"),
        (np.arange(TOKENS), "begins with token 0, which is <|endoftext|> (50256) in the published shard"),
        (np.arange(50256, 50256 + TOKENS), "token 1: found 50257, expected less than vocab_size 50257"),
    ],
    ids=["length", "first", "vocabulary"],
)
def test_what_is_no_such_shard(
    table: Path, shard: Path, hub: Hub, capsys: pytest.CaptureFixture[str], tokens: np.ndarray, reason: str
) -> None:
    write_shard(shard, tokens)
    assert reason in refused(capsys, table, "fineweb-3.28", shard, f"--sha256={sha256(shard)}")


def test_what_is_no_shard_at_all(table: Path, shard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard.write_bytes(shard.read_bytes()[:-2])
    assert "size (truncated): found 1999 tokens, expected 2000" in refused(capsys, table, "fineweb-3.28", shard)
    shard.unlink()
    assert "found no such file" in refused(capsys, table, "fineweb-3.28", shard)


def test_one_token_that_differs_behind_the_validation_tokens(
    table: Path, shard: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = open_shard(shard).copy()
    tokens[-1] ^= 1
    write_shard(shard, tokens)
    told = refused(capsys, table, "fineweb-3.28", shard)
    assert f"has sha256 {sha256(shard)}, and the published file {info(NAME, hub.files[NAME])['lfs']['oid']}" in told  # type: ignore[index]
    assert "data.prepare fineweb --shards 1" in told


@pytest.mark.parametrize("why", ["no answer", "no such file", "no sha256", "status 503"])
def test_a_hub_that_cannot_tell(
    table: Path, shard: Path, hub: Hub, no_hub: None, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, why: str,
) -> None:  # fmt: skip
    """What was found is told all the same, and what to do."""
    if why != "no answer":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    if why == "no such file":
        hub.files.clear()
    elif why == "no sha256":
        monkeypatch.setattr("tests.data.hub.info", lambda name, data: info(name, data) | {"lfs": None})
    elif why == "status 503":
        hub.status = 503
    told = refused(capsys, table, "fineweb-3.28", shard)
    expected = head_fingerprint([open_shard(shard)], VAL_TOKENS)
    assert f"(fingerprint {expected}, sha256 {sha256(shard)}) cannot be compared with what is published" in told
    assert (
        f"add --sha256=... as it stands on https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/blob/main/{NAME}"
        in told
    )


def test_without_a_network_the_users_own_look_tells(
    table: Path, shard: Path, no_hub: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "must be 64 digits 0-9a-f" in refused(capsys, table, "fineweb-3.28", shard, "--sha256=ABC")
    other = "0" * 64
    assert f"the published file {other}, as --sha256 says" in refused(
        capsys, table, "fineweb-3.28", shard, f"--sha256={other}"
    )
    assert cli.main(["fingerprint", "fineweb-3.28", str(shard), f"--sha256={sha256(shard)}"]) == 0
    assert tracks.find_track("fineweb-3.28").val_fingerprint


def test_another_fingerprint_is_not_replaced(
    table: Path, shard: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    text = table.read_text(encoding="utf-8").replace('val_fingerprint = ""', 'val_fingerprint = "0123456789abcdef"', 1)
    table.write_text(text, encoding="utf-8")
    found = head_fingerprint([open_shard(shard)], VAL_TOKENS)
    for track in ("fineweb-3.28", "fineweb-2.92"):
        told = refused(capsys, table, track, shard)
        assert f"track fineweb-3.28 has val_fingerprint 0123456789abcdef, and {shard} has {found}" in told


def test_tracks_that_it_is_not_for(table: Path, shard: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert "track sotu-byte names no published file" in refused(capsys, table, "sotu-byte", shard)
    assert "track 'fineweb' is not one of" in refused(capsys, table, "fineweb", shard)


def test_a_line_in_another_form_is_left_to_its_author(
    table: Path, shard: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    text = table.read_text(encoding="utf-8").replace('val_fingerprint = ""', "val_fingerprint = ''", 1)
    table.write_text(text, encoding="utf-8")
    tomllib.loads(text)
    told = refused(capsys, table, "fineweb-3.28", shard)
    assert 'has no line val_fingerprint = "" for each of fineweb-3.28' in told and "by hand" in told
