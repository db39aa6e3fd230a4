"""The GPT of the optimization track of the modded-nanogpt speedruns (their track 3): architecture = "track3".

Where it differs from model.py with activation = "squared_relu":

  norms       have a learned gain, 1 at the start: after the embedding, before attention, MLP and head
  biases      of every matrix, the head's too, 0 at the start
  positions   pair j of K/4 is rotated by -position / 1024^(j / (K/4 - 1)), in float32; the other K/4 pairs are not
  attention   scores are 0.12 q k instead of q k / sqrt(K)
  logits      z softcap / sqrt(z^2 + softcap^2) instead of softcap tanh(z / softcap)
  embedding   a parameter in the dtype of matrix products
  start       Q, K, V and the MLP's input matrices are normal with variance 0.33 / fan-in

Source: result 36 of that track, whose settings are in configs/track3_*.toml. The track sums its loss over the tokens of
a step where this repository's trainer takes the mean: the same for Muon and its relatives up to rounding, and for AdamW
with adam_eps divided by the number of tokens.
"""

import math

import torch
from torch import Tensor, nn

from kernels.attention import Attend
from kernels.fused import rotate
from kernels.linear import linear
from model import GPT, MLP, Attention, Block, ModelConfig, Rotary, empty

SCORE_SCALE = 0.12
INIT_VARIANCE = 0.33  # times the fan-in


def bias(size: int) -> nn.Parameter:
    """One-dimensional, also of a stack of matrices: what has more dimensions is moved as a matrix."""
    return nn.Parameter(empty(size).zero_())


def gain(size: int) -> nn.Parameter:
    return nn.Parameter(empty(size).fill_(1))


class Track3Rotary(Rotary):
    """`rotate` turns by +angle. Queries and keys alike are scaled by the root of what 1 / sqrt(K) lacks of the score's
    scale, which costs nothing here."""

    def __init__(self, head_dim: int, seq_len: int, is_fused: bool = False) -> None:
        super().__init__(head_dim, seq_len, is_fused)
        frequency = (1 / 1024) ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float32)
        frequency_K = torch.cat([frequency, torch.zeros_like(frequency)])
        angle_TK = -torch.outer(torch.arange(seq_len, dtype=torch.float32), frequency_K)
        scale = math.sqrt(SCORE_SCALE * math.sqrt(head_dim))
        self.cos_TK, self.sin_TK = scale * angle_TK.cos(), scale * angle_TK.sin()

    def forward(self, x_BTHK: Tensor, start: int = 0) -> Tensor:
        cos, sin = (angle[start : start + x_BTHK.size(1), None] for angle in (self.cos_TK, self.sin_TK))
        return rotate(x_BTHK.float(), cos, sin, self.is_fused).to(x_BTHK.dtype)


class Track3Attention(Attention):
    def __init__(self, config: ModelConfig, parts: set[str]) -> None:
        super().__init__(config, parts)
        self.qkv_bias, self.out_bias = bias(3 * config.num_heads * config.head_dim), bias(config.model_dim)

    def forward(self, x_BTD: Tensor, rotary: Rotary, attend: Attend, value_BTHK: Tensor | None = None) -> Tensor:
        qkv_BTHK = linear(x_BTD, self.qkv, self.qkv_bias).unflatten(-1, (-1, self.head_dim))
        qk_BTHK, v_BTHK = qkv_BTHK.split((2 * self.num_heads, self.num_heads), dim=2)
        q_BTHK, k_BTHK = rotary(self.norm(qk_BTHK)).chunk(2, dim=2)
        if value_BTHK is not None:
            v_BTHK = v_BTHK + value_BTHK
        return linear(attend(q_BTHK, k_BTHK, v_BTHK).flatten(2), self.out, self.out_bias)


class Track3MLP(MLP):
    def __init__(self, config: ModelConfig, parts: set[str]) -> None:
        super().__init__(config, parts)
        self.gate_up_bias, self.down_bias = bias(self.num_gates * config.hidden_dim), bias(config.model_dim)

    def begin(self, x_BTD: Tensor) -> Tensor:
        return linear(x_BTD, self.gate_up, self.gate_up_bias)

    def finish(self, product_BTF: Tensor) -> Tensor:
        return linear(self.activate(product_BTF), self.down, self.down_bias)


class Track3Block(Block):
    attention_type, mlp_type = Track3Attention, Track3MLP

    def __init__(self, config: ModelConfig, parts: set[str]) -> None:
        super().__init__(config, parts)
        self.attention_gain, self.mlp_gain = gain(config.model_dim), gain(config.model_dim)

    def forward(self, x_BTD: Tensor, rotary: Rotary, attend: Attend, value_BTHK: Tensor | None = None) -> Tensor:
        attention_gain, mlp_gain = self.attention_gain.to(x_BTD.dtype), self.mlp_gain.to(x_BTD.dtype)
        x_BTD = x_BTD + self.attention(self.norm(x_BTD) * attention_gain, rotary, attend, value_BTHK)
        return x_BTD + self.mlp(self.norm(x_BTD) * mlp_gain)


class Track3(GPT):
    block_type, rotary_type = Track3Block, Track3Rotary

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.bfloat16, doc_token: int | None = None) -> None:
        if config.head_dim % 4:
            raise ValueError(f"head_dim = {config.head_dim} must be a multiple of 4 for track3; its own is 128")
        if config.tie_head_steps:
            raise ValueError(f"tie_head_steps = {config.tie_head_steps}: track3's head is not tied; set it to 0")
        super().__init__(config, dtype, doc_token)
        self.embed.to(dtype)
        self.head.bias = bias(config.padded_vocab_size)
        self.embed_gain, self.head_gain = gain(config.model_dim), gain(config.model_dim)

    @torch.no_grad()
    def init_weights(self) -> None:
        super().init_weights()
        for block in self.blocks:
            assert isinstance(block, Block)
            for weight, std in ((block.attention.qkv, 0.0), (block.mlp.gate_up, self.config.init_up)):
                weight.normal_(std=std or math.sqrt(INIT_VARIANCE / weight.size(-1)))

    def enter(self, inputs_BT: Tensor, window: int | Tensor | None, kind: str) -> tuple[Attend, list[Tensor], Tensor]:
        attend, values, embedded_BTD = super().enter(inputs_BT, window, kind)
        return attend, values, embedded_BTD * self.embed_gain.to(self.dtype)

    def through_blocks(self, rotary: Rotary, attend: Attend, values: list[Tensor], x_BTD: Tensor) -> Tensor:
        return super().through_blocks(rotary, attend, values, x_BTD) * self.head_gain.to(self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        logits, softcap = linear(x, self.head.weight, self.head.bias).float(), self.config.softcap
        return softcap * logits * torch.rsqrt(logits.square() + softcap**2)
