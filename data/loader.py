"""From a place in the training stream to this rank's batch.

The shards are one circular stream of tokens. A batch of N tokens at position s covers stream positions [s, s + N] (the
last one is only a target); its row j of T tokens is

    inputs = stream[p : p + T]      targets = stream[p + 1 : p + T + 1]      p = s + j T

Rank r of R takes the r-th contiguous 1/R of the rows, in order, cut into micro-batches. So the rows of a batch depend
on neither R nor the micro-batch, and a run resumes from a position alone.

A stream made with a `unit`, the tokens of a batch, drops the tails of shards as modded-nanogpt's loader does: of a
shard of n tokens the first (n - 2) // unit units count, and the target of their last token is that shard's next one.

With a `masking` a batch's inputs and targets are those of that objective instead, for the same inputs.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.masking import NO_TARGET, Masking
from data.shards import DataError, Tokens, check_tokens, open_shard

PREFETCH_BATCHES = 2


class TokenStream:
    """Shards, in the order given, as one circular stream of `num_tokens` tokens. `shards` holds the mapped
    arrays, for fingerprints."""

    def __init__(self, files: Sequence[str | Path], vocab_size: int, unit: int = 0) -> None:
        if not files:
            raise DataError("token stream: found no shard files, expected at least one")
        self.files = [Path(file) for file in files]
        self.vocab_size = vocab_size
        self.shards: list[Tokens] = [np.asarray(open_shard(file)) for file in self.files]
        self._targets_after = int(unit > 0)  # tokens after those that count, for the targets of the last ones
        sizes = [max(0, len(shard) - 2) // unit * unit if unit else len(shard) for shard in self.shards]
        self._starts = np.cumsum([0, *sizes])  # of each shard in the stream; the last is its end
        self.num_tokens = int(self._starts[-1])

    def read(self, start: int, count: int) -> Tokens:
        """Tokens [start, start + count) modulo `num_tokens`, uint16 [count]. Every token read is checked
        against the vocabulary here, so that nobody has to scan the whole set first."""
        tokens = np.empty(count, dtype=np.uint16)
        filled = 0
        while filled < count:
            position = (start + filled) % self.num_tokens
            index = int(np.searchsorted(self._starts, position, side="right")) - 1
            first, end = int(self._starts[index]), int(self._starts[index + 1])
            offset, stop = position - first, position + count - filled
            piece = self.shards[index][offset : (stop if stop <= end + self._targets_after else end) - first]
            tokens[filled : filled + len(piece)] = piece
            check_tokens(tokens[filled : filled + len(piece)], self.vocab_size, self.files[index], offset)
            filled += len(piece)
        return tokens

    def __str__(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more}"


class TokenLoader:
    """Batches of one rank. A thread reads ahead of batches asked for in order; any other is as right, only slower. Use
    as a context manager or call `close`, which ends the thread."""

    def __init__(
        self, stream: TokenStream, micro_batch_tokens: int, rank: int = 0, world_size: int = 1,
        device: str | torch.device = "cpu", masking: Masking | None = None,
    ) -> None:  # fmt: skip
        self.stream, self.device, self._masking = stream, torch.device(device), masking
        self._micro_batch_tokens, self._rank, self._world_size = micro_batch_tokens, rank, world_size
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        on_gpu = (torch.cuda.set_device, (self.device,)) if self._copies else (None, ())  # or it would be the first GPU
        self._thread = ThreadPoolExecutor(1, "token-loader", *on_gpu)
        self._ahead: dict[tuple[int, int], Future[tuple[Tensor, Tensor]]] = {}

    def shape(self, num_tokens: int, row_tokens: int) -> tuple[int, int, int]:
        """(micro-batches, rows, row_tokens) of this rank's share of a batch. Raises ValueError if it does not divide
        into rows and equal micro-batches."""
        _check_multiple("micro_batch_tokens", self._micro_batch_tokens, "seq_len", row_tokens)
        unit = self._world_size * row_tokens
        rule = f"world_size * seq_len = {self._world_size} * {row_tokens}"
        _check_multiple("batch_tokens", num_tokens, rule, unit)
        rows, most_rows = num_tokens // unit, self._micro_batch_tokens // row_tokens
        fewest = -(-rows // most_rows)
        for count in range(fewest, 2 * fewest + 1):
            if rows % count == 0:
                return count, rows // count, row_tokens
        works = max(1, round(rows / most_rows)) * most_rows * unit
        raise ValueError(
            f"batch_tokens: {num_tokens} are {rows} rows on each rank, which are no number of equal micro-batches of "
            f"at most micro_batch_tokens = {self._micro_batch_tokens}; {works} works"
        )

    def batch(self, start: int, num_tokens: int, row_tokens: int) -> tuple[Tensor, Tensor]:
        """Inputs int32 and targets int64 of this rank, both of `shape(num_tokens, row_tokens)`, of the batch at stream
        position `start`. Raises here what went wrong in the thread."""
        shape = self.shape(num_tokens, row_tokens)
        if self.stream.num_tokens < num_tokens + 1:
            raise DataError(
                f"{self.stream}: found {self.stream.num_tokens} tokens, expected at least batch_tokens + 1 = "
                f"{num_tokens + 1} for one step; use more data or a smaller batch_tokens"
            )
        wanted = [(start + i * num_tokens, num_tokens) for i in range(1 + PREFETCH_BATCHES)]
        for stale in self._ahead.keys() - set(wanted):
            self._ahead.pop(stale).cancel()
        for place in wanted:
            if place not in self._ahead:
                self._ahead[place] = self._thread.submit(self._read, *place)
        inputs, targets = self._ahead.pop(wanted[0]).result()
        if self._copies is not None:  # the copy was started by the thread; what computes now waits for it, not we
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self._copies)
            for tokens in (inputs, targets):
                tokens.record_stream(stream)
        pair = inputs.view(shape), targets.view(shape)
        return self._masking(*pair, start + self._rank * inputs.numel()) if self._masking else pair

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> "TokenLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, start: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        rank_tokens = num_tokens // self._world_size
        pair = _host_pair(self.stream.read(start + self._rank * rank_tokens, rank_tokens + 1), self.device)
        with torch.cuda.stream(self._copies):  # no stream, no effect
            return _to_device(*pair, self.device)


def validation_batches(
    stream: TokenStream,
    val_tokens: int,
    seq_len: int,
    micro_batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    masking: Masking | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the first `val_tokens` tokens, as inputs int32 and targets int64
    [micro_batch_tokens / seq_len, seq_len].

    Over all ranks every row comes exactly once, for any `world_size`; all ranks get the same number of batches
    of the same shape. Rows that are only there to fill a batch have targets -1, which the loss ignores.
    Arguments are checked by the call itself, before the first batch is drawn.
    """
    _check_multiple("micro_batch_tokens", micro_batch_tokens, "seq_len", seq_len)
    _check_multiple("val_tokens", val_tokens, "seq_len", seq_len)
    if stream.num_tokens < val_tokens + 1:
        raise DataError(
            f"{stream}: found {stream.num_tokens} validation tokens, expected at least val_tokens + 1 = "
            f"{val_tokens + 1}; use a smaller val_tokens or more validation data"
        )
    device = torch.device(device)
    rows_per_batch, total_rows = micro_batch_tokens // seq_len, val_tokens // seq_len
    batches_per_rank = -(-total_rows // (rows_per_batch * world_size))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(rank * batches_per_rank, (rank + 1) * batches_per_rank):
            start = min(index * rows_per_batch, total_rows)
            rows = min(rows_per_batch, total_rows - start)
            tokens = np.zeros(micro_batch_tokens + 1, dtype=np.uint16)
            tokens[: rows * seq_len + 1] = stream.read(start * seq_len, rows * seq_len + 1)
            inputs, targets = _host_pair(tokens, device)
            targets[rows * seq_len :] = NO_TARGET
            pair = _to_device(inputs.view(-1, seq_len), targets.view(-1, seq_len), device)
            yield masking(*pair, start * seq_len) if masking else pair

    return batches()


def _host_pair(tokens: Tokens, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and the targets one position later, in pinned memory when a GPU is to copy them. Converted by NumPy,
    in the calling thread alone: torch's threads would compete with those that train."""
    pin = device.type == "cuda"
    inputs = torch.empty(len(tokens) - 1, dtype=torch.int32, pin_memory=pin)
    targets = torch.empty(len(tokens) - 1, dtype=torch.int64, pin_memory=pin)
    inputs.numpy()[:] = tokens[:-1]
    targets.numpy()[:] = tokens[1:]
    return inputs, targets


def _to_device(inputs: Tensor, targets: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def _check_multiple(name: str, value: int, rule: str, unit: int) -> None:
    if value < 1 or value % unit:
        works = max(1, round(value / unit)) * unit
        raise ValueError(f"{name}: found {value}, expected a positive multiple of {rule} ({unit}); {works} works")
