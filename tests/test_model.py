"""The GPT against a plain transcription of its equations, and its bookkeeping against torch's own counters."""

import math
import operator
import tomllib
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from inference.generate import generate
from model import GPT, IGNORE_INDEX, MLP, ModelConfig, hashed_ngrams
from tests.conftest import ROOT

SMALL = ModelConfig(
    vocab_size=50, num_layers=2, num_heads=3, head_dim=8, model_dim=20, mlp_hidden=28, seq_len=24, fused=("none",)
)  # fmt: skip
FACTORS = 36313, 27191, 51647, 21377, 458747, 1000003, 245491, 104729
DOC = 3  # the token that begins a document, where documents matter


def small_model(config: ModelConfig = SMALL) -> GPT:
    torch.manual_seed(0)
    model = GPT(config, torch.float32, DOC)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)  # no zero-initialised output may hide an error
    return model


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(seed))


def reference_logits(model: GPT, inputs: torch.Tensor) -> torch.Tensor:
    """One sequence, position by position and head by head, in float64: logits [T, V]."""
    c = model.config

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotate(vector: torch.Tensor, position: int) -> torch.Tensor:
        pairs = torch.view_as_complex(torch.stack(vector.chunk(2), -1).contiguous())
        angle = torch.tensor([position * 10000 ** (-2 * k / c.head_dim) for k in range(c.head_dim // 2)])
        turned = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag))

    def seen(t: int) -> slice:
        """Keys of position t."""
        starts = [i for i in range(t + 1) if c.doc_mask and inputs[i] == DOC]
        return slice(max([0, *starts[-1:], t + 1 - (c.window or t + 1)]), t + 1)

    x, depth = model.embed.weight.double()[inputs], c.num_layers
    for n, table in zip(c.ngrams, model.ngram_embeds, strict=True):
        for t in range(len(inputs)):
            row = c.ngram_rows - 1
            if t >= n - 1:
                products = [factor * int(inputs[t - back]) for back, factor in enumerate(FACTORS[:n])]
                row = reduce(operator.xor, products) % (c.ngram_rows - 1)
            x[t] += table.weight.double()[row]
    x = embedded = norm(x)
    for index, block in enumerate(model.blocks):
        if c.embed_skip:
            x = model.stream_scale[index].double() * x + model.embed_scale[index].double() * embedded
        table = index if index < c.value_embeds else index - (depth - c.value_embeds)
        wq, wk, wv = block.attention.qkv.double().reshape(3, -1, c.model_dim)
        h, heads = norm(x), []
        for head in range(c.num_heads):
            rows = slice(head * c.head_dim, (head + 1) * c.head_dim)
            q, k, v = h @ wq[rows].T, h @ wk[rows].T, h @ wv[rows].T
            if 0 <= table < c.value_embeds:
                factor = model.value_scale[table if index < c.value_embeds else table + c.value_embeds].double()
                v = v + factor * model.value_embeds[table].weight.double()[inputs][:, rows]
            q = torch.stack([rotate(norm(q[t]), t) for t in range(len(inputs))])
            k = torch.stack([rotate(norm(k[t]), t) for t in range(len(inputs))])
            scale = 1 / math.sqrt(c.head_dim)
            out = [torch.softmax(k[seen(t)] @ q[t] * scale, 0) @ v[seen(t)] for t in range(len(inputs))]
            heads.append(torch.stack(out))
        x = x + torch.cat(heads, -1) @ block.attention.out.double().T
        *gate, up = block.mlp.gate_up.double()
        h = norm(x)
        squared = (h @ up.T).clamp_min(0).square()
        neurons = h @ gate[0].T * torch.sigmoid(h @ gate[0].T) * (h @ up.T) if c.activation == "swiglu" else squared
        x = x + neurons @ block.mlp.down.double().T
    return c.softcap * torch.tanh(norm(x) @ model.head.weight.double().T / c.softcap)


FUSED: dict[str, Any] = dict(fused=("norm", "mlp", "head", "blocks"))
EVERYTHING: dict[str, Any] = dict(
    num_layers=5, doc_mask=True, window=7, value_embeds=2, embed_skip=True, ngrams=(2, 3), ngram_rows=97,
    mask_padding=True, z_loss=0.01,
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused": FUSED,
    "documents": dict(doc_mask=True),
    "window": dict(window=7),
    "value embeddings": dict(value_embeds=1),
    "value embeddings in every block": dict(value_embeds=2, num_layers=4),
    "embedding skip": dict(embed_skip=True),
    "n-grams": dict(ngrams=(2, 4), ngram_rows=50),
    "longest n-gram": dict(ngrams=(8,), ngram_rows=50, ngram_sparse=True),
    "squared ReLU": dict(activation="squared_relu"),
    "squared ReLU, fused": dict(activation="squared_relu") | FUSED,
    "padding masked": dict(mask_padding=True),
    "z-loss": dict(z_loss=0.01),
    "everything": EVERYTHING,
    "everything, fused": EVERYTHING | FUSED,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_loss_equals_the_equations_in_float64(option: str) -> None:
    model, inputs, targets = small_model(replace(SMALL, **OPTIONS[option])), tokens(3, 24), tokens(3, 24, seed=1)
    size = SMALL.vocab_size if model.config.mask_padding else SMALL.padded_vocab_size
    expected = z_loss = 0.0
    for row, target in zip(inputs, targets, strict=True):
        logits = reference_logits(model, row)[:, :size]
        expected += F.cross_entropy(logits, target, reduction="sum").item()
        z_loss += model.config.z_loss * logits.logsumexp(-1).square().sum().item()
    assert model(inputs, targets).item() == pytest.approx(expected + z_loss, rel=1e-5)
    with torch.no_grad():
        assert model(inputs, targets).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("part", FUSED["fused"])
def test_fused_parts_have_the_plain_gradients(part: str, options: dict[str, Any]) -> None:
    inputs, targets = tokens(3, 24), tokens(3, 24, seed=1)
    gradients = []
    for config in (replace(SMALL, **options), replace(SMALL, **options, fused=(part,))):
        model = small_model(config)
        model(inputs, targets).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("option", ["plain", "everything, fused"])
def test_compiled_it_is_one_graph_for_training_and_one_for_validation(option: str) -> None:
    """With fullgraph a break is an error; without, it is a slow model."""
    model, inputs, targets = small_model(replace(SMALL, **OPTIONS[option])), tokens(3, 24), tokens(3, 24, seed=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(inputs, targets), model(inputs, targets))
        losses = [run(inputs, targets) for run in (compiled, model)]
        torch.testing.assert_close(*losses)
        gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_a_window_that_is_handed_over_stands_in_for_the_configs() -> None:
    inputs, targets = tokens(2, 24), tokens(2, 24, seed=1)
    narrow, wide = (small_model(replace(SMALL, window=window))(inputs, targets) for window in (3, 9))
    model = small_model(replace(SMALL, window=9))
    for window in (3, torch.tensor(3)):
        torch.testing.assert_close(model(inputs, targets, window), narrow)
    torch.testing.assert_close(model(inputs, targets), wide)
    assert (narrow - wide).abs() > 1e-3


@pytest.mark.parametrize("head", ["none", "head"])
def test_ignored_targets_add_no_z_loss(head: Any) -> None:
    model = small_model(replace(SMALL, z_loss=0.1, fused=(head,)))
    inputs, targets = tokens(2, 24), tokens(2, 24, seed=1)
    first = model(inputs[:1], targets[:1])
    targets[1] = IGNORE_INDEX
    torch.testing.assert_close(model(inputs, targets), first)


def test_the_start_of_the_output_projections_and_the_head() -> None:
    """Zero unless a standard deviation is asked for, each on its own; nothing else differs but by the seed."""

    def spreads(**settings: float) -> list[float]:
        torch.manual_seed(0)
        block = (model := GPT(replace(SMALL, **settings), torch.float32)).blocks[0]
        return [
            p.detach().std().item() for p in (block.attention.out, block.mlp.down, model.head.weight, block.mlp.gate_up)
        ]

    default = spreads()
    assert default[:3] == [0, 0, 0]
    assert default[3] == pytest.approx(0.5 / 20**0.5, rel=0.1)
    for index, name in enumerate(("init_out", "init_down", "init_head")):
        found = spreads(**{name: 0.3})
        assert found[index] == pytest.approx(0.3, rel=0.1)
        assert [found[other] for other in range(3) if other != index] == [0, 0]


def test_the_mlp_keeps_its_product_and_nothing_else_of_its_size() -> None:
    """Fused; autograd alone keeps at least twice as much."""
    kept: dict[str, int] = {}
    for part in ("mlp", "none"):
        mlp, sizes = MLP(SMALL, {part}), {}
        for p in mlp.parameters():
            torch.nn.init.normal_(p)

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            if tensor.size(0) == 50 and tensor.size(-1) > 20:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // (50 * 4)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = mlp(torch.randn(50, 20, requires_grad=True))
        kept[part] = sum(sizes.values())
        del out
    assert kept["mlp"] <= 2 * 28
    assert kept["none"] >= 4 * 28


def test_new_options_start_where_their_sources_start_them() -> None:
    model = GPT(replace(SMALL, num_layers=4, value_embeds=1, embed_skip=True, ngrams=(2, 3)), torch.float32)
    assert model.stream_scale.tolist() == [1] * 4
    assert model.embed_scale.tolist() == [0] * 4
    assert [table.weight.abs().max().item() for table in model.ngram_embeds] == [0, 0]
    assert model.value_scale.tolist() == [0.5] * 2
    assert model.value_embeds[0].weight.std().item() == pytest.approx(1, abs=0.05)


def test_rows_shorter_than_an_n_gram_have_the_row_of_unknown_ones() -> None:
    for length in range(1, 9):
        rows = hashed_ngrams(tokens(2, length), 8, 97)
        assert rows.shape == (2, length)
        assert (rows[:, :7] == 96).all()
    assert (rows[:, 7] < 96).all()


def test_sparse_gradients_of_tables_are_the_dense_ones() -> None:
    gradients = []
    for ngram_sparse in (False, True):
        model = small_model(replace(SMALL, ngrams=(2, 3), ngram_rows=97, ngram_sparse=ngram_sparse))
        model(tokens(2, 24), tokens(2, 24, seed=1)).backward()
        gradients.append([table.weight.grad for table in model.ngram_embeds])
        assert all(gradient.is_sparse == ngram_sparse for gradient in gradients[-1])
    torch.testing.assert_close(gradients[0], [gradient.to_dense() for gradient in gradients[1]])


def test_a_tied_head_starts_equal_and_near_the_uniform_guess_and_gets_the_sum_of_both_gradients() -> None:
    model = GPT(replace(SMALL, tie_head_steps=1), torch.float32)
    assert torch.equal(model.embed.weight, model.head.weight)
    loss = model(tokens(2, 24), tokens(2, 24, seed=1))
    assert loss.item() == pytest.approx(48 * math.log(SMALL.padded_vocab_size), rel=0.01)
    loss.backward()
    embed, head = (model.embed.weight.grad.clone(), model.head.weight.grad.clone())
    model.tie_gradients()
    torch.testing.assert_close(model.embed.weight.grad, embed + head)
    assert torch.equal(model.head.weight.grad, model.embed.weight.grad)


def test_a_new_model_guesses_uniformly() -> None:
    model = GPT(SMALL, torch.float32)
    inputs = tokens(2, 24)
    assert model(inputs, inputs).item() == pytest.approx(48 * math.log(SMALL.padded_vocab_size), rel=1e-6)


def test_the_future_is_not_seen() -> None:
    model, inputs = small_model(), tokens(1, 24)
    changed = inputs.clone()
    changed[0, 15:] = (changed[0, 15:] + 7) % 50
    hidden, other = model.hidden(inputs), model.hidden(changed)
    assert torch.equal(hidden[:, :15], other[:, :15])
    assert (hidden[:, 15:] != other[:, 15:]).any(-1).all()


def test_ignored_targets_add_nothing() -> None:
    model, inputs, targets = small_model(), tokens(2, 24), tokens(2, 24, seed=1)
    both = model(inputs, targets)
    first = model(inputs[:1], targets[:1])
    targets[1] = IGNORE_INDEX
    torch.testing.assert_close(model(inputs, targets), first)
    assert both > first


def test_bfloat16_products_stay_near_float32_and_gradients_are_float32() -> None:
    inputs, targets = tokens(2, 24), tokens(2, 24, seed=1)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = small_model()
        model.dtype = dtype
        loss = model(inputs.int(), targets) / 48
        loss.backward()
        losses.append(loss.item())
        assert loss.dtype == torch.float32
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_flops_per_token_is_what_torch_counts() -> None:
    """torch's counter sees every matrix product of one forward and backward pass, attention without causality."""
    model, inputs = small_model(), tokens(4, 24)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(inputs, inputs).backward()
    assert model.flops_per_token() * inputs.numel() == counter.get_total_flops()


def test_tables_cost_no_flops_and_a_window_costs_its_keys() -> None:
    plain, tables, window = (
        small_model(replace(SMALL, **options)) for options in ({}, dict(value_embeds=1), dict(window=6))
    )
    scales = 6 * 2  # the two learned factors, counted as weights are
    assert tables.flops_per_token() == plain.flops_per_token() + scales
    assert tables.num_params() == plain.num_params() + 64 * 24 + 2
    assert plain.flops_per_token() - window.flops_per_token() == 12 * 2 * 24 * (24 - 6)


def test_generation_is_reproducible_stays_in_the_vocabulary_and_slides() -> None:
    model = small_model()
    first, again = ([*generate(model, [3], 40, torch.Generator().manual_seed(5))] for _ in range(2))
    assert first == again
    assert len(first) == 40  # longer than seq_len = 24
    assert max(first) < SMALL.vocab_size < SMALL.padded_vocab_size


@pytest.mark.parametrize(
    ("config", "millions"), [("fineweb_124m_aurora", 162), ("fineweb_355m_aurora", 407), ("fineweb_1b_aurora", 1117)]
)
def test_sizes_of_the_recipes_by_building_them_on_meta(config: str, millions: int) -> None:
    recipe = tomllib.loads((ROOT / f"configs/{config}.toml").read_text(encoding="utf-8"))
    shape = {key: recipe[key] for key in ModelConfig.__dataclass_fields__ if key in recipe}
    with torch.device("meta"):
        model = GPT(ModelConfig(**shape))
    assert round(model.num_params() / 1e6) == millions
    assert f"{model.num_params():,}" in (ROOT / f"configs/{config}.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["plain", "fused", "options"])
def test_torch_s_default_dtype_changes_nothing(default: torch.dtype, how: str) -> None:
    """Parameters, rotary tables, masks and arithmetic: the same bits."""
    options = dict(value_embeds=1, embed_skip=True, ngrams=(2,), z_loss=1e-3, tie_head_steps=1, doc_mask=True, window=5)
    config, results = replace(SMALL, **dict(plain={}, fused=FUSED, options=options)[how]), []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            model = small_model(config)
            loss = model(tokens(2, 24), tokens(2, 24, seed=1))
            loss.backward()
        finally:
            torch.set_default_dtype(torch.float32)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([loss.detach(), *model.parameters(), *model.buffers(), *gradients])
    assert {value.dtype for value in results[1]} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
