"""Attention three ways, each against a loop over positions in float64."""

import pytest
import torch
from torch import Tensor

from kernels import attention as attention_module
from kernels.attention import BLOCK, attention
from model import GPT, ModelConfig

DOC = 7
HAS_GPU = torch.cuda.is_available()
with_kind = pytest.mark.parametrize("kind", ["sdpa", "blocks"])
with_limits = pytest.mark.parametrize(
    ("doc_token", "window"), [(None, None), (DOC, None), (None, 5), (DOC, 5), (None, 1), (DOC, 1000)],
    ids=["causal", "documents", "window", "documents, window", "window of 1", "documents, window longer than the row"],
)  # fmt: skip


def token_ids(rows: int, length: int) -> Tensor:
    """Ragged documents: rows that start in the middle of one, at its first token, and one without any beginning."""
    ids = torch.randint(0, 20, (rows, length), generator=torch.Generator().manual_seed(length))
    ids[ids == DOC] = 0
    for start in (3, 4, 40, 110):  # a document of one token, and some longer than the window of 5
        ids[0, start:][:1] = DOC
    ids[1 % rows, 0] = DOC
    return ids


def qkv(rows: int, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * length)
    return [torch.randn(rows, length, 2, 6, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def position_by_position(
    ids: Tensor, q: Tensor, k: Tensor, v: Tensor, doc_token: int | None, window: int | None
) -> Tensor:
    """What each position sees, found by walking back from it."""
    out = torch.zeros_like(v)
    for row in range(ids.size(0)):
        for i in range(ids.size(1)):
            seen = [i]
            while seen[-1] > 0 and ids[row, seen[-1]] != doc_token and (window is None or len(seen) < window):
                seen.append(seen[-1] - 1)
            weights = torch.einsum("hk,thk->th", q[row, i], k[row, seen]) / q.size(-1) ** 0.5
            out[row, i] = torch.einsum("th,thk->hk", weights.softmax(0), v[row, seen])
    return out


@with_limits
@with_kind
@pytest.mark.parametrize("length", [1, 17, BLOCK + 9])
def test_each_position_sees_what_it_may(kind: str, length: int, doc_token: int | None, window: int | None) -> None:
    ids, parts = token_ids(3, length), qkv(3, length)
    expected = position_by_position(ids, *(part.detach() for part in parts), doc_token, window)
    torch.testing.assert_close(attention(kind, ids, doc_token, window)(*parts), expected, rtol=1e-10, atol=1e-12)


@with_limits
@pytest.mark.parametrize("length", [17, 2 * BLOCK + 1])
def test_written_out_gradients_are_those_of_the_dense_mask(
    length: int, doc_token: int | None, window: int | None
) -> None:
    ids, parts, weight = token_ids(2, length), qkv(2, length), qkv(2, length)[0].detach() + 0.5
    gradients = {
        kind: torch.autograd.grad(attention(kind, ids, doc_token, window)(*parts), parts, weight)
        for kind in ("sdpa", "blocks")
    }
    for ours, dense in zip(gradients["blocks"], gradients["sdpa"], strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12)


@with_limits
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_sees_the_same(doc_token: int | None, window: int | None) -> None:
    """Forward and uncompiled: on a CPU flex_attention has no gradient. The last tests here are of a GPU."""
    ids, parts = token_ids(2, 150), [part.detach() for part in qkv(2, 150)]
    limit = window if window is None else torch.tensor(window)  # a tensor, as on a GPU
    flex = attention("flex", ids, doc_token, limit)(*parts)
    torch.testing.assert_close(flex, attention("sdpa", ids, doc_token, window)(*parts), rtol=1e-10, atol=1e-12)


def test_blocks_leave_out_keys_that_none_of_their_queries_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in a key outside every window of the later blocks does not reach them, as it would through a mask."""
    monkeypatch.setattr(attention_module, "BLOCK", 8)
    ids, (q, k, v) = token_ids(1, 32), (part.detach() for part in qkv(1, 32))
    k[:, :9] = torch.nan
    out = attention("blocks", ids, None, 4)(q, k, v)
    assert out[:, :12].isnan().any()
    assert not out[:, 16:].isnan().any()


def test_in_bfloat16_blocks_err_little_more_than_torchs_own_kernel() -> None:
    """Probabilities and gradients are rounded once more: at most twice the distance to float64."""
    ids, exact = token_ids(4, 200), qkv(4, 200)
    weight = torch.randn(4, 200, 2, 6, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    reference_parts = [part.detach().to(torch.bfloat16).double().requires_grad_() for part in exact]

    def results(kind: str, parts: list[Tensor]) -> list[Tensor]:
        out = attention(kind, ids)(*parts)
        return [out, *torch.autograd.grad(out, parts, weight.to(out.dtype))]

    reference = results("sdpa", reference_parts)
    errors = {}
    for kind in ("sdpa", "blocks"):
        found = results(kind, [part.detach().to(torch.bfloat16).requires_grad_() for part in reference_parts])
        errors[kind] = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, reference, strict=True)]
    assert all(ours < 2 * torchs for ours, torchs in zip(errors["blocks"], errors["sdpa"], strict=True)), errors


def test_auto_is_sdpa_until_there_is_something_to_leave_out() -> None:
    ids, parts = token_ids(2, 40), qkv(2, 40, torch.float32)
    plain = torch.nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts), is_causal=True)
    assert torch.equal(attention("auto", ids)(*parts), plain.transpose(1, 2))
    dense = attention("sdpa", ids, DOC)(*parts)
    assert HAS_GPU or torch.equal(attention("auto", ids, DOC)(*parts), dense)


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
@with_limits
@pytest.mark.parametrize("length", [256, 300])
def test_flex_has_the_gradients_of_the_dense_mask(length: int, doc_token: int | None, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, length, 2, 64, generator=generator).cuda().requires_grad_() for _ in range(3)]
    weight, ids = torch.randn(2, length, 2, 64, generator=generator).cuda(), token_ids(2, length).cuda()
    limit = window if window is None else torch.tensor(window, device="cuda")
    found, right = (
        (out, *torch.autograd.grad(out, parts, weight))
        for out in (attention("flex", ids, doc_token, limit)(*parts), attention("sdpa", ids, doc_token, window)(*parts))
    )
    for ours, dense in zip(found, right, strict=True):
        assert ((ours - dense).norm() / dense.norm()).item() < 5e-3  # products may be in TF32


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
def test_a_window_that_grows_compiles_nothing_anew() -> None:
    from torch._dynamo.utils import counters

    config = ModelConfig(
        vocab_size=50, num_layers=2, num_heads=2, head_dim=64, model_dim=64, seq_len=256, doc_mask=True
    )
    with torch.device("cuda"):
        model, window = GPT(config, doc_token=DOC), torch.tensor(32)
    compiled, ids = torch.compile(model, dynamic=False, fullgraph=True), token_ids(2, 256).cuda()
    compiled(ids, ids, window).backward()
    graphs = counters["stats"]["unique_graphs"]
    for size in (64, 256):
        window.fill_(size)
        loss = compiled(ids, ids, window)
        loss.backward()
        torch.testing.assert_close(loss, model(ids, ids, window), rtol=1e-2, atol=0)
    assert counters["stats"]["unique_graphs"] == graphs
