"""A trained model for other people's programs: a folder that transformers loads.

    ./run.sh export runs/<the run's directory> --out=my_model
    AutoModelForCausalLM.from_pretrained("my_model", trust_remote_code=True)               (in Python, transformers)
    ./run.sh sample my_model                                   (or evaluate; ./run.sh --init_from=my_model trains on)

It holds model.safetensors (float32, the weights that the run validates), config.json, generation_config.json, the
tokenizer's files, modeling_nanogpt_aurora.py, which is the model for transformers in one file, and README.md, a card
made of the run's own facts. The folder appears when it is whole. ./run.sh export my_model --push=ORG/NAME hands it over
to huggingface_hub, which has to be logged in.
"""

import dataclasses
import itertools
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from data import console
from data.documents import END_OF_TEXT
from data.files import check_writable, user_path, write_json
from data.tokenizer import end_of_text, get_tokenizer
from harness.machine import ROOT
from harness.settings import parse_settings
from inference.load import WEIGHTS, Loaded, load

MODELING = "modeling_nanogpt_aurora"
CLASSES = {
    "AutoConfig": f"{MODELING}.NanoGPTAuroraConfig",
    "AutoModelForCausalLM": f"{MODELING}.NanoGPTAuroraForCausalLM",
}
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Options:
    run: str = ""  # run directory, or a checkpoint; comes first
    out: str = ""  # folder to make
    push: str = ""  # repository on the Hub, as ORG/NAME, that gets the folder, or RUN if it is one; empty: none


def model_settings(loaded: Loaded) -> dict[str, Any]:
    """config.json. Raises ValueError for what the exported model does not cover."""
    c = loaded.model.config
    if c.objective != "causal":
        raise ValueError(f"{loaded.source}: objective = 'masked' is not covered by an export; 'causal' is")
    if c.architecture != "gpt":
        raise ValueError(f"architecture = {c.architecture!r} is not covered by an export; 'gpt' is")
    token = None if loaded.tokenizer == "none" else end_of_text(loaded.tokenizer)
    sizes = ("vocab_size", "padded_vocab_size", "num_layers", "num_heads", "head_dim", "model_dim", "hidden_dim")
    same = (*sizes, "seq_len", "activation", "softcap", "window", "value_embeds", "ngram_rows", "embed_skip")
    ours = {key: loaded.settings[key] for key in ("name", "tokenizer", "dtype", "val_files", "val_tokens")}
    return {
        "model_type": "nanogpt_aurora", "architectures": ["NanoGPTAuroraForCausalLM"], "auto_map": CLASSES,
        "dtype": "float32", "bos_token_id": token, "eos_token_id": token, "pad_token_id": token,
        "doc_token": loaded.model.doc_token, "ngrams": list(c.ngrams), **{key: getattr(c, key) for key in same},
        "training": ours | dataclasses.asdict(c),  # for this repository to read it back
    }  # fmt: skip


def tokenizer_files(name: str) -> dict[str, dict[str, Any]]:
    """tokenizer.json, of the `tokenizers` library, and tokenizer_config.json: the same ids as the encoding."""
    encoding, last = get_tokenizer(name), end_of_text(name)
    letter_of = byte_letters()
    words = [encoding.decode_single_token_bytes(token) for token in range(last)]
    vocabulary = {"".join(letter_of[byte] for byte in word): token for token, word in enumerate(words)}
    pattern = {"Regex": GPT2_PATTERN if name == "gpt2" else r"[\s\S]"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    to_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"id": last, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False, "special": True}  # fmt: skip
    no_affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, **no_affixes, "vocab": vocabulary,
             "merges": merges(words, letter_of)}  # fmt: skip
    return {
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_letters]}, "post_processor": None,
            "decoder": to_letters, "model": model,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT, "clean_up_tokenization_spaces": False, "padding_side": "left",
        },
    }  # fmt: skip


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in such files: itself where it is printable Latin-1, else the next ones from
    U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


def merges(words: list[bytes], letter_of: dict[int, str]) -> list[list[str]]:
    """The pair that each token of several bytes is merged from, in the order of the ids: what is left of it when pairs
    are merged by the ranks of lower tokens alone."""
    rank = {word: token for token, word in enumerate(words)}
    found = []
    for token, word in enumerate(words):
        parts = [word[place : place + 1] for place in range(len(word))]
        while len(parts) > 2:
            ranks = [rank.get(one + two, token) for one, two in itertools.pairwise(parts)]
            lowest = min(ranks)
            if lowest >= token:
                break
            place = ranks.index(lowest)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            found.append(["".join(letter_of[byte] for byte in part) for part in parts])
    return found


def card(loaded: Loaded, name: str) -> str:
    """README.md, from what the run knows of itself."""
    s, run = loaded.settings, loaded.summary
    tables = "Adagrad on tables of n-grams, " if s["ngram_sparse"] else ""
    facts = {
        "parameters": f"{loaded.model.num_params():,}",
        "trained on": f"`{s['train_files']}`, {run.get('tokens', 0):,} tokens ({s['tokenizer']})",
        "validation loss": _known(run.get("val_loss"), "{:.4f} nats per token"),
        "bits per byte": _known(run.get("bits_per_byte"), "{:.4f} of validation text"),
        "validated on": f"the first {s['val_tokens']:,} tokens of `{s['val_files']}`",
        "optimizer": f"{s['matrix_optimizer']} on hidden matrices, {tables}AdamW on the rest",
        "began with": f"the weights of `{s['init_from']}`" if s.get("init_from") else "random weights",
        "steps": f"{loaded.step:,} of {s['train_steps']:,}, {s['batch_tokens']:,} tokens each",
        "training time": _known(run.get("train_time_s"), "{:,.1f} s"),
        "machine": f"{run.get('world_size', 1)} x {run.get('device', 'unknown')}",
        "seed": str(s["seed"]),
        "commit": str(run.get("git_commit") or "unknown"),
    }
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A small language model, trained with nanoGPT-Aurora by the recipe `{s["name"]}`. It continues text; it answers no
questions and knows only what it was trained on.

| | |
|---|---|
{rows}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("{END_OF_TEXT}Fellow citizens", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True)[0]))
```

A document begins with `{END_OF_TEXT}`. Rows in training had {s["seq_len"]:,} tokens; longer ones were never seen.
"""


def _known(value: float | None, text: str) -> str:
    return "unknown" if value is None else text.format(value)


def export(loaded: Loaded, out: Path) -> None:
    """Make the folder. Raises ValueError, before anything is written, for a model that is not covered or a folder that
    is there."""
    if loaded.source.name == WEIGHTS:
        raise ValueError(f"{loaded.source.parent} is an export; copy the folder, or name the run that it is from")
    settings = model_settings(loaded)
    files: dict[str, dict[str, Any]] = {} if loaded.tokenizer == "none" else tokenizer_files(loaded.tokenizer)
    if out.exists():
        raise ValueError(f"out = {str(out)!r} is there; name a new folder")
    check_writable(out.parent, "choose another place, such as --out=/tmp/my_model")
    out.parent.mkdir(parents=True, exist_ok=True)
    ids = {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files |= {"config.json": settings, "generation_config.json": ids | {"do_sample": True, "temperature": 0.8}}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as made:
        folder = Path(made) / out.name
        folder.mkdir()
        weights = {
            name: weight.detach().float().cpu().contiguous() for name, weight in loaded.model.state_dict().items()
        }
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        for name, content in files.items():
            write_json(folder / name, content, indent=1)
        shutil.copyfile(ROOT / f"inference/{MODELING}.py", folder / f"{MODELING}.py")
        (folder / "README.md").write_text(card(loaded, out.name), encoding="utf-8")
        folder.rename(out)


def push(out: Path, repository: str) -> None:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ValueError("--push needs the package huggingface_hub: pip install huggingface_hub") from None
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        print(api.upload_folder(folder_path=out, repo_id=repository))
    except Exception as error:  # the client's errors have no common class
        why = console.first_line(error)
        again = f"./run.sh export {out} --push={repository} tries again"
        raise ValueError(f"{repository} on the Hub did not take {out} ({why}); the folder is whole: {again}") from None


def main(argv: list[str]) -> int:
    return console.run(lambda: _main(argv), "nothing was kept")


def _main(argv: list[str]) -> None:
    options = parse_settings(Options, argv, __doc__, leading="run")
    if options.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.push):
        raise ValueError(f"push = {options.push!r} must be a repository's name, such as me/my_model")
    if options.run and options.push and not options.out and (user_path(options.run) / WEIGHTS).is_file():
        push(user_path(options.run), options.push)
        return
    if not options.run or not options.out:
        raise ValueError("name a run and a folder: ./run.sh export runs/<directory> --out=my_model")
    out = user_path(options.out)
    export(load(options.run, "cpu", "float32"), out)
    print(f"{sum(path.stat().st_size for path in out.iterdir()) / 2**20:,.1f} MiB -> {out}")
    if options.push:
        push(out, options.push)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
