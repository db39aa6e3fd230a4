"""Throughput of the training loader from a warm page cache into ready int32 inputs and int64 targets.

    python -m benchmarks.loader_speed

Times whole passes over several shards, so what the prefetch thread does counts. The baseline is the usual
loader that slices row by row, converts each row and stacks them. The roofline is a memory copy that moves as many
bytes as any loader has to.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.loader import TokenLoader, TokenStream
from data.shards import Tokens, write_shard
from harness.results import command, report
from harness.step_timer import median_seconds
from harness.tables import Row

VOCAB_SIZE = 50257
BYTES_PER_TOKEN = 2 + 4 + 8  # to read a uint16 and write an int32 and an int64 is the least there is to do


@dataclass(frozen=True)
class Args:
    seq_len: int = 1024
    batch_tokens: tuple[int, ...] = (65_536, 131_072, 524_288)  # tokens per batch; one row of the table each
    shard_tokens: tuple[int, ...] = (16_000_003, 8_000_001, 12_345_678)
    passes: int = 9  # timed passes over the data; the table has medians


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{index}.bin") for index in range(len(args.shard_tokens))]
        generator = np.random.default_rng(0)
        for path, size in zip(paths, args.shard_tokens, strict=True):
            write_shard(path, generator.integers(0, VOCAB_SIZE, size, dtype=np.uint16))
        stream = TokenStream(paths, VOCAB_SIZE)
        rows = [measure(stream, batch_tokens, args) for batch_tokens in args.batch_tokens]
    report("loader", rows, "cpu", **dataclasses.asdict(args))


def measure(stream: TokenStream, batch_tokens: int, args: Args) -> Row:
    """One row of the table: a batch size against the baseline and the roofline."""
    whole = np.concatenate(stream.shards)
    steps = stream.num_tokens // batch_tokens
    tokens = steps * batch_tokens
    source, target = (torch.ones(tokens * BYTES_PER_TOKEN // 2, dtype=torch.uint8) for _ in range(2))
    with TokenLoader(stream, micro_batch_tokens=args.seq_len) as loader:

        def run_pass(batch: Callable[[int, int, int], object]) -> None:
            for step in range(steps):
                batch(step * batch_tokens, batch_tokens, args.seq_len)

        baseline = partial(row_by_row, whole)
        for step in range(steps):
            place = step * batch_tokens, batch_tokens, args.seq_len
            pairs = zip(loader.batch(*place), baseline(*place), strict=True)
            if not all(torch.equal(found.flatten(), right) for found, right in pairs):
                raise SystemExit(f"step {step}: the loader's batch is wrong; nothing was timed")
        variants: dict[str, Callable[[], object]] = {
            "loader": partial(run_pass, loader.batch),
            "row by row": partial(run_pass, baseline),
            "copy": partial(target.copy_, source),
        }
        seconds = {name: time.wall for name, time in median_seconds(variants, args.passes).items()}
    return {
        "batch_tokens": batch_tokens,
        "loader_Mtokens_per_s": tokens / seconds["loader"] / 1e6,
        "row_by_row_Mtokens_per_s": tokens / seconds["row by row"] / 1e6,
        "ratio": seconds["row by row"] / seconds["loader"],
        "fraction_of_copy": seconds["copy"] / seconds["loader"],
        "ms_per_batch": 1e3 * seconds["loader"] / steps,
    }


def row_by_row(data: Tokens, start: int, batch_tokens: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = range(start, start + batch_tokens, seq_len)
    inputs = torch.stack([torch.from_numpy(data[row : row + seq_len].astype(np.int32)) for row in rows])
    targets = torch.stack([torch.from_numpy(data[row + 1 : row + 1 + seq_len].astype(np.int64)) for row in rows])
    return inputs.flatten(), targets.flatten()


if __name__ == "__main__":
    command(main, Args, __doc__)
