"""Tokens per second of sampling, with keys and values kept and without: the same greedy tokens, in turn.

    python -m benchmarks.sample_speed configs/sotu_base.toml --lengths 64 256

The model is a recipe's, with random weights, in float32: in bfloat16 rounding tips a token now and then, and the rest
of the row with it. Without what is kept, each token takes the whole row so far through the model. The row begins with
one token and never becomes longer than the recipe's.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch

from architectures import class_of
from data.files import user_path
from data.tokenizer import end_of_text
from harness.machine import find_machine
from harness.results import command, report
from harness.step_timer import median_seconds
from harness.tables import Row
from inference.generate import Sampling, generate
from model import GPT
from train_gpt import load_config, model_config

GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Args:
    recipe: str = "configs/sotu_base.toml"  # whose model is sampled from
    lengths: tuple[int, ...] = (64, 256)  # tokens of a row, at most the recipe's seq_len
    turns: int = 5  # of each way; the table has medians


def cached(model: GPT, length: int) -> list[int]:
    return [*generate(model, [0], length - 1, torch.Generator(), GREEDY)]


@torch.no_grad()
def uncached(model: GPT, length: int) -> list[int]:
    ids = torch.zeros(1, length, dtype=torch.int64, device=model.embed.weight.device)
    for place in range(1, length):
        logits_V = model.logits(model.hidden(ids[:, :place], kind="sdpa")[0, -1])[: model.config.vocab_size]
        ids[0, place] = logits_V.argmax()
    return ids[0, 1:].tolist()


def main(args: Args) -> None:
    config = load_config([str(user_path(args.recipe))])
    if bad := [length for length in args.lengths if not 2 <= length <= config.seq_len]:
        raise ValueError(f"lengths = {bad[0]} must be from 2 to seq_len = {config.seq_len} of {args.recipe}")
    machine = find_machine(config.device, "float32")
    torch.manual_seed(0)
    with machine.device:
        doc_token = end_of_text(config.tokenizer) if config.doc_mask else None
        model = class_of(config)(model_config(config), machine.dtype, doc_token).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    rows: list[Row] = []
    for length in args.lengths:
        num_equal = sum(one == other for one, other in zip(cached(model, length), uncached(model, length), strict=True))
        ways = {"kept": partial(cached, model, length), "whole rows": partial(uncached, model, length)}
        seconds = median_seconds(ways, args.turns, warmups=1, device=machine.device)
        kept, whole = (seconds[name].wall for name in ("kept", "whole rows"))
        rows.append({
            "tokens": length, "equal": f"{num_equal} of {length - 1}", "kept_tokens_per_s": (length - 1) / kept,
            "whole_rows_tokens_per_s": (length - 1) / whole, "ratio": whole / kept,
        })  # fmt: skip
    report(
        f"sample_speed_{config.name}", rows, str(machine.device), **dataclasses.asdict(args), dtype=str(machine.dtype)
    )  # fmt: skip


if __name__ == "__main__":
    command(main, Args, __doc__)
