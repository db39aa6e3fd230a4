"""Text with kept keys and values against the whole model at every length, and how tokens are drawn."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from architectures import class_of
from inference import generate as module
from inference.generate import Cache, Sampling, generate
from model import GPT, ModelConfig

SMALL = ModelConfig(
    vocab_size=50, num_layers=3, num_heads=3, head_dim=8, model_dim=20, mlp_hidden=28, seq_len=24, fused=("none",)
)  # fmt: skip
DOC = 3
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused": dict(fused=("norm", "mlp", "head", "blocks")),
    "window": dict(window=5),
    "documents": dict(doc_mask=True),
    "everything": dict(window=6, doc_mask=True, value_embeds=1, embed_skip=True, ngrams=(2, 4), ngram_rows=97),
    "squared_relu": dict(activation="squared_relu"),
    "track3": dict(architecture="track3", activation="squared_relu"),
    "track3 and options": dict(architecture="track3", value_embeds=1, embed_skip=True, ngrams=(3,), window=4),
}
with_config = pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)


def model_of(settings: dict[str, Any]) -> GPT:
    torch.manual_seed(0)
    config = replace(SMALL, **settings)
    model = class_of(config)(config, torch.float32, DOC)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # no zero-initialised output may hide an error
    return model


def row(length: int, seed: int = 1) -> list[int]:
    tokens = torch.randint(50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [DOC if place % 9 == 4 else token for place, token in enumerate(tokens)]


@with_config
@pytest.mark.parametrize("cuts", [[24], [1] * 24, [7, 1, 1, 10, 5], [1, 23]], ids=str)
def test_logits_are_those_of_the_whole_row_however_it_came(settings: dict[str, Any], cuts: list[int]) -> None:
    model, tokens = model_of(settings), row(24)
    with torch.no_grad():
        expected = model.logits(model.hidden(torch.tensor([tokens]), kind="sdpa"))[0]
    cache, parts = Cache(model), []
    for cut in cuts:
        start = len(cache.ids)
        parts.append(cache.extend(tokens[start : start + cut]))
    assert cache.ids == tokens
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=2e-5)
    assert not expected.allclose(expected[:1], atol=0.1)  # rows of logits differ


@with_config
def test_greedy_tokens_are_those_without_a_cache(settings: dict[str, Any]) -> None:
    model, tokens = model_of(settings), row(5)
    for _ in range(19):
        with torch.no_grad():
            logits = model.logits(model.hidden(torch.tensor([tokens]), kind="sdpa"))[0, -1, :50]
        tokens.append(int(logits.argmax()))
    found = generate(model, tokens[:5], 19, torch.Generator(), Sampling(temperature=0))
    assert [*found] == tokens[5:]


def test_beyond_a_full_row_the_newest_half_goes_on_alone() -> None:
    model, prompt, dropped = model_of({}), row(5), []
    found = [*generate(model, prompt, 60, torch.Generator(), Sampling(temperature=0), on_drop=dropped.append)]
    everything, begin = prompt + found, 0
    for place in range(5, 65):
        if place - begin > 24:
            begin = place - 12
        with torch.no_grad():
            logits = model.logits(model.hidden(torch.tensor([everything[begin:place]]), kind="sdpa"))[0, -1, :50]
        assert everything[place] == int(logits.argmax()), place
    assert dropped == [13] * 4  # of 25 tokens, of which 12 stay
    with pytest.raises(ValueError, match="a row of 25 tokens is longer than seq_len = 24"):
        Cache(model).extend(row(25))
    long = [*generate(model, row(100), 1, torch.Generator(), Sampling(temperature=0), on_drop=dropped.append)]
    assert long == [*generate(model, row(100)[-12:], 1, torch.Generator(), Sampling(temperature=0))]
    assert dropped[-1] == 88


def test_one_token_costs_one_token() -> None:
    """By the tokens that blocks are given."""
    model, seen = model_of({}), []
    model.blocks[0].register_forward_hook(lambda block, arguments, out: seen.append(arguments[0].size(1)))
    assert len([*generate(model, row(6), 5, torch.Generator())]) == 5
    assert seen == [6, 1, 1, 1, 1]


def test_an_odd_row_and_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    model, drawn = model_of(dict(seq_len=7)), iter([4, 9, 9, 30, 8])
    monkeypatch.setattr(module.Sampling, "draw", lambda self, logits, generator: next(drawn))
    assert [*generate(model, [1, 2, 3, 4, 5], 50, torch.Generator(), stop=30)] == [4, 9, 9]
    assert next(drawn) == 8


LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -torch.inf])


def shares(sampling: Sampling, count: int = 4000) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([sampling.draw(LOGITS, generator) for _ in range(count)])
    found: list[float] = (drawn.bincount(minlength=5) / count).tolist()
    return found


@pytest.mark.parametrize(
    ("sampling", "kept", "temperature"),
    [
        (Sampling(1.0), [0, 1, 2, 3], 1.0),
        (Sampling(0.5), [0, 1, 2, 3], 0.5),
        (Sampling(1.0, top_k=2), [1, 3], 1.0),
        (Sampling(1.0, top_p=0.6), [1], 1.0),  # 0.644 alone
        (Sampling(1.0, top_p=0.7), [1, 3], 1.0),  # 0.881
        (Sampling(2.0, top_p=0.7), [1, 3], 2.0),  # 0.455 and 0.276: the temperature comes first
        (Sampling(1.0, top_k=3, top_p=0.95), [1, 2, 3], 1.0),  # of three: 0.665, 0.245, 0.09
        (Sampling(1.0, top_p=1e-9), [1], 1.0),
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_likeliest(sampling: Sampling, kept: list[int], temperature: float) -> None:
    expected = torch.zeros(5)
    expected[kept] = (LOGITS[kept] / temperature).softmax(0)
    assert shares(sampling) == pytest.approx(expected.tolist(), abs=0.03)
    assert [place for place, share in enumerate(shares(sampling)) if share] == kept


def test_a_temperature_close_to_zero_is_greedy() -> None:
    assert shares(Sampling(1e-40), 10)[1] == 1


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert Sampling(0).draw(torch.tensor([1.0, 5.0, 5.0]), torch.Generator()) == 1
