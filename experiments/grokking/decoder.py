"""A small decoder made of the GPT's own parts (model.py), with a choice of what turns scores into weights.

Softmax, stablemax and sparsemax, each in attention and in the loss:

    softmax     exp(z_i) / sum_j exp(z_j); loss: cross-entropy
    stablemax   s(z_i) / sum_j s(z_j) with s(z) = z + 1 for z >= 0, else 1 / (1 - z); loss: -log of the target's
                (Prieto et al., arXiv 2501.04697)
    sparsemax   the nearest point to z of the probability simplex; loss: 1/2 (1 + sum over the support of
                z_j^2 - tau^2) - z_target (Martins and Astudillo, arXiv 1602.02068)

Shape suffixes as in model.py, and Q: positions that are asked.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fused import rms_norm
from model import GPT, Attention, Block, ModelConfig

MASKED = -1e30  # a score that gets no weight from any of the three, and no NaN from its gradient


def stable_exp(z: Tensor) -> Tensor:
    """s(z) above; both branches are evaluated, so each on numbers that keep it finite."""
    return torch.where(z >= 0, z.clamp(min=0) + 1, 1 / (1 - z.clamp(max=0)))


def stablemax(z: Tensor) -> Tensor:
    """Over the last dimension, same shape."""
    weights = stable_exp(z)
    return weights / weights.sum(-1, keepdim=True)


def sparsemax_threshold(z: Tensor) -> tuple[Tensor, Tensor]:
    """tau [..., 1], with sum(max(z - tau, 0)) = 1, and the support as booleans [..., n], over the last dimension."""
    sorted_z = z.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, z.size(-1) + 1, dtype=z.dtype, device=z.device)
    sums = sorted_z.cumsum(-1)
    num_support = (1 + ranks * sorted_z > sums).sum(-1, keepdim=True)
    tau = (sums.gather(-1, num_support - 1) - 1) / num_support
    return tau, z > tau


def sparsemax(z: Tensor) -> Tensor:
    """Over the last dimension, same shape."""
    return (z - sparsemax_threshold(z)[0]).clamp(min=0)


def stablemax_loss(logits_BV: Tensor, targets_B: Tensor) -> Tensor:
    weights_BV = stable_exp(logits_BV)
    return (weights_BV.sum(-1).log() - weights_BV.gather(-1, targets_B[:, None])[:, 0].log()).mean()


def sparsemax_loss(logits_BV: Tensor, targets_B: Tensor) -> Tensor:
    tau, support = sparsemax_threshold(logits_BV)
    squares = torch.where(support, logits_BV.square() - tau.square(), 0).sum(-1)
    return ((1 + squares) / 2 - logits_BV.gather(-1, targets_B[:, None])[:, 0]).mean()


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "stablemax": stablemax,
    "sparsemax": sparsemax,
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": F.cross_entropy,  # nats a row, mean
    "stablemax": stablemax_loss,
    "sparsemax": sparsemax_loss,
}


class Decoder(GPT):
    """Logits of the answer for rows of tokens. One token is answered, so the last block is computed for it alone."""

    def __init__(self, config: ModelConfig, attention: str) -> None:
        super().__init__(config, torch.float32)
        self.weights = WEIGHTS[attention]

    def forward(self, inputs_BT: Tensor, num_classes: int) -> Tensor:  # type: ignore[override]
        """Token ids [B, T] to float32 logits [B, num_classes], without the GPT's soft cap."""
        num_tokens, vocab_size = inputs_BT.size(1), self.embed.num_embeddings
        # The first block's q, k and v depend on token and position alone: a table of them is smaller than a batch.
        table_VTD = rms_norm(self.embed.weight)[:, None].expand(-1, num_tokens, -1)
        place_BT = inputs_BT * num_tokens + torch.arange(num_tokens, device=inputs_BT.device)
        x_BTD = F.embedding(inputs_BT, table_VTD[:, 0])
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            asked = slice(-1, None) if index == len(self.blocks) - 1 else slice(None)
            if index == 0:
                tables = self.project(block.attention, rms_norm(table_VTD))
                q_BQHK, k_BTHK, v_BTHK = (
                    F.embedding(place, table.reshape(vocab_size * num_tokens, -1)).unflatten(-1, table.shape[2:])
                    for place, table in zip((place_BT[:, asked], place_BT, place_BT), tables, strict=True)
                )
            else:
                q_BTHK, k_BTHK, v_BTHK = self.project(block.attention, rms_norm(x_BTD))
                q_BQHK = q_BTHK[:, asked]
            x_BQD = x_BTD[:, asked] + F.linear(self.attend(q_BQHK, k_BTHK, v_BTHK), block.attention.out)
            x_BTD = x_BQD + block.mlp(rms_norm(x_BQD))
        return F.linear(rms_norm(x_BTD[:, -1]), self.head.weight[:num_classes])

    def project(self, attention: Attention, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, T, H, K] as model.Attention has them."""
        qkv = F.linear(x_BTD, attention.qkv.flatten(0, 1)).unflatten(-1, (3, -1, attention.head_dim))
        q_BTHK, k_BTHK, v_BTHK = qkv.unbind(2)
        return self.rotary(rms_norm(q_BTHK)), self.rotary(rms_norm(k_BTHK)), v_BTHK

    def attend(self, q_BQHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        """Causal attention of the last Q of T positions with this decoder's weights, [B, Q, H*K].

        Sums of products: for a few positions a head, batched matrix products are slower.
        """
        num_asked, num_tokens = q_BQHK.size(1), k_BTHK.size(1)
        scores_BQHT = (q_BQHK[:, :, None] * k_BTHK[:, None]).sum(-1).mT / q_BQHK.size(-1) ** 0.5
        position_T = torch.arange(num_tokens, device=scores_BQHT.device)
        is_later_Q1T = position_T > position_T[-num_asked:, None, None]
        weights_BQHT = self.weights(scores_BQHT.masked_fill(is_later_Q1T, MASKED))
        return (weights_BQHT.mT[..., None] * v_BTHK[:, None]).sum(2).flatten(2)
