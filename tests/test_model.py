"""The GPT against a plain transcription of its equations, and its bookkeeping against torch's own counters."""

import math
import tomllib

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, IGNORE_INDEX, ModelConfig
from tests.conftest import ROOT

SMALL = ModelConfig(vocab_size=50, num_layers=2, num_heads=3, head_dim=8, model_dim=20, mlp_hidden=28, seq_len=24)


def small_model(config: ModelConfig = SMALL) -> GPT:
    torch.manual_seed(0)
    model = GPT(config, torch.float32)
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

    x = norm(model.embed.weight.double()[inputs])
    for block in model.blocks:
        wq, wk, wv = block.attention.qkv.double()
        h, heads = norm(x), []
        for head in range(c.num_heads):
            rows = slice(head * c.head_dim, (head + 1) * c.head_dim)
            q, k, v = h @ wq[rows].T, h @ wk[rows].T, h @ wv[rows].T
            q = torch.stack([rotate(norm(q[t]), t) for t in range(len(inputs))])
            k = torch.stack([rotate(norm(k[t]), t) for t in range(len(inputs))])
            out = [torch.softmax(k[: t + 1] @ q[t] / math.sqrt(c.head_dim), 0) @ v[: t + 1] for t in range(len(inputs))]
            heads.append(torch.stack(out))
        x = x + torch.cat(heads, -1) @ block.attention.out.double().T
        gate, up = block.mlp.gate_up.double()
        h = norm(x)
        x = x + (h @ gate.T * torch.sigmoid(h @ gate.T) * (h @ up.T)) @ block.mlp.down.double().T
    return c.softcap * torch.tanh(norm(x) @ model.head.weight.double().T / c.softcap)


def test_loss_equals_the_equations_in_float64() -> None:
    model, inputs, targets = small_model(), tokens(3, 24), tokens(3, 24, seed=1)
    expected = sum(
        F.cross_entropy(reference_logits(model, row), target, reduction="sum")
        for row, target in zip(inputs, targets, strict=True)
    )
    assert model(inputs, targets).item() == pytest.approx(expected.item(), rel=1e-5)


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


def test_generation_is_reproducible_stays_in_the_vocabulary_and_slides() -> None:
    model = small_model()
    first, again = (model.generate([3], 40, torch.Generator().manual_seed(5)) for _ in range(2))
    assert first == again
    assert len(first) == 40  # longer than seq_len = 24
    assert max(first) < SMALL.vocab_size < SMALL.padded_vocab_size


@pytest.mark.parametrize(
    ("config", "millions"), [("fineweb_124m_aurora", 162), ("fineweb_355m_aurora", 407), ("fineweb_1b_aurora", 1117)]
)
def test_sizes_of_the_recipes_by_building_them_on_meta(config: str, millions: int) -> None:
    recipe = tomllib.loads((ROOT / f"configs/{config}.toml").read_text())
    shape = {key: recipe[key] for key in ModelConfig.__dataclass_fields__ if key in recipe}
    with torch.device("meta"):
        model = GPT(ModelConfig(**shape))
    assert round(model.num_params() / 1e6) == millions
    assert f"{model.num_params():,}" in (ROOT / f"configs/{config}.toml").read_text()
