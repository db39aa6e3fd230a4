"""A stack of small decoders, each the GPT of model.py, with a choice of what turns scores into weights.

Softmax, stablemax and sparsemax, each in attention and in the loss:

    softmax     exp(z_i) / sum_j exp(z_j); loss: cross-entropy
    stablemax   s(z_i) / sum_j s(z_j) with s(z) = z + 1 for z >= 0, else 1 / (1 - z); loss: -log of the target's
                (Prieto et al., arXiv 2501.04697)
    sparsemax   the nearest point to z of the probability simplex; loss: 1/2 (1 + sum over the support of
                z_j^2 - tau^2) - z_target (Martins and Astudillo, arXiv 1602.02068)

Models this small are bound by the number of operations, not by their size: one process computes R of them at once, as
products of stacked matrices. Shape suffixes as in model.py, and R: models, N: rows of the task's table, U: places,
Q: positions that are asked.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import stack_module_state

from kernels.fused import rms_norm, rotate
from model import GPT, ModelConfig, Rotary

MATRICES = "attention.qkv", "attention.out", "mlp.gate_up", "mlp.down"  # of a block
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
    num_support = (1 + ranks * sorted_z > sums).sum(-1, keepdim=True).clamp_min(1)  # 0 of none that is finite
    tau = (sums.gather(-1, num_support - 1) - 1) / num_support
    return tau, z > tau


def sparsemax(z: Tensor) -> Tensor:
    """Over the last dimension, same shape."""
    return (z - sparsemax_threshold(z)[0]).clamp(min=0)


def stablemax_loss(logits_BV: Tensor, targets_B: Tensor) -> Tensor:
    weights_BV = stable_exp(logits_BV)
    return weights_BV.sum(-1).log() - weights_BV.gather(-1, targets_B[:, None])[:, 0].log()


def sparsemax_loss(logits_BV: Tensor, targets_B: Tensor) -> Tensor:
    tau, support = sparsemax_threshold(logits_BV)
    squares = torch.where(support, logits_BV.square() - tau.square(), 0).sum(-1)
    return (1 + squares) / 2 - logits_BV.gather(-1, targets_B[:, None])[:, 0]


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "stablemax": stablemax,
    "sparsemax": sparsemax,
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # logits [B, V] and targets [B] to losses [B]
    "softmax": lambda logits_BV, targets_B: F.cross_entropy(logits_BV, targets_B, reduction="none"),  # nats
    "stablemax": stablemax_loss,
    "sparsemax": sparsemax_loss,
}


def stacked_weights(config: ModelConfig, seeds: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """The float32 parameters of new GPTs by name, each with a leading dimension R: one model per seed, as it is made
    after torch.manual_seed(seed)."""
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        with device:
            models.append(GPT(config, torch.float32))
    weights, _ = stack_module_state(models)
    return weights


def norm(x: Tensor) -> Tensor:
    return rms_norm(x, is_fused=True)


def product(x_RBQD: Tensor, weight_RMD: Tensor) -> Tensor:
    """Every model's own matrix, [R, B, Q, M]."""
    return (x_RBQD.flatten(1, -2) @ weight_RMD.mT).unflatten(1, x_RBQD.shape[1:-1])


class Decoders:
    """Logits of the answers of R models to rows of one table of tokens, `inputs_NT` [N, T].

    Only the last position is answered, so the last block is computed for it alone. What the first block makes of a
    position depends on its token alone: it is computed once for each pair of token and position (a place) of the table.
    """

    def __init__(self, config: ModelConfig, inputs_NT: Tensor, attention: str = "softmax", is_causal: bool = True):
        self.config, self.weigh, self.is_causal = config, WEIGHTS[attention], is_causal
        num_tokens = inputs_NT.size(1)
        self.position_T = torch.arange(num_tokens, device=inputs_NT.device)
        place_U, self.place_NT = torch.unique(inputs_NT * num_tokens + self.position_T, return_inverse=True)
        self.token_U, self.position_U = place_U // num_tokens, place_U % num_tokens
        rotary = Rotary(config.head_dim, num_tokens).to(inputs_NT.device)
        self.cos_TK, self.sin_TK = rotary.cos_TK, rotary.sin_TK

    def __call__(self, weights: Mapping[str, Tensor], rows_RB: Tensor, num_classes: int) -> Tensor:
        """[R, B, num_classes], without the GPT's soft cap, of the parameters of `stacked_weights` and of the rows of
        the table with these numbers, each model's own."""
        model_R11 = torch.arange(rows_RB.size(0), device=rows_RB.device)[:, None, None]
        place_RBT = self.place_NT[rows_RB] + model_R11 * len(self.token_U)  # in the tables of all models, end to end
        x = norm(weights["embed.weight"])[:, self.token_U]  # [R, U, D]; after a block [R, B, T, D], of what was asked
        last = self.config.num_layers - 1
        for index in range(last + 1):
            qkv, out, gate_up, down = (weights[f"blocks.{index}.{name}"] for name in MATRICES)
            asked = slice(-1, None) if index == last else slice(None)
            if index == 0:
                tables = *self.project(x, qkv, self.position_U), x
                places = place_RBT[..., asked], place_RBT, place_RBT, place_RBT[..., asked]
                q_RBQHK, k_RBTHK, v_RBTHK, x_RBQD = (
                    F.embedding(place, table.flatten(0, 1).flatten(1)).unflatten(-1, table.shape[2:])
                    for table, place in zip(tables, places, strict=True)
                )
            else:
                q_RBTHK, k_RBTHK, v_RBTHK = self.project(x, qkv, self.position_T)
                q_RBQHK, x_RBQD = q_RBTHK[:, :, asked], x[:, :, asked]
            x_RBQD = x_RBQD + product(self.attend(q_RBQHK, k_RBTHK, v_RBTHK), out)
            gate, up = product(norm(x_RBQD), gate_up.flatten(1, 2)).chunk(2, dim=-1)
            x = x_RBQD + product(F.silu(gate) * up, down)
        return product(norm(x), weights["head.weight"][:, :num_classes])[:, :, -1]

    def project(self, x: Tensor, qkv_R3MD: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [R, ..., H, K] as model.Attention has them, of x [R, ..., D] at these positions."""
        products = product(norm(x), qkv_R3MD.flatten(1, 2)).unflatten(-1, (3, -1, self.config.head_dim))
        q, k, v = products.unbind(-3)
        cos, sin = self.cos_TK[position][:, None], self.sin_TK[position][:, None]
        return rotate(norm(q), cos, sin, is_fused=True), rotate(norm(k), cos, sin, is_fused=True), v

    def attend(self, q_RBQHK: Tensor, k_RBTHK: Tensor, v_RBTHK: Tensor) -> Tensor:
        """Attention of the last Q of T positions, [R, B, Q, H*K]. Sums of products: for a few positions a head, batched
        matrix products are slower."""
        num_asked = q_RBQHK.size(2)
        scores_RBQHT = (q_RBQHK[:, :, :, None] * k_RBTHK[:, :, None]).sum(-1).mT / q_RBQHK.size(-1) ** 0.5
        if self.is_causal and num_asked > 1:
            is_later_Q1T = self.position_T > self.position_T[-num_asked:, None, None]
            scores_RBQHT = scores_RBQHT.masked_fill(is_later_Q1T, MASKED)
        weights_RBQHT = self.weigh(scores_RBQHT)
        return (weights_RBQHT.mT[..., None] * v_RBTHK[:, :, None]).sum(3).flatten(3)
