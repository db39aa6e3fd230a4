"""Enters the fingerprint of a published validation shard into tracks.toml, once the shard is known to be that one.

The first tokens of a file say little: what tells that a shard is the published one is the sha256 of all of it. The
Hugging Face Hub publishes that of every large file; without a network its page of the file shows it to whoever has one.
"""

import hashlib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from data.files import whole_file
from data.prepare import FINEWEB_SHARD_TOKENS, hub_token
from data.shards import HEADER_BYTES, TOKEN_BYTES, check_tokens, head_fingerprint, open_shard
from data.tokenizer import end_of_text, vocab_size
from leaderboard import tracks
from leaderboard.tracks import Track, find_track, load_tracks

SHARD_TOKENS = FINEWEB_SHARD_TOKENS  # of the published validation shard


def enter_fingerprint(track_name: str, shard: Path, sha256: str = "") -> list[str]:
    """Enter the fingerprint of the validation tokens in `shard` for the track and for all others of the same published
    file and val_tokens that have none. Returns what to tell the user; raises ValueError, and writes nothing, where the
    shard is another than the published one, cannot be compared with it, or a track has another fingerprint.

    sha256: what is published, by the user's own look; default: the Hub is asked.
    """
    track = find_track(track_name)
    if not track.val_source:
        raise ValueError(f"track {track_name} names no published file (val_source); fineweb-3.28 does")
    if sha256 and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"sha256 = {sha256[:80]!r} must be 64 digits 0-9a-f, as on {_page(track.val_source)}")
    found = _check_shard(shard, track)
    alike = [each for each in load_tracks().values()
             if (each.val_source, each.val_tokens) == (track.val_source, track.val_tokens)]  # fmt: skip
    for each in alike:
        if each.val_fingerprint not in ("", found):
            known = f"track {each.name} has val_fingerprint {each.val_fingerprint}"
            raise ValueError(f"{known}, and {shard} has {found}; use the shard that the track's records were made with")
    missing = [each.name for each in alike if not each.val_fingerprint]
    if not missing:
        return [f"nothing to do: val_fingerprint = {found} is entered for {', '.join(each.name for each in alike)}"]
    from huggingface_hub import constants

    with shard.open("rb") as file:
        has = hashlib.file_digest(file, "sha256").hexdigest()
    source = "as --sha256 says" if sha256 else f"as {_page(track.val_source, constants.ENDPOINT)} says"
    published = sha256 or _published_sha256(track.val_source, f"{shard} (fingerprint {found}, sha256 {has})")
    if has != published:
        instead = "move it away and fetch that one: .venv/bin/python -m data.prepare fineweb --shards 1"
        raise ValueError(f"{shard} has sha256 {has}, and the published file {published}, {source}; {instead}")
    _write(missing, found, f"sha256 of the shard: {has}")
    told = [f"{name}: val_fingerprint = {found}, entered in {tracks.TRACKS}" for name in missing]
    return [f"{shard} is the published file: sha256 {has}, {source}", *told]


def _check_shard(shard: Path, track: Track) -> str:
    """The fingerprint that the trainer logs for these validation tokens. Raises ValueError for what is wrong by any
    look that needs no network."""
    tokens = open_shard(shard)  # header, version, and the size that the header says
    if len(tokens) != SHARD_TOKENS:
        size = HEADER_BYTES + TOKEN_BYTES * SHARD_TOKENS
        expected = f"the published shard has {SHARD_TOKENS:,}, in a file of {size:,} bytes"
        raise ValueError(f"{shard} has {len(tokens):,} tokens; {expected}")
    if tokens[0] != end_of_text(track.tokenizer):
        begins = f"<|endoftext|> ({end_of_text(track.tokenizer)}) in the published shard"
        raise ValueError(f"{shard} begins with token {tokens[0]}, which is {begins}")
    check_tokens(tokens, vocab_size(track.tokenizer), shard)
    return head_fingerprint([tokens], track.val_tokens)


def _published_sha256(source: str, shard: str) -> str:
    """What the Hub says of the file. Raises ValueError where it cannot be asked, naming the shard."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile

    repository, _, name = source.rpartition("/")
    try:
        files = HfApi(token=hub_token()).get_paths_info(repository, [name], repo_type="dataset")
        (sha256,) = [file.lfs.sha256 for file in files if isinstance(file, RepoFile) and file.lfs] or [""]
    except Exception as error:  # the client's errors have no common class
        sha256, why = "", str(error).splitlines()[0] if str(error) else type(error).__name__
    else:
        why = f"{constants.ENDPOINT} tells no sha256 of {source}"
    if not sha256:
        raise ValueError(
            f"{shard} cannot be compared with what is published ({why}); nothing is entered: connect to a network, or "
            f"add --sha256=... as it stands on {_page(source)}"
        )
    return sha256


def _page(source: str, endpoint: str = "https://huggingface.co") -> str:
    repository, _, name = source.rpartition("/")
    return f"{endpoint}/datasets/{repository}/blob/main/{name}"


def _write(names: Sequence[str], fingerprint: str, comment: str) -> None:
    """Fill in the line `val_fingerprint = ""` of these sections of tracks.toml, and change nothing else in it."""
    text = before = tracks.TRACKS.read_text(encoding="utf-8-sig")
    for name in names:
        section = rf'^\["?{re.escape(name)}"?\][^\n]*\n(?:(?!\[)[^\n]*\n)*?val_fingerprint = '
        text = re.sub(rf'({section})""[^\n]*', rf'\g<1>"{fingerprint}"  # {comment}', text, flags=re.M)
    expected = tomllib.loads(before)
    for name in names:
        expected[name]["val_fingerprint"] = fingerprint
    if tomllib.loads(text) != expected:
        raise ValueError(f'{tracks.TRACKS} has no line val_fingerprint = "" for each of {", ".join(names)}; enter '
                         f'"{fingerprint}" by hand')  # fmt: skip
    with whole_file(tracks.TRACKS) as file:
        file.write(text)
    tracks._load.cache_clear()
