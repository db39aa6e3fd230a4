"""A decoder-only GPT with SwiGLU MLPs, and its initialisation.

RMSNorm without gains, rotary positions, QK-norm, causal `scaled_dot_product_attention`, an untied head
with a soft cap on its logits. Parameters are float32; matrix products run in `dtype`. Weights that share an
input are stacked in one parameter ([3, H*K, D] for Q, K, V and [2, F, D] for gate and up): one matmul in the
forward pass, while an optimizer that treats leading dimensions as batch still sees each matrix on its own.

Shape suffixes: B batch, T sequence, D model width, H heads, K head dimension, F MLP hidden, V padded vocabulary.

Sources: RMSNorm arXiv 1910.07467, rotary 2104.09864, SwiGLU 2002.05202, QK-norm 2010.04245, soft cap 2408.00118;
zero-initialised output projections as in muP (2203.03466) and the nanoGPT speedruns.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -1  # targets with this value add nothing to the loss


def round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 50257
    num_layers: int = 12
    num_heads: int = 6
    head_dim: int = 128
    model_dim: int = 768
    mlp_hidden: int = 0  # 0: 8/3 * model_dim rounded up to a multiple of 64, as many weights as a 4x ReLU MLP
    seq_len: int = 1024
    softcap: float = 15.0

    @property
    def hidden_dim(self) -> int:
        return self.mlp_hidden or round_up(8 * self.model_dim / 3, 64)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and head: a multiple of 64 keeps the head's matmul on the fast path.

        The padding stays in the softmax, as in the records this repository compares itself with; the loss
        pushes those logits down within the first steps.
        """
        return round_up(self.vocab_size, 64)


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    """Rotates the pairs (k, k + K/2) of each head by position * 10000^(-2k/K)."""

    cos_TK: Tensor
    sin_TK: Tensor

    def __init__(self, head_dim: int, seq_len: int) -> None:
        super().__init__()
        frequency_K = 10000.0 ** -torch.linspace(0, 1, head_dim // 2 + 1)[:-1]
        angle_TK = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequency_K)
        self.register_buffer("cos_TK", angle_TK.cos(), persistent=False)
        self.register_buffer("sin_TK", angle_TK.sin(), persistent=False)

    def forward(self, x_BTHK: Tensor) -> Tensor:
        num_tokens = x_BTHK.size(1)
        cos = self.cos_TK[:num_tokens, None].to(x_BTHK.dtype)
        sin = self.sin_TK[:num_tokens, None].to(x_BTHK.dtype)
        a, b = x_BTHK.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        attention_dim = config.num_heads * config.head_dim
        self.qkv = nn.Parameter(torch.empty(3, attention_dim, config.model_dim))
        self.out = nn.Parameter(torch.empty(config.model_dim, attention_dim))

    def forward(self, x_BTD: Tensor, rotary: Rotary) -> Tensor:
        qkv = F.linear(x_BTD, self.qkv.flatten(0, 1).to(x_BTD.dtype))
        q_BTHK, k_BTHK, v_BTHK = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv.chunk(3, dim=-1))
        q_BTHK, k_BTHK = rotary(rms_norm(q_BTHK)), rotary(rms_norm(k_BTHK))
        y_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2), k_BTHK.transpose(1, 2), v_BTHK.transpose(1, 2), is_causal=True
        )
        return F.linear(y_BHTK.transpose(1, 2).flatten(2), self.out.to(x_BTD.dtype))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, config.hidden_dim, config.model_dim))
        self.down = nn.Parameter(torch.empty(config.model_dim, config.hidden_dim))

    def activations(self, x_BTD: Tensor) -> Tensor:
        """What the neurons put out, [B, T, F]."""
        gate_BTF, up_BTF = F.linear(x_BTD, self.gate_up.flatten(0, 1).to(x_BTD.dtype)).chunk(2, dim=-1)
        return F.silu(gate_BTF) * up_BTF

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.linear(self.activations(x_BTD), self.down.to(x_BTD.dtype))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, rotary: Rotary) -> Tensor:
        x_BTD = x_BTD + self.attention(rms_norm(x_BTD), rotary)
        return x_BTD + self.mlp(rms_norm(x_BTD))


class GPT(nn.Module):
    """The model. Build it under `torch.device("meta")` to count or plan without allocating."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embed = nn.Embedding(config.padded_vocab_size, config.model_dim)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.head = nn.Linear(config.model_dim, config.padded_vocab_size, bias=False)
        self.rotary = Rotary(config.head_dim, config.seq_len)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Blocks start as the identity (outputs zero) and the head as a uniform guess (loss log V)."""
        self.embed.weight.normal_()
        self.head.weight.zero_()
        for block in self.blocks:
            assert isinstance(block, Block)
            for weight in (block.attention.qkv, block.mlp.gate_up):
                bound = math.sqrt(3) * 0.5 / math.sqrt(weight.size(-1))  # standard deviation 0.5 / sqrt(fan-in)
                weight.uniform_(-bound, bound)
            block.attention.out.zero_()
            block.mlp.down.zero_()

    def hidden(self, inputs_BT: Tensor) -> Tensor:
        """Token ids (int32 or int64) to the normalised last hidden state [B, T, D]."""
        x_BTD = rms_norm(self.embed(inputs_BT).to(self.dtype))
        for block in self.blocks:
            x_BTD = block(x_BTD, self.rotary)
        return rms_norm(x_BTD)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Hidden state to float32 logits in (-softcap, softcap), [B, T, V]."""
        logits_BTV = F.linear(x_BTD, self.head.weight.to(x_BTD.dtype)).float()
        return self.config.softcap * torch.tanh(logits_BTV / self.config.softcap)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed cross-entropy in nats (float32 scalar) over the targets (int64) that are not IGNORE_INDEX.

        A sum, not a mean: whoever knows the global token count divides, so that neither the number of ranks
        nor the micro-batch changes the loss.
        """
        logits_BTV = self.logits(self.hidden(inputs_BT))
        return F.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )

    @torch.no_grad()
    def generate(self, prompt: list[int], num_tokens: int, generator: torch.Generator) -> list[int]:
        """Sample `num_tokens` ids after `prompt` at temperature 0.8 (`generator` must live on the CPU)."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            context = torch.tensor([tokens[-self.config.seq_len :]], device=self.embed.weight.device)
            logits_V = self.logits(self.hidden(context)[:, -1:]).flatten()[: self.config.vocab_size]
            probabilities = (logits_V / 0.8).softmax(0).cpu()
            tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        return tokens[len(prompt) :]

    def num_params(self, embedding: bool = True) -> int:
        """Number of parameters, with or without the input embedding (a lookup: it costs no FLOPs)."""
        total = sum(p.numel() for p in self.parameters())
        return total if embedding else total - self.embed.weight.numel()

    def flops_per_token(self) -> int:
        """Model FLOPs of forward and backward a token, as MFU is usually defined (PaLM, arXiv 2204.02311, app. B).

        6 a matmul weight, and 12 L H K T for attention without a discount for causality.
        """
        c = self.config
        return 6 * self.num_params(embedding=False) + 12 * c.num_layers * c.num_heads * c.head_dim * c.seq_len
