"""A decoder-only GPT with SwiGLU MLPs, and its initialisation.

RMSNorm without gains, rotary positions, QK-norm, causal attention, an untied head with a soft cap on its logits.
Parameters are float32; matrix products run in `dtype`. Weights that share an input are stacked in one parameter
([3, H*K, D] for Q, K, V and [2, F, D] for gate and up): one matmul in the forward pass, while an optimizer that treats
leading dimensions as batch still sees each matrix on its own. What ModelConfig calls an option is off by default.

Shape suffixes: B batch, T sequence, D model width, H heads, K head dimension, F MLP hidden, V padded vocabulary.

Sources: RMSNorm arXiv 1910.07467, rotary 2104.09864, SwiGLU 2002.05202, QK-norm 2010.04245, soft cap 2408.00118;
zero-initialised output projections as in muP (2203.03466) and the nanoGPT speedruns. Options: value embeddings from the
nanoGPT speedruns (K. Koszarsky), after value residuals (2410.17897); U-net skips, the embedding as a further input of
every block and a head that is untied late from the same; z-loss 2204.02311.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import fused
from kernels.attention import Attend, attention
from kernels.linear_cross_entropy import linear_cross_entropy

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
    # How it is computed: the same numbers to rounding
    attention: str = "auto"  # attention.KINDS
    fused_norm: bool = False
    fused_mlp: bool = False
    fused_head: bool = False
    # Options
    doc_token: int | None = None  # attention stays between two of these, the first included
    window: int = 0  # keys a query sees; 0: all
    value_embeds: int = 0  # n tables of values looked up by token, shared by the first n and the last n blocks
    embed_skip: bool = False  # every block also sees the embedding
    unet_skips: bool = False  # the second half of the blocks also see the first half's outputs, last first
    joint_matrices: bool = False  # Q, K, V are one matrix to the optimizer, and so are gate and up
    tie_head: bool = False  # the head starts equal to the embedding (tie_gradients keeps it so)
    mask_padding: bool = False  # leave the padding of the vocabulary out of the softmax
    z_loss: float = 0.0  # in training, this times the square of log sum exp(logits) is added to a token's loss

    @property
    def hidden_dim(self) -> int:
        return self.mlp_hidden or round_up(8 * self.model_dim / 3, 64)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and head: a multiple of 64 keeps the head's matmul on the fast path.

        Without mask_padding it stays in the softmax, as in the records this repository compares itself with; the
        loss pushes those logits down within the first steps.
        """
        return round_up(self.vocab_size, 64)


def stacked(count: int, rows: int, config: ModelConfig) -> Tensor:
    """Room for `count` matrices [rows, D] above each other: a batch of them, or one matrix to the optimizer."""
    shape = (count * rows,) if config.joint_matrices else (count, rows)
    return empty(*shape, config.model_dim)


def empty(*shape: int) -> Tensor:
    """Room for a parameter: float32, whatever torch's default is."""
    return torch.empty(*shape, dtype=torch.float32)


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    """Rotates the pairs (k, k + K/2) of each head by position * 10000^(-2k/K)."""

    cos_TK: Tensor
    sin_TK: Tensor

    def __init__(self, head_dim: int, seq_len: int, is_fused: bool = False) -> None:
        super().__init__()
        self.is_fused = is_fused
        frequency_K = 10000.0 ** -torch.linspace(0, 1, head_dim // 2 + 1, dtype=torch.float32)[:-1]
        angle_TK = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequency_K)
        self.register_buffer("cos_TK", angle_TK.cos(), persistent=False)
        self.register_buffer("sin_TK", angle_TK.sin(), persistent=False)

    def forward(self, x_BTHK: Tensor) -> Tensor:
        num_tokens = x_BTHK.size(1)
        cos = self.cos_TK[:num_tokens, None].to(x_BTHK.dtype)
        sin = self.sin_TK[:num_tokens, None].to(x_BTHK.dtype)
        if self.is_fused:
            return fused.rotate(x_BTHK, cos, sin)
        a, b = x_BTHK.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.norm = fused.rms_norm if config.fused_norm else rms_norm
        attention_dim = config.num_heads * config.head_dim
        self.qkv = nn.Parameter(stacked(3, attention_dim, config))
        self.out = nn.Parameter(empty(config.model_dim, attention_dim))

    def forward(self, x_BTD: Tensor, rotary: Rotary, attend: Attend, value_BTHK: Tensor | None = None) -> Tensor:
        """`value_BTHK` is added to the values."""
        qkv_BTHK = F.linear(x_BTD, self.qkv.flatten(0, -2).to(x_BTD.dtype)).unflatten(-1, (-1, self.head_dim))
        qk_BTHK, v_BTHK = qkv_BTHK.split((2 * self.num_heads, self.num_heads), dim=2)
        q_BTHK, k_BTHK = rotary(self.norm(qk_BTHK)).chunk(2, dim=2)
        if value_BTHK is not None:
            v_BTHK = v_BTHK + value_BTHK
        return F.linear(attend(q_BTHK, k_BTHK, v_BTHK).flatten(2), self.out.to(x_BTD.dtype))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.is_fused = config.fused_mlp
        self.gate_up = nn.Parameter(stacked(2, config.hidden_dim, config))
        self.down = nn.Parameter(empty(config.model_dim, config.hidden_dim))

    def activations(self, x_BTD: Tensor) -> Tensor:
        """What the neurons put out, [B, T, F]."""
        gate_BTF, up_BTF = F.linear(x_BTD, self.gate_up.flatten(0, -2).to(x_BTD.dtype)).chunk(2, dim=-1)
        return F.silu(gate_BTF) * up_BTF

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.is_fused:
            return fused.swiglu(x_BTD, self.gate_up.flatten(0, -2).to(x_BTD.dtype), self.down.to(x_BTD.dtype))
        return F.linear(self.activations(x_BTD), self.down.to(x_BTD.dtype))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = fused.rms_norm if config.fused_norm else rms_norm
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, rotary: Rotary, attend: Attend, value_BTHK: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm(x_BTD), rotary, attend, value_BTHK)
        return x_BTD + self.mlp(self.norm(x_BTD))


class GPT(nn.Module):
    """The model. Build it under `torch.device("meta")` to count or plan without allocating."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.norm = fused.rms_norm if config.fused_norm else rms_norm
        self.embed = nn.Embedding(config.padded_vocab_size, config.model_dim, dtype=torch.float32)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.head = nn.Linear(config.model_dim, config.padded_vocab_size, bias=False, dtype=torch.float32)
        self.rotary = Rotary(config.head_dim, config.seq_len, config.fused_norm)
        self.value_embeds = nn.ModuleList(
            nn.Embedding(config.padded_vocab_size, config.num_heads * config.head_dim, dtype=torch.float32)
            for _ in range(config.value_embeds)
        )
        if config.value_embeds:
            self.value_scale = nn.Parameter(empty(2 * config.value_embeds))
        if config.embed_skip:
            self.stream_scale, self.embed_scale = (nn.Parameter(empty(config.num_layers)) for _ in range(2))
        if config.unet_skips:
            self.skip_scale = nn.Parameter(empty(config.num_layers // 2))
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
        for table in self.value_embeds:
            assert isinstance(table, nn.Embedding)
            table.weight.normal_()
        if self.config.value_embeds:
            self.value_scale.fill_(0.5)
        if self.config.embed_skip:
            self.stream_scale.fill_(1)
            self.embed_scale.zero_()
        if self.config.unet_skips:
            self.skip_scale.fill_(1)
        if self.config.tie_head:  # the norm after the embedding makes up for the small numbers that a head wants
            self.head.weight.copy_(self.embed.weight.normal_(std=0.005))

    @torch.no_grad()
    def tie_gradients(self) -> None:
        """Give embedding and head the sum of their gradients. If they and their optimizer's state were equal, they
        stay equal: one matrix as two parameters, so that untying it changes no parameter, state or checkpoint."""
        embed, head = self.embed.weight.grad, self.head.weight.grad
        assert embed is not None and head is not None
        head.copy_(embed.add_(head))

    def hidden(self, inputs_BT: Tensor, window: int | Tensor | None = None, kind: str = "") -> Tensor:
        """Token ids (int32 or int64) to the normalised last hidden state [B, T, D].

        `window` and `kind` of attention stand in for the config's; see kernels/attention.py.
        """
        c, num_blocks = self.config, len(self.blocks)
        window = (c.window or None) if window is None else window
        attend = attention(kind or c.attention, inputs_BT, c.doc_token, window)
        tables = [table(inputs_BT).to(self.dtype).unflatten(-1, (-1, c.head_dim)) for table in self.value_embeds]
        values = [self.value_scale[i] * table for i, table in enumerate((*tables, *tables))]  # of the first, the last
        embedded_BTD = x_BTD = self.norm(self.embed(inputs_BT).to(self.dtype))
        outputs: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if c.unet_skips and index >= num_blocks - num_blocks // 2:
                x_BTD = x_BTD + self.skip_scale[num_blocks - 1 - index] * outputs[num_blocks - 1 - index]
            if c.embed_skip:
                x_BTD = self.stream_scale[index] * x_BTD + self.embed_scale[index] * embedded_BTD
            place = index if index < len(tables) else index - num_blocks  # from the end: -n to -1 have one, too
            value_BTHK = values[place] if -len(tables) <= place < len(tables) else None
            x_BTD = block(x_BTD, self.rotary, attend, value_BTHK)
            outputs.append(x_BTD)
        return self.norm(x_BTD)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden state [..., D] to float32 logits in (-softcap, softcap), [..., V]."""
        logits = F.linear(x, self.head.weight.to(x.dtype)).float()
        return self.config.softcap * torch.tanh(logits / self.config.softcap)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, window: int | Tensor | None = None) -> Tensor:
        """Summed cross-entropy in nats (float32 scalar) over the targets (int64) that are not IGNORE_INDEX.

        A sum, not a mean: whoever knows the global token count divides, so that neither the number of ranks
        nor the micro-batch changes the loss.
        """
        c, x_ND, targets_N = self.config, self.hidden(inputs_BT, window).flatten(0, 1), targets_BT.flatten()
        vocab_size = c.vocab_size if c.mask_padding else c.padded_vocab_size
        z_loss = c.z_loss if torch.is_grad_enabled() else 0.0  # validation is of the cross-entropy alone
        if c.fused_head:
            return linear_cross_entropy(
                x_ND, self.head.weight, targets_N, softcap=c.softcap, vocab_size=vocab_size, z_loss=z_loss,
                ignore_index=IGNORE_INDEX,
            )  # fmt: skip
        logits_NV = self.logits(x_ND)[:, :vocab_size]
        loss = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="sum")
        if z_loss:
            loss = loss + z_loss * (logits_NV.logsumexp(-1).square() * (targets_N != IGNORE_INDEX)).sum()
        return loss

    @torch.no_grad()
    def generate(self, prompt: list[int], num_tokens: int, generator: torch.Generator) -> list[int]:
        """Sample `num_tokens` ids after `prompt` at temperature 0.8 (`generator` must live on the CPU)."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            context = torch.tensor([tokens[-self.config.seq_len :]], device=self.embed.weight.device)
            hidden_BTD = self.hidden(context, kind="sdpa")  # the others would compile or plan anew for every length
            logits_V = self.logits(hidden_BTD[:, -1:]).flatten()[: self.config.vocab_size]
            probabilities = (logits_V / 0.8).softmax(0).cpu()
            tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        return tokens[len(prompt) :]

    def num_params(self, embedding: bool = True) -> int:
        """Number of parameters, with or without embeddings (lookups: they cost no FLOPs)."""
        total = sum(p.numel() for p in self.parameters())
        tables = sum(table.weight.numel() for table in (self.embed, *self.value_embeds))
        return total if embedding else total - tables

    def flops_per_token(self) -> int:
        """Model FLOPs of forward and backward a token, as MFU is usually defined (PaLM, arXiv 2204.02311, app. B).

        6 a matmul weight, and 12 L H K T for attention without a discount for causality or documents; with a window,
        that instead of T.
        """
        c = self.config
        num_keys = min(c.window or c.seq_len, c.seq_len)
        return 6 * self.num_params(embedding=False) + 12 * c.num_layers * c.num_heads * c.head_dim * num_keys
