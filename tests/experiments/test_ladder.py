"""The ladder: n-grams against counting by hand, and its rungs for a small run."""

import itertools
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from data.shards import write_shard
from data.tokenizer import get_tokenizer
from experiments.ladder import SEPARATOR, SYMBOLS, bits_of_ngrams, main, symbols_of
from inference import export
from tests.conftest import Trainer
from tests.test_train import only_run, summary

ALPHABET = [97, 98, 99, SEPARATOR]


def probability(train: list[int], before: list[int], symbol: int) -> float:
    """Of a symbol after those before it, by the formula, one count at a time."""
    if not before:
        count, kinds, shorter = train.count(symbol), len({*train}), 1 / SYMBOLS
        return (count + kinds * shorter) / (len(train) + kinds)
    size = len(before)
    after = [train[place + size] for place in range(len(train) - size) if train[place : place + size] == before]
    shorter = probability(train, before[1:], symbol)
    return (after.count(symbol) + len({*after}) * shorter) / (len(after) + len({*after})) if after else shorter


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_ngrams_are_those_of_counting_by_hand(order: int) -> None:
    generator = np.random.default_rng(order)
    train, text = (generator.choice(ALPHABET, size).tolist() for size in (150, 40))
    text[5] = 122  # never seen
    padded = [SEPARATOR] * (order - 1) + text
    expected = [-np.log2(probability(train, padded[place : place + order - 1], padded[place + order - 1]))
                for place in range(len(text))]  # fmt: skip
    np.testing.assert_allclose(bits_of_ngrams(np.array(train), np.array(text), order), expected, rtol=1e-12)


def test_probabilities_of_all_symbols_add_up_to_one() -> None:
    train = np.random.default_rng(0).choice(ALPHABET, 80)
    for before in itertools.product(ALPHABET, repeat=2):
        texts = [np.array([*before, symbol]) for symbol in range(SYMBOLS)]
        assert sum(2.0 ** -bits_of_ngrams(train, text, 3)[-1] for text in texts) == pytest.approx(1)


def test_the_rungs_of_a_run(trainer: Trainer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    documents = [f"and the {word}s of these States, " * 3 for word in ("Senate", "House", "people", "law")]
    tokens = [token for text in documents for token in (256, *text.encode())]
    write_shard(tmp_path / "text_train_0.bin", tokens * 2)
    write_shard(tmp_path / "text_val_0.bin", [*tokens, 65])
    files = [f"--{kind}_files={tmp_path}/text_{kind}_*.bin" for kind in ("train", "val")]
    sizes = ["--seq_len=32", "--val_tokens=352", "--batch_tokens=32", "--micro_batch_tokens=32"]
    steps = ["--train_steps=4", "--checkpoint_every=4", "--dtype=float32", "--device=cpu"]
    result = trainer(*files, *sizes, *steps, "--tokenizer=byte", "--vocab_size=257")
    assert result.returncode == 0, result.stderr
    run = only_run(tmp_path)
    assert main([str(run), f"--out={tmp_path / 'new/ladder.json'}"]) == 0
    out = capfd.readouterr().out
    record = json.loads((tmp_path / "new/ladder.json").read_text(encoding="utf-8"))
    text = bytes(token for token in tokens[1:353] if token != SEPARATOR)
    assert record["num_bytes"] == len(text)
    alone = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert record["rungs"]["xz, alone"] == [None, round(alone, 5)]
    one, three, five = (record["rungs"][f"{order}-gram"][1] for order in (1, 3, 5))
    assert one > three > five > 0
    before = bytes(token for token in tokens * 2 if token != SEPARATOR)
    sizes_of = [len(lzma.compress(each, preset=9 | lzma.PRESET_EXTREME)) for each in (before, before + text)]
    assert record["rungs"]["xz, after the training text"][1] == round(8 * (sizes_of[1] - sizes_of[0]) / len(text), 5)
    told = summary(run)
    assert (record["step"], record["num_params"]) == (4, told["num_params"])
    assert record["rungs"]["tiny"][0] == pytest.approx(told["bits_per_byte"], abs=1e-4)
    assert out.index("1-gram") < out.index("3-gram") < out.index("5-gram")
    assert export.main([str(run), f"--out={tmp_path / 'my_model'}"]) == 0
    assert main([str(tmp_path / "my_model")]) == 2
    assert "is an export, which does not know its training text; name the run" in capfd.readouterr().err


def test_tokens_of_any_tokenizer_are_the_same_bytes(gpt2_vocabulary: Path) -> None:
    text = "Bürger, hört! 12"
    tokens = [50256, *get_tokenizer("gpt2").encode_ordinary(text)]
    assert symbols_of(tokens, "gpt2").tolist() == [SEPARATOR, *text.encode()]
    assert symbols_of([256, *text.encode()], "byte").tolist() == [SEPARATOR, *text.encode()]


def test_without_a_run(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "name a run directory first" in capfd.readouterr().err
