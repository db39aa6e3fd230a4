"""Text from a trained model.

    ./run.sh sample runs/<the run's directory>                              (asks for prompts where there is a terminal)
    ./run.sh sample runs/<the run's directory> --prompt="Fellow citizens" --tokens=400 --temperature=0.7 --top_p=0.9
    ./run.sh sample runs/<the run's directory>/checkpoint_000500.pt --count=3 --seed=7
    ./run.sh sample my_model                                                               (a folder of ./run.sh export)

A run must have written a checkpoint (--checkpoint_every=N; one at the end comes with it). Without a prompt a text
begins as a document does. It ends after --tokens, or where the model ends the document.
"""

import codecs
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from data import console
from data.files import user_text
from data.tokenizer import end_of_text, get_tokenizer
from harness.settings import parse_settings
from inference.generate import Sampling, generate
from inference.load import Loaded, check_writes_text, load
from model import GPT


@dataclass(frozen=True)
class Options:
    run: str = ""  # run directory, checkpoint or export; comes first
    prompt: str = ""  # text to go on from; empty: the beginning of a document, in a terminal what is typed
    tokens: Annotated[int, ">= 1"] = 200  # at most
    temperature: Annotated[float, ">= 0"] = 0.8  # lower is safer; 0: always the likeliest token
    top_k: Annotated[int, ">= 0"] = 0  # draw from so many likeliest tokens; 0: from all
    top_p: Annotated[float, "> 0", "<= 1"] = 1.0  # draw from the fewest likeliest tokens of this total probability
    seed: Annotated[int, ">= 0", "< 9e18"] = 0  # of the first text; the next ones count on
    count: Annotated[int, ">= 1"] = 1  # texts
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of matrix products


def sample_text(model: GPT, tokenizer: str, seed: int) -> str:
    """The beginning of a document, about 200 characters on one line. Raises DataError without the tokenizer's files."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [*generate(model, [end_of_text(tokenizer)], 200 if tokenizer == "byte" else 60, generator)]
    text = " ".join(get_tokenizer(tokenizer).decode(tokens)[:200].split())
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def pieces(tokens: Iterable[int], tokenizer: str) -> Iterator[str]:
    """The text of tokens as they come, whole characters; what is no text, or would steer the terminal, is U+FFFD."""
    decoder, encoding = codecs.getincrementaldecoder("utf-8")("replace"), get_tokenizer(tokenizer)
    for token in tokens:
        yield _shown(decoder.decode(encoding.decode_single_token_bytes(token)))
    yield _shown(decoder.decode(b"", final=True))


def _shown(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def stream(loaded: Loaded, prompt: str, options: Options, seed: int) -> None:
    """Print the prompt and what the model makes of it, as it comes."""
    stop = end_of_text(loaded.tokenizer)
    ids = [stop, *get_tokenizer(loaded.tokenizer).encode_ordinary(prompt)]
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    dropped: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    tokens = generate(loaded.model, ids, options.tokens, generator, sampling, stop, dropped.append)
    print(_shown(prompt), end="", flush=True)
    for piece in pieces(tokens, loaded.tokenizer):
        print(piece, end="", flush=True)
        if not console.has_reader():
            return
    print(flush=True)
    if dropped:
        limit = f"the model knows rows of seq_len = {loaded.model.config.seq_len} tokens"
        print(f"note: {limit}; the oldest {sum(dropped):,} were dropped on the way", file=sys.stderr)


def texts(loaded: Loaded, prompt: str, options: Options) -> None:
    for index in range(options.count):
        if options.count > 1:
            print(f"{'' if not index else chr(10)}--- seed {options.seed + index}", flush=True)
        stream(loaded, prompt, options, options.seed + index)


def converse(loaded: Loaded, options: Options) -> None:
    """A text for every line that is typed, until the end of the input."""
    print("Type the beginning of a text (nothing: of a document), Ctrl-D to end.", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        texts(loaded, line.rstrip("\n"), options)


def main(argv: list[str]) -> int:
    return console.run(lambda: _main(argv), "nothing was kept")


def _main(argv: list[str]) -> None:
    options = parse_settings(Options, argv, __doc__, leading="run")
    if not options.run:
        raise ValueError("name a run directory, checkpoint or export first, such as ./run.sh sample runs/<directory>")
    prompt = user_text(options.prompt)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError(f"prompt = {prompt!r} is not UTF-8, so there are no tokens for it") from None
    loaded = load(options.run, options.device, options.dtype)
    check_writes_text(loaded)
    if options.top_k > loaded.model.config.vocab_size:
        most = f"{loaded.model.config.vocab_size}, the vocabulary"
        raise ValueError(f"top_k = {options.top_k} must be at most {most}; 0 is all of it")
    if not prompt and sys.stdin.isatty() and sys.stdout.isatty():
        converse(loaded, options)
    else:
        texts(loaded, prompt, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
