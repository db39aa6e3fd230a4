"""AdamW with cautious decay against a float64 transcription, and betas of each of its groups."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from model import GPT, ModelConfig
from optim import OptimizerConfig, build_optimizers
from optim.adamw import CautiousAdamW
from optim.replicated import replicate
from tests.matrices import randn

SHAPES = {"matrix": (4, 6), "vector": (5,), "rare": (3, 2)}  # "rare" has a gradient in every third step
GROUPS = [
    dict(lr=0.05, betas=(0.8, 0.95), weight_decay=0.5),
    dict(lr=0.02, betas=(0.6, 0.9), weight_decay=0.0),
    dict(lr=0.1, betas=(0.9, 0.99), weight_decay=2.0),
]


def gradient(name: str, step: int) -> torch.Tensor | None:
    if name == "rare" and step % 3 != 1:
        return None
    return randn(*SHAPES[name], seed=100 * len(name) + step).double()


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(randn(*shape, seed=len(name)).double()) for name, shape in SHAPES.items()}


def cautious(params: dict[str, nn.Parameter], fused: bool) -> CautiousAdamW:
    groups: list[dict[str, Any]] = [
        {"params": [p], **options} for p, options in zip(params.values(), GROUPS, strict=True)
    ]
    return CautiousAdamW(groups, eps=1e-10, fused=fused)


def train(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for group, options in zip(optimizer.param_groups, GROUPS, strict=True):
            group["lr"] = options["lr"] * (1 - step / 60)  # type: ignore[operator]
        for name, p in params.items():
            p.grad = gradient(name, step)
        optimizer.step()


def by_definition(name: str, options: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The weights after 50 steps."""
    W = randn(*SHAPES[name], seed=len(name)).double().numpy()
    m, v, t = np.zeros_like(W), np.zeros_like(W), 0
    (beta1, beta2), decay = options["betas"], options["weight_decay"]
    for step in range(50):
        lr = options["lr"] * (1 - step / 60)
        found = gradient(name, step)
        if found is None:
            continue
        G, t = found.numpy(), t + 1
        m = beta1 * m + (1 - beta1) * G
        v = beta2 * v + (1 - beta2) * G**2
        U = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + 1e-10)
        W = W - lr * decay * np.where(U * W > 0, W, 0.0) - lr * U
    return W


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_cautious_decay_is_its_definition_over_50_steps(fused: bool) -> None:
    params = parameters()
    train(cautious(params, fused), params, range(50))
    for (name, p), options in zip(params.items(), GROUPS, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), by_definition(name, options), rtol=0, atol=1e-12)


def test_a_product_that_rounds_to_zero_still_decays() -> None:
    p = nn.Parameter(torch.full((3,), 1e-30))
    p.grad = torch.tensor([1e-30, -1e-30, 0.0])
    CautiousAdamW([p], lr=0.5, weight_decay=1.0, eps=1e38).step()  # an update of nothing
    torch.testing.assert_close(p.detach(), torch.tensor([0.5e-30, 1e-30, 1e-30]), rtol=1e-6, atol=0)


def test_the_state_is_torchs_and_goes_both_ways() -> None:
    whole, params, plain_params = parameters(), parameters(), parameters()
    train(cautious(whole, True), whole, range(20))
    first = cautious(params, True)
    train(first, params, range(10))
    plain = torch.optim.AdamW([{"params": [p]} for p in plain_params.values()])
    plain.load_state_dict(first.state_dict())
    second = cautious(params, True)
    second.load_state_dict(plain.state_dict())
    assert [group["weight_decay"] for group in second.param_groups] == [0.5, 0.0, 2.0]
    train(second, params, range(10, 20))
    for name, p in params.items():
        assert torch.equal(p, whole[name])


def test_hooks_run_once_before_the_decay() -> None:
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # from now on torch's own step calls hooks, too
    p, calls = nn.Parameter(torch.ones(2)), []
    optimizer = replicate(CautiousAdamW([p], lr=0.1, weight_decay=1.0, betas=(0.0, 0.0), eps=1e-30))

    def turn(*_: Any) -> None:
        calls.append(1)
        p.grad = -torch.ones(2)

    optimizer.register_step_pre_hook(turn)
    p.grad = torch.ones(2)
    optimizer.step()
    assert calls == [1]
    torch.testing.assert_close(p.detach(), torch.full((2,), 1.1))  # away from zero: no decay
    assert optimizer.step(lambda: 7) == 7


def test_settings_reach_each_group() -> None:
    model = GPT(ModelConfig(vocab_size=50, num_layers=1, num_heads=2, head_dim=8, model_dim=16, seq_len=8))
    model.gain = nn.Parameter(torch.ones(16))

    def betas(**settings: Any) -> dict[str, Any]:
        rest = build_optimizers(model, OptimizerConfig(**settings))[1]
        assert isinstance(rest, CautiousAdamW) == ("adamw_cautious" in settings)
        return {group["name"]: group["betas"] for group in rest.param_groups}

    assert betas() == dict.fromkeys(("embed", "head", "scalar"), (0.8, 0.95))
    assert betas(adamw_cautious=True, head_betas=(0.5, 0.6)) == {
        "embed": (0.8, 0.95), "head": (0.5, 0.6), "scalar": (0.8, 0.95),
    }  # fmt: skip
    given = dict(embed_betas=(0.1, 0.2), scalar_betas=(0.0, 0.3), adam_betas=(0.4, 0.7))
    assert betas(**given) == {"embed": (0.1, 0.2), "head": (0.4, 0.7), "scalar": (0.0, 0.3)}
