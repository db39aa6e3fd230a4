"""Rows for the masked objective, against their definition."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.loader import TokenLoader, TokenStream, validation_batches
from data.masking import Masking, _mixed, num_masked
from data.shards import write_shard

MASK, VOCAB, ROW = 50, 50, 40
HIDE = Masking(share=0.15, vocab_size=VOCAB, mask_token=MASK, seed=3)


def rows(count: int, row_tokens: int = ROW) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCAB, (count * row_tokens + 1,), generator=torch.Generator().manual_seed(0))
    return tokens[:-1].int().view(count, -1), tokens[1:].view(count, -1)


def test_the_hash_is_lowbias32() -> None:
    def expected(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    numbers = [0, 1, 2, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, *range(10**6, 10**6 + 1000)]
    assert _mixed(torch.tensor(numbers)).tolist() == [expected(x) for x in numbers]


@pytest.mark.parametrize(("share", "row_tokens", "expected"), [(0.15, 40, 6), (0.15, 3, 1), (0.4, 256, 102)])
def test_every_row_has_the_same_number_of_targets_which_are_its_own_tokens(
    share: float, row_tokens: int, expected: int
) -> None:
    inputs, targets = rows(64, row_tokens)
    shown, wanted = dataclasses.replace(HIDE, share=share)(inputs, targets, 1000)
    assert (shown.dtype, wanted.dtype) == (torch.int32, torch.int64)
    is_target = wanted != -1
    assert num_masked(share, row_tokens) == expected
    assert is_target.sum(1).tolist() == [expected] * 64
    assert torch.equal(wanted[is_target], inputs[is_target].long())
    assert torch.equal(shown[~is_target], inputs[~is_target])  # no other token is touched


def test_of_ten_targets_eight_are_masked_one_is_random_and_one_stays() -> None:
    inputs, targets = rows(20_000)
    shown, wanted = HIDE(inputs, targets, 0)
    is_target = wanted != -1
    of_targets, own = shown[is_target], inputs[is_target]
    n = len(own)
    assert n == 20_000 * 6
    for found, share in (
        (of_targets == MASK, 0.8),
        (of_targets == own, 0.1 + 0.1 / VOCAB),  # a random one may be the token itself
        ((of_targets != MASK) & (of_targets != own), 0.1 * (1 - 1 / VOCAB)),
    ):
        assert float(found.float().mean()) == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5)
    is_random = (of_targets != MASK) & (of_targets != own)
    assert sorted(of_targets[is_random].unique().tolist()) == list(range(VOCAB))
    by_place = is_target.float().mean(0)  # every place of a row is as likely
    assert float((by_place - 0.15).abs().max()) < 5 * (0.15 * 0.85 / 20_000) ** 0.5
    neighbours = (is_target[:, 1:] & is_target[:, :-1]).float().mean()  # 6 / 40 * 5 / 39 without a pattern
    assert float(neighbours) == pytest.approx(6 / 40 * 5 / 39, abs=0.001)


def test_which_tokens_are_hidden_depends_on_position_and_seed_alone() -> None:
    inputs, targets = rows(8)
    places = HIDE(inputs, targets, 0)[1] != -1
    others = (inputs + 7) % VOCAB
    assert torch.equal(HIDE(others, targets, 0)[1] != -1, places)
    assert torch.equal(HIDE(inputs[5:], targets[5:], 5 * ROW)[1] != -1, places[5:])
    for change in (
        HIDE(inputs, targets, 8 * ROW),
        HIDE(inputs, targets, 2**32),
        dataclasses.replace(HIDE, seed=4)(inputs, targets, 0),
        dataclasses.replace(HIDE, seed=3 + 2**40)(inputs, targets, 0),
    ):
        assert float(((change[1] != -1) & places).sum()) < 0.4 * places.sum()  # of 48, 7 by chance


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    write_shard(tmp_path / "a.bin", np.random.default_rng(0).integers(0, VOCAB, 1000, dtype=np.uint16))
    return TokenStream([tmp_path / "a.bin"], VOCAB)


def test_ranks_and_micro_batches_change_no_row_and_another_epoch_hides_others(stream: TokenStream) -> None:
    def batch(ranks: int, micro_rows: int, start: int = 120) -> tuple[Tensor, Tensor]:
        parts = []
        for rank in range(ranks):
            with TokenLoader(stream, micro_rows * ROW, rank, ranks, masking=HIDE) as loader:
                parts.append([tokens.flatten(0, 1) for tokens in loader.batch(start, 12 * ROW, ROW)])
        inputs, targets = (torch.cat(tokens) for tokens in zip(*parts, strict=True))
        return inputs, targets

    inputs, targets = batch(1, 12)
    with TokenLoader(stream, 12 * ROW) as plain:
        expected = HIDE(*(tokens[0] for tokens in plain.batch(120, 12 * ROW, ROW)), 120)
    for ranks, micro_rows in ((1, 12), (1, 3), (2, 6), (3, 2)):
        assert all(map(torch.equal, batch(ranks, micro_rows), expected))
    assert not torch.equal(batch(1, 12, 1120)[1], targets)
    assert torch.equal(
        torch.where(targets != -1, targets, inputs)[:, :5],
        torch.where((later := batch(1, 12, 1120))[1] != -1, later[1], later[0])[:, :5],
    )  # the same text


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_has_the_same_targets_on_any_number_of_ranks(stream: TokenStream, ranks: int) -> None:
    def targets(ranks: int, micro_rows: int) -> Tensor:
        found = []
        for rank in range(ranks):
            for _, each in validation_batches(stream, 10 * ROW, ROW, micro_rows * ROW, rank, ranks, masking=HIDE):
                found.append(each[(each != -1).any(1)])  # rows that only fill a batch have no target
        return torch.cat(found)

    assert (targets(1, 10) != -1).sum(1).tolist() == [6] * 10
    assert torch.equal(targets(ranks, 3), targets(1, 10))
