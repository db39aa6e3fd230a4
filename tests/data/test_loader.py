"""The loader against a naive concatenation of the shards, repeated for as many epochs as it takes."""

import re
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import TokenLoader, TokenStream, validation_batches
from data.shards import DataError, write_shard

VOCAB_SIZE = 1000
SIZES = (101, 1, 37, 250)  # odd, tiny, and one longer than a batch


def make_stream(
    folder: Path, sizes: Sequence[int] = SIZES, unit: int = 0
) -> tuple[TokenStream, np.ndarray]:  # fmt: skip
    """A stream over shards of these sizes, and the same tokens 20 times over as one array."""
    tokens = np.random.default_rng(sum(sizes)).integers(0, VOCAB_SIZE, sum(sizes), dtype=np.uint16)
    paths = [folder / f"{index}.bin" for index in range(len(sizes))]
    for path, part in zip(paths, np.split(tokens, np.cumsum(sizes)[:-1]), strict=True):
        write_shard(path, part)
    return TokenStream(paths, VOCAB_SIZE, unit), np.tile(tokens, 20)


@pytest.mark.parametrize("sizes", [SIZES, (5,), (1, 1, 1)], ids=str)
def test_read_is_a_slice_of_the_endless_stream(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    stream, naive = make_stream(tmp_path, sizes)
    assert stream.num_tokens == sum(sizes)
    for start in range(0, 2 * sum(sizes), 3):
        for count in (0, 1, 2, sum(sizes), 3 * sum(sizes) + 1):
            tokens = stream.read(start, count)
            assert tokens.dtype == np.uint16
            np.testing.assert_array_equal(tokens, naive[start : start + count])


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("sizes", [(97, 98, 99), (193, 2, 500, 194), (97, 290)], ids=str)
def test_tails_of_shards_are_dropped_as_by_the_optimization_track(
    tmp_path: Path, sizes: tuple[int, ...], world_size: int
) -> None:
    """A pointer that leaves a shard where position + batch + 1 reaches its end, over more than an epoch."""
    batch, (stream, tokens) = 96, make_stream(tmp_path, sizes, unit=96)
    shards = np.split(tokens[: sum(sizes)], np.cumsum(sizes)[:-1])
    loaders = [TokenLoader(stream, 8, rank, world_size) for rank in range(world_size)]
    shard, position = 0, 0
    for step in range(12):
        while position + batch + 1 >= len(shards[shard]):
            shard, position = (shard + 1) % len(shards), 0
        batches = [loader.batch(step * batch, batch, 8) for loader in loaders]
        inputs, targets = (torch.cat([pair[index].flatten() for pair in batches]).numpy() for index in (0, 1))
        np.testing.assert_array_equal(inputs, shards[shard][position : position + batch])
        np.testing.assert_array_equal(targets, shards[shard][position + 1 : position + batch + 1])
        position += batch
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_tokens", [8, 16])
def test_ranks_together_have_the_rows_of_the_naive_stream(
    tmp_path: Path, world_size: int, micro_batch_tokens: int
) -> None:
    """Over several epochs (389 tokens, 96 a step), whatever the ranks and the micro-batch."""
    stream, naive = make_stream(tmp_path)
    batch_tokens, seq_len = 96 * (micro_batch_tokens // 8), 8
    loaders = [TokenLoader(stream, micro_batch_tokens, rank, world_size) for rank in range(world_size)]
    micro_batches = batch_tokens // world_size // micro_batch_tokens
    for step in range(15):
        batches = [loader.batch(step * batch_tokens, batch_tokens, seq_len) for loader in loaders]
        for inputs, targets in batches:
            assert inputs.shape == targets.shape == (micro_batches, micro_batch_tokens // seq_len, seq_len)
            assert (inputs.dtype, targets.dtype) == (torch.int32, torch.int64)
        start = step * batch_tokens
        inputs, targets = (torch.cat([pair[index].flatten() for pair in batches]).numpy() for index in (0, 1))
        np.testing.assert_array_equal(inputs, naive[start : start + batch_tokens])
        np.testing.assert_array_equal(targets, naive[start + 1 : start + batch_tokens + 1])
    for loader in loaders:
        loader.close()


def test_any_order_of_steps_gives_the_same_batches(tmp_path: Path) -> None:
    stream, naive = make_stream(tmp_path)
    with TokenLoader(stream, 32) as loader:
        for step in [5, 6, 7, 3, 3, 4, 60, 0, 2, 1, 5]:
            inputs, targets = loader.batch(step * 64, 64, 16)
            np.testing.assert_array_equal(inputs.flatten(), naive[step * 64 : step * 64 + 64])
            np.testing.assert_array_equal(targets.flatten(), naive[step * 64 + 1 : step * 64 + 65])


def test_batches_do_not_share_memory(tmp_path: Path) -> None:
    """A batch stays as it was while later ones are read and while it is written to."""
    stream, naive = make_stream(tmp_path)
    with TokenLoader(stream, 32) as loader:
        first = loader.batch(0, 64, 16)
        first[0].zero_()
        for step in range(1, 5):
            loader.batch(step * 64, 64, 16)
        np.testing.assert_array_equal(first[1].flatten(), naive[1:65])
        np.testing.assert_array_equal(loader.batch(0, 64, 16)[0].flatten(), naive[:64])


@pytest.mark.parametrize(
    ("num_tokens", "micro_batch_tokens", "shape"),
    [(96, 32, (3, 2, 16)), (48, 32, (3, 1, 16)), (96, 64, (2, 3, 16)), (160, 64, (5, 2, 16)), (48, 96, (1, 3, 16))],
    ids=str,
)
def test_a_batch_is_cut_into_as_few_equal_micro_batches_as_it_can(
    tmp_path: Path, num_tokens: int, micro_batch_tokens: int, shape: tuple[int, int, int]
) -> None:
    stream, naive = make_stream(tmp_path)
    with TokenLoader(stream, micro_batch_tokens) as loader:
        inputs, _ = loader.batch(7, num_tokens, 16)
        assert inputs.shape == shape
        np.testing.assert_array_equal(inputs.flatten(), naive[7 : 7 + num_tokens])
        with pytest.raises(ValueError, match=r"batch_tokens: 272 are 17 rows on each rank, .* micro-batches"):
            TokenLoader(stream, 64).shape(272, 16)


def test_bad_token_is_named_by_the_step_that_reads_it(tmp_path: Path) -> None:
    """Reading ahead finds it earlier, but only the caller who wants that step is told."""
    for name, tokens in (("0", [1] * 50), ("1", [2] * 20 + [999, 1000] + [2] * 60)):
        write_shard(tmp_path / f"{name}.bin", tokens)
    stream = TokenStream([tmp_path / "0.bin", tmp_path / "1.bin"], VOCAB_SIZE)
    with TokenLoader(stream, 16) as loader:
        for step in (0, 1):
            loader.batch(step * 32, 32, 16)
        for _ in range(2):
            with pytest.raises(DataError, match=r"1\.bin: token 21: found 1000, expected less than vocab_size 1000"):
                loader.batch(64, 32, 16)
        loader.batch(0, 32, 16)


def test_close_ends_the_thread(tmp_path: Path) -> None:
    stream, _ = make_stream(tmp_path)
    before = set(threading.enumerate())
    with TokenLoader(stream, 32) as loader:
        loader.batch(0, 64, 16)
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("val_tokens", [8, 56, 128, 384])
def test_validation_has_every_row_once(tmp_path: Path, world_size: int, val_tokens: int) -> None:
    stream, naive = make_stream(tmp_path)
    seq_len, micro_batch_tokens = 8, 24
    ranks = [
        list(validation_batches(stream, val_tokens, seq_len, micro_batch_tokens, rank, world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == -(-val_tokens // (micro_batch_tokens * world_size))
    rows = []
    for inputs, targets in (pair for batches in ranks for pair in batches):
        assert inputs.shape == targets.shape == (3, seq_len)
        assert (inputs.dtype, targets.dtype) == (torch.int32, torch.int64)
        for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
            if target != [-1] * seq_len:
                rows.append((row, target))
    expected = [
        (naive[start : start + seq_len].tolist(), naive[start + 1 : start + seq_len + 1].tolist())
        for start in range(0, val_tokens, seq_len)
    ]
    assert rows == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_tokens": 100},
            "batch_tokens: found 100, expected a positive multiple of world_size * seq_len = 2 * 16 (32); 96 works",
        ),
        (
            {"batch_tokens": 0},
            "batch_tokens: found 0, expected a positive multiple of world_size * seq_len = 2 * 16 (32); 32 works",
        ),
        (
            {"micro_batch_tokens": 40},
            "micro_batch_tokens: found 40, expected a positive multiple of seq_len (16); 32 works",
        ),
        (
            {"micro_batch_tokens": 8},
            "micro_batch_tokens: found 8, expected a positive multiple of seq_len (16); 16 works",
        ),
    ],
    ids=["batch", "zero", "micro-batch", "micro-batch below a row"],
)
def test_sizes_that_do_not_divide(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    stream, _ = make_stream(tmp_path)
    sizes = {"batch_tokens": 128, "seq_len": 16, "micro_batch_tokens": 32, "world_size": 2} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        loader = TokenLoader(stream, sizes["micro_batch_tokens"], world_size=sizes["world_size"])
        loader.shape(sizes["batch_tokens"], sizes["seq_len"])


def test_validation_tokens_have_to_fill_rows(tmp_path: Path) -> None:
    stream, _ = make_stream(tmp_path)
    with pytest.raises(ValueError, match=r"val_tokens: found 100, .* multiple of seq_len \(16\); 96 works"):
        validation_batches(stream, 100, 16, 32)


def test_too_few_tokens_for_one_step(tmp_path: Path) -> None:
    stream, naive = make_stream(tmp_path, (100, 28))
    with TokenLoader(stream, 32) as loader, pytest.raises(DataError) as error:
        loader.batch(0, 128, 16)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / '0.bin'} and 1 more: found 128 tokens")
    assert "expected at least batch_tokens + 1 = 129" in message
    stream, naive = make_stream(tmp_path, (100, 29))  # one more is enough
    with TokenLoader(stream, 32) as loader:
        np.testing.assert_array_equal(loader.batch(0, 128, 16)[1].flatten(), naive[1:129])


def test_too_few_validation_tokens(tmp_path: Path) -> None:
    stream, _ = make_stream(tmp_path, (100, 28))
    with pytest.raises(DataError, match=r"found 128 validation tokens, expected at least val_tokens \+ 1 = 129"):
        validation_batches(stream, 128, 16, 32)  # told by the call, not by the first batch


def test_no_files() -> None:
    with pytest.raises(DataError, match="found no shard files, expected at least one"):
        TokenStream([], VOCAB_SIZE)
