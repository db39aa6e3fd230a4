"""Running data.prepare, texts for it, and what it has written."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

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


def patterns(folder: Path) -> list[str]:
    return [f"--train_files={folder}/*_train_*.bin", f"--val_files={folder}/*_val_*.bin"]
