"""A decoder-only GPT, its settings and its initialisation.

RMSNorm without gains, rotary positions, QK-norm, causal attention, SwiGLU or squared-ReLU MLPs, an untied head with a
soft cap on its logits. Parameters are float32; matrix products run in `dtype`. Weights that share an input are stacked
in one parameter ([3, H*K, D] for Q, K, V and [2, F, D] for gate and up): one product, and an optimizer that treats
leading dimensions as batch still sees each matrix.

Shape suffixes: B batch, T sequence, D model width, H heads, K head dimension, F MLP hidden, V padded vocabulary.

Sources: RMSNorm arXiv 1910.07467, rotary 2104.09864, SwiGLU 2002.05202, squared ReLU 2109.08668, QK-norm 2010.04245,
soft cap 2408.00118, zero outputs at the start 2203.03466 (muP). Options: value embeddings (K. Koszarsky, after value
residuals, 2410.17897), hashed n-grams, embedding skips and late untying from the nanoGPT speedruns; z-loss 2204.02311.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import Attend, attention
from kernels.fused import rms_norm, rotate
from kernels.linear import check_float8, check_float8_sizes, float8_linear, linear
from kernels.linear_cross_entropy import LARGEST_SOFTCAP, linear_cross_entropy

FusedPart = Literal["auto", "none", "norm", "mlp", "head", "blocks"]
HASH_FACTORS = 36313, 27191, 51647, 21377, 458747, 1000003, 245491, 104729  # of a token and those before it
IGNORE_INDEX = -1  # targets with this value add nothing to the loss

# The MLP's activation, of the stacked products [..., G F] of its G input matrices: the function and G.
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "swiglu": (lambda gate, up: F.silu(gate) * up, 2),
    "squared_relu": (lambda up: F.relu(up).square(), 1),
}


def multiple_of_64(value: float) -> int:
    return math.ceil(value / 64) * 64


@dataclass(frozen=True)
class ModelConfig:
    # Model
    vocab_size: Annotated[int, "> 0"] = 257  # tokens the data may hold; the model pads it to a multiple of 64
    num_layers: Annotated[int, "> 0"] = 4  # blocks
    num_heads: Annotated[int, "> 0"] = 2  # attention heads
    head_dim: Annotated[int, "> 0"] = 64  # width of a head; even
    model_dim: Annotated[int, "> 0"] = 128  # width of the residual stream
    mlp_hidden: Annotated[int, ">= 0"] = 0  # hidden width of the MLP; 0: as many weights as two matrices of 4 widths
    seq_len: Annotated[int, "> 0"] = 256  # tokens in a training row
    architecture: Literal["gpt", "track3"] = "gpt"  # model.py's, or the optimization track's (model_track3.py)
    objective: Literal["causal", "masked"] = "causal"  # predict the next token, or hidden ones from both sides
    mask_share: Annotated[float, "> 0", "< 1"] = 0.15  # of each row's tokens, which objective = "masked" hides
    activation: Literal["swiglu", "squared_relu"] = "swiglu"  # of the MLP
    softcap: Annotated[float, "> 0"] = 15.0  # logits are kept within +- this
    init_out: Annotated[float, ">= 0"] = 0.0  # standard deviation of attention's output projection at the start
    init_down: Annotated[float, ">= 0"] = 0.0  # the same of the MLP's
    init_up: Annotated[float, ">= 0"] = 0.0  # the same of the MLP's input matrices; 0: the usual
    init_head: Annotated[float, ">= 0"] = 0.0  # the same of the output head
    # How it is computed: the same numbers to rounding
    fused: tuple[FusedPart, ...] = ("auto",)  # see docs/speed.md; auto: norm,head,blocks on a CPU, none on a GPU
    # Options of the model
    float8: tuple[Literal["head", "mlp"], ...] = ()  # products from operands of 8 bits in training (docs/speed.md)
    doc_mask: bool = False  # attention stays within documents
    window: Annotated[int, ">= 0"] = 0  # tokens that a query sees, its own included; 0: all
    value_embeds: Annotated[int, ">= 0"] = 0  # n tables of values looked up by token, for the first and last n blocks
    ngrams: Annotated[tuple[int, ...], ">= 2", "<= 8"] = ()  # tables by the last 2, 3, ... tokens, such as 2,3
    ngram_rows: Annotated[int, ">= 2"] = 16384  # of each of these tables, into which the tokens are hashed
    ngram_sparse: bool = False  # a step moves only the rows of these that it saw, by Adagrad (sparse_lr)
    embed_skip: bool = False  # every block also sees the embedding
    mask_padding: bool = False  # the vocabulary's padding to a multiple of 64 stays out of the softmax
    z_loss: Annotated[float, ">= 0"] = 0.0  # weight of log sum exp(logits) squared in training; 1e-4 is usual
    tie_head_steps: Annotated[int, ">= 0"] = 0  # first steps in which embedding and head are one matrix

    def __post_init__(self) -> None:
        """Raises ValueError for settings that do not go together."""
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even for rotary positions; 64 or 128 are usual")
        if {"auto", "none"} & set(self.fused) and len(self.fused) > 1:
            raise ValueError(f"fused = {','.join(self.fused)!r}: auto and none stand alone; write fused = 'auto'")
        if "head" in self.fused and not self.can_fuse_head:
            found = f"architecture = 'gpt', not {self.softcap} and {self.architecture!r}; auto works"
            raise ValueError(f"fused = 'head' needs softcap <= {LARGEST_SOFTCAP:g} and {found}")
        if self.float8 and self.architecture != "gpt":
            raise ValueError(f"float8 needs architecture = 'gpt', not {self.architecture!r}; leave float8 out")
        check_float8_sizes(self.float8, model_dim=self.model_dim, mlp_hidden=self.mlp_hidden, seq_len=self.seq_len)
        if 2 * (n := self.value_embeds) > self.num_layers:
            raise ValueError(f"value_embeds = {n} must be at most half of num_layers = {self.num_layers}; 1 is usual")
        if len({*self.ngrams}) < len(self.ngrams):
            raise ValueError(f"ngrams = {self.ngrams} names a length twice; 2,3 is usual")
        if self.tie_head_steps and self.init_head:
            raise ValueError(f"init_head = {self.init_head}: a tied head starts as the embedding; set init_head = 0")

    @property
    def num_gates(self) -> int:
        """Input matrices of the MLP."""
        return ACTIVATIONS[self.activation][1]

    @property
    def hidden_dim(self) -> int:
        return self.mlp_hidden or multiple_of_64(8 * self.model_dim / (self.num_gates + 1))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embedding and head, for fast products. What is added is in the softmax unless mask_padding is set."""
        return multiple_of_64(self.vocab_size)

    def fused_parts(self, device_type: str) -> set[str]:
        """Which parts are computed with fewer passes over memory or less of it (docs/speed.md), by `fused`. auto: norm,
        blocks and, where it can be, head on a CPU; none on a GPU, where none has been measured."""
        if device_type == "cuda" and "blocks" in self.fused:
            raise ValueError("fused = 'blocks' is for CPUs, and this runs on a GPU; leave it out, or write 'auto'")
        if device_type == "cuda" and (self.doc_mask or self.window) and self.head_dim < 16:
            raise ValueError(f"head_dim = {self.head_dim} must be 16 or more for flex_attention; 64 or 128 are usual")
        if self.fused != ("auto",):
            return {part for part in self.fused if part != "none"}
        on_cpu = {"norm", "blocks", *(["head"] if self.can_fuse_head else [])}
        return on_cpu if device_type == "cpu" else set()

    @property
    def can_fuse_head(self) -> bool:
        return self.softcap <= LARGEST_SOFTCAP and self.architecture == "gpt"


def empty(*shape: int) -> Tensor:
    """Room for a parameter: float32, whatever torch's default is."""
    return torch.empty(*shape, dtype=torch.float32)


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

    def forward(self, x_BTHK: Tensor, start: int = 0) -> Tensor:
        place = slice(start, start + x_BTHK.size(1))
        cos, sin = (angle[place, None].to(x_BTHK.dtype) for angle in (self.cos_TK, self.sin_TK))
        return rotate(x_BTHK, cos, sin, self.is_fused)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, parts: set[str]) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.norm = partial(rms_norm, is_fused="norm" in parts)
        attention_dim = config.num_heads * config.head_dim
        self.qkv = nn.Parameter(empty(3, attention_dim, config.model_dim))
        self.out = nn.Parameter(empty(config.model_dim, attention_dim))

    def forward(self, x_BTD: Tensor, rotary: Rotary, attend: Attend, value_BTHK: Tensor | None = None) -> Tensor:
        """`value_BTHK` is added to the values."""
        qkv_BTHK = linear(x_BTD, self.qkv).unflatten(-1, (-1, self.head_dim))
        qk_BTHK, v_BTHK = qkv_BTHK.split((2 * self.num_heads, self.num_heads), dim=2)
        q_BTHK, k_BTHK = rotary(self.norm(qk_BTHK)).chunk(2, dim=2)
        if value_BTHK is not None:
            v_BTHK = v_BTHK + value_BTHK
        return linear(attend(q_BTHK, k_BTHK, v_BTHK).flatten(2), self.out)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, parts: set[str]) -> None:
        super().__init__()
        self.is_fused = "mlp" in parts
        self.activation, self.num_gates = ACTIVATIONS[config.activation]
        self.linear = float8_linear if "mlp" in config.float8 else linear
        self.gate_up = nn.Parameter(empty(self.num_gates, config.hidden_dim, config.model_dim))  # or up alone
        self.down = nn.Parameter(empty(config.model_dim, config.hidden_dim))

    def activations(self, x_BTD: Tensor) -> Tensor:
        """The neurons' outputs, [B, T, F]."""
        return self.activate(self.begin(x_BTD))

    def begin(self, x_BTD: Tensor) -> Tensor:
        return self.linear(x_BTD, self.gate_up)

    def activate(self, product_BTF: Tensor) -> Tensor:
        return self.activation(*product_BTF.chunk(self.num_gates, dim=-1))

    def finish(self, product_BTF: Tensor) -> Tensor:
        return self.linear(self.activate(product_BTF), self.down)

    def forward(self, x_BTD: Tensor) -> Tensor:
        product_BTF = self.begin(x_BTD)
        if self.is_fused and torch.is_grad_enabled():  # keeps the product alone, half of what autograd would keep
            return checkpoint(self.finish, product_BTF, use_reentrant=False, preserve_rng_state=False)
        return self.finish(product_BTF)


class Block(nn.Module):
    attention_type, mlp_type = Attention, MLP

    def __init__(self, config: ModelConfig, parts: set[str]) -> None:
        super().__init__()
        self.norm = partial(rms_norm, is_fused="norm" in parts)
        self.attention = self.attention_type(config, parts)
        self.mlp = self.mlp_type(config, parts)

    def forward(self, x_BTD: Tensor, rotary: Rotary, attend: Attend, value_BTHK: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm(x_BTD), rotary, attend, value_BTHK)
        return x_BTD + self.mlp(self.norm(x_BTD))


def hashed_ngrams(tokens_BT: Tensor, n: int, rows: int) -> Tensor:
    """The rows of a table for each token and the n - 1 before it, int64 [B, T]; the last one where there are fewer."""
    hash_BT = torch.zeros_like(tokens_BT, dtype=torch.int64)
    for back, factor in enumerate(HASH_FACTORS[:n]):
        hash_BT[:, back:] ^= factor * tokens_BT[:, : max(0, tokens_BT.size(1) - back)].long()
    hash_BT %= rows - 1
    hash_BT[:, : n - 1] = rows - 1
    return hash_BT


def normal_or_zero(weight: Tensor, std: float) -> Tensor:
    return weight.normal_(std=std) if std else weight.zero_()


class GPT(nn.Module):
    """The model; under `torch.device("meta")` it allocates nothing. `doc_token` begins a document (config.doc_mask)."""

    block_type, rotary_type = Block, Rotary

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.bfloat16, doc_token: int | None = None) -> None:
        super().__init__()
        self.config, self.dtype, self.doc_token = config, dtype, doc_token if config.doc_mask else None
        lookup = partial(nn.Embedding, dtype=torch.float32)
        self.embed = lookup(config.padded_vocab_size, config.model_dim)
        self.parts = config.fused_parts(self.embed.weight.device.type)
        check_float8(config.float8, self.embed.weight.device)
        self.norm = partial(rms_norm, is_fused="norm" in self.parts)
        self.blocks = nn.ModuleList([self.block_type(config, self.parts) for _ in range(config.num_layers)])
        self.head = nn.Linear(config.model_dim, config.padded_vocab_size, bias=False, dtype=torch.float32)
        self.rotary = self.rotary_type(config.head_dim, config.seq_len, "norm" in self.parts)
        values = config.padded_vocab_size, config.num_heads * config.head_dim
        self.value_embeds = nn.ModuleList(lookup(*values) for _ in range(config.value_embeds))
        ngrams = config.ngram_rows, config.model_dim
        self.ngram_embeds = nn.ModuleList(lookup(*ngrams, sparse=config.ngram_sparse) for _ in config.ngrams)
        if config.value_embeds:
            self.value_scale = nn.Parameter(empty(2 * config.value_embeds).fill_(0.5))
        if config.embed_skip:
            self.stream_scale, self.embed_scale = (nn.Parameter(empty(config.num_layers).fill_(x)) for x in (1, 0))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """By default blocks start as the identity (outputs zero) and the head as a uniform guess (loss log V)."""
        c = self.config
        self.embed.weight.normal_()
        for block in self.blocks:
            assert isinstance(block, Block)
            for weight, std in ((block.attention.qkv, 0.0), (block.mlp.gate_up, c.init_up)):
                bound = math.sqrt(3) * std or math.sqrt(3) * 0.5 / math.sqrt(weight.size(-1))  # 0.5 / sqrt(fan-in)
                weight.uniform_(-bound, bound)
            normal_or_zero(block.attention.out, c.init_out)
            normal_or_zero(block.mlp.down, c.init_down)
        for p in self.value_embeds.parameters():
            p.normal_()
        for p in self.ngram_embeds.parameters():
            p.zero_()
        normal_or_zero(self.head.weight, c.init_head)
        if c.tie_head_steps:  # the norm after the embedding makes up for the small numbers that a head wants
            self.head.weight.copy_(self.embed.weight.normal_(std=0.005))

    @torch.no_grad()
    def tie_gradients(self) -> None:
        """Give embedding and head the sum of their gradients. If they and their optimizer's state were equal, they
        stay equal: one matrix as two parameters, so that untying it changes no parameter, state or checkpoint."""
        embed, head = self.embed.weight.grad, self.head.weight.grad
        assert embed is not None and head is not None
        head.copy_(embed.add_(head))

    def enter(self, inputs_BT: Tensor, window: int | Tensor | None, kind: str) -> tuple[Attend, list[Tensor], Tensor]:
        """What `hidden` hands to its blocks: how queries attend, the values by token [B, T, H, K] of the first and the
        last blocks, and the normalised embedding [B, T, D]."""
        c = self.config
        window = (c.window or None) if window is None else window
        attend = attention(kind or ("blocks" if "blocks" in self.parts else "auto"), inputs_BT, self.doc_token, window)
        tables = [table(inputs_BT).to(self.dtype).unflatten(-1, (-1, c.head_dim)) for table in self.value_embeds]
        values = [self.value_scale[i] * table for i, table in enumerate((*tables, *tables))]
        embedded_BTD = self.embed(inputs_BT)
        for n, table in zip(c.ngrams, self.ngram_embeds, strict=True):
            embedded_BTD = embedded_BTD + table(hashed_ngrams(inputs_BT, n, c.ngram_rows))
        return attend, values, self.norm(embedded_BTD.to(self.dtype))

    def hidden(self, inputs_BT: Tensor, window: int | Tensor | None = None, kind: str = "") -> Tensor:
        """Token ids (int32 or int64) to the normalised last hidden state [B, T, D]; see kernels/attention.py."""
        return self.through_blocks(self.rotary, *self.enter(inputs_BT, window, kind))

    def through_blocks(self, rotary: Rotary, attend: Attend, values: list[Tensor], x_BTD: Tensor) -> Tensor:
        c, num_blocks, num_values, embedded_BTD = self.config, len(self.blocks), len(values) // 2, x_BTD
        for index, block in enumerate(self.blocks):
            if c.embed_skip:
                x_BTD = self.stream_scale[index] * x_BTD + self.embed_scale[index] * embedded_BTD
            place = index if index < num_values else index - num_blocks  # from the end: -n to -1 have one, too
            value_BTHK = values[place] if -num_values <= place < num_values else None
            x_BTD = block(x_BTD, rotary, attend, value_BTHK)
        return self.norm(x_BTD)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden state [..., D] to float32 logits in (-softcap, softcap), [..., V]."""
        product = float8_linear if "head" in self.config.float8 else linear
        logits = product(x, self.head.weight).float()
        return self.config.softcap * torch.tanh(logits / self.config.softcap)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, window: int | Tensor | None = None) -> Tensor:
        """Summed cross-entropy in nats (float32 scalar) over the targets (int64) that are not IGNORE_INDEX; a sum,
        so that neither the number of ranks nor the micro-batch changes it."""
        return self.loss(self.hidden(inputs_BT, window), targets_BT)

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """The loss of `forward`, from the normalised last hidden state [B, T, D]."""
        c, x_ND, targets_N = self.config, hidden_BTD.flatten(0, 1), targets_BT.flatten()
        vocab_size = c.vocab_size if c.mask_padding else c.padded_vocab_size
        z_loss = c.z_loss if torch.is_grad_enabled() else 0.0  # validation is of the cross-entropy alone
        if "head" in self.parts:
            return linear_cross_entropy(
                x_ND, self.head.weight, targets_N, softcap=c.softcap, vocab_size=vocab_size, z_loss=z_loss,
                ignore_index=IGNORE_INDEX, float8="head" in c.float8,
            )  # fmt: skip
        logits_NV = self.logits(x_ND)[:, :vocab_size]
        loss = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="sum")
        if z_loss:
            loss = loss + z_loss * (logits_NV.logsumexp(-1).square() * (targets_N != IGNORE_INDEX)).sum()
        return loss

    def num_params(self, embedding: bool = True) -> int:
        """With or without embeddings (lookups: they cost no FLOPs)."""
        total = sum(p.numel() for p in self.parameters())
        tables = sum(table.weight.numel() for table in self.modules() if isinstance(table, nn.Embedding))
        return total if embedding else total - tables

    def flops_per_token(self) -> int:
        """Model FLOPs of forward and backward per token, as MFU is usually defined (PaLM, arXiv 2204.02311, app. B): 6
        per matmul weight, and 12 L H K T (a window instead of T) for attention, causal or within documents or not."""
        c = self.config
        num_keys = min(c.window or c.seq_len, c.seq_len)
        return 6 * self.num_params(embedding=False) + 12 * c.num_layers * c.num_heads * c.head_dim * num_keys
