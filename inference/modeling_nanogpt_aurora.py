"""The GPT of nanogpt-aurora for transformers, in one file that is exported beside the weights.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

It computes the logits of the repository's model.py, with transformers' cache, labels, and batches that are padded on
either side. Some models look at the ids of earlier tokens, for n-grams and documents: `generate` hands all ids over as
`all_ids`, and so does whoever calls such a model with a cache.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

HASH_FACTORS = 36313, 27191, 51647, 21377, 458747, 1000003, 245491, 104729
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "squared_relu": lambda up: F.relu(up).square(),
}


class NanoGPTAuroraConfig(PretrainedConfig):
    model_type = "nanogpt_aurora"
    attribute_map: ClassVar = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "seq_len",
    }

    def __init__(
        self, vocab_size: int = 257, padded_vocab_size: int = 320, num_layers: int = 4, num_heads: int = 2,
        head_dim: int = 64, model_dim: int = 128, hidden_dim: int = 384, seq_len: int = 256, activation: str = "swiglu",
        softcap: float = 15.0, window: int = 0, doc_token: int | None = None, value_embeds: int = 0,
        ngrams: tuple[int, ...] = (), ngram_rows: int = 16384, embed_skip: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.vocab_size, self.padded_vocab_size, self.num_layers = vocab_size, padded_vocab_size, num_layers
        self.num_heads, self.head_dim, self.model_dim, self.hidden_dim = num_heads, head_dim, model_dim, hidden_dim
        self.seq_len, self.activation, self.softcap, self.window = seq_len, activation, softcap, window
        self.doc_token, self.value_embeds, self.ngrams = doc_token, value_embeds, list(ngrams)
        self.ngram_rows, self.embed_skip = ngram_rows, embed_skip
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x_BTHK: Tensor, position_BT: Tensor) -> Tensor:
    """Pairs (k, k + K/2) by position * 10000^(-2k/K)."""
    half = x_BTHK.size(-1) // 2
    frequency_K = 10000.0 ** -torch.linspace(0, 1, half + 1, dtype=torch.float32, device=x_BTHK.device)[:-1]
    angle_BT1K = (position_BT[..., None] * frequency_K)[:, :, None]
    cos, sin = angle_BT1K.cos().to(x_BTHK.dtype), angle_BT1K.sin().to(x_BTHK.dtype)
    a, b = x_BTHK.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Attention(nn.Module):
    def __init__(self, config: NanoGPTAuroraConfig, index: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.index = config.num_heads, config.head_dim, index
        width = config.num_heads * config.head_dim
        self.qkv = nn.Parameter(torch.empty(3, width, config.model_dim))
        self.out = nn.Parameter(torch.empty(config.model_dim, width))

    def forward(
        self, x_BTD: Tensor, position_BT: Tensor, mask_B1TS: Tensor, cache: Any, value_BTHK: Tensor | None
    ) -> Tensor:
        q, k, v = F.linear(x_BTD, self.qkv.flatten(0, 1)).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        q, k = rotate(norm(q), position_BT), rotate(norm(k), position_BT)
        v = v if value_BTHK is None else v + value_BTHK
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        y_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1TS)
        return F.linear(y_BHTK.transpose(1, 2).flatten(2), self.out)


class MLP(nn.Module):
    def __init__(self, config: NanoGPTAuroraConfig) -> None:
        super().__init__()
        self.activation, gates = ACTIVATIONS[config.activation], 2 if config.activation == "swiglu" else 1
        self.gate_up = nn.Parameter(torch.empty(gates, config.hidden_dim, config.model_dim))
        self.down = nn.Parameter(torch.empty(config.model_dim, config.hidden_dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        products = F.linear(x_BTD, self.gate_up.flatten(0, 1)).chunk(self.gate_up.size(0), -1)
        return F.linear(self.activation(*products), self.down)


class Block(nn.Module):
    def __init__(self, config: NanoGPTAuroraConfig, index: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(config, index), MLP(config)

    def forward(self, x_BTD: Tensor, *arguments: Any) -> Tensor:
        x_BTD = x_BTD + self.attention(norm(x_BTD), *arguments)
        return x_BTD + self.mlp(norm(x_BTD))


class NanoGPTAuroraForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoGPTAuroraConfig
    base_model_prefix = ""
    _no_split_modules: ClassVar = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: NanoGPTAuroraConfig) -> None:
        super().__init__(config)
        values = config.num_heads * config.head_dim
        self.embed = nn.Embedding(config.padded_vocab_size, config.model_dim)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.head = nn.Linear(config.model_dim, config.padded_vocab_size, bias=False)
        self.value_embeds = nn.ModuleList(
            nn.Embedding(config.padded_vocab_size, values) for _ in range(config.value_embeds)
        )
        self.ngram_embeds = nn.ModuleList(nn.Embedding(config.ngram_rows, config.model_dim) for _ in config.ngrams)
        if config.value_embeds:
            self.value_scale = nn.Parameter(torch.empty(2 * config.value_embeds))
        if config.embed_skip:
            self.stream_scale = nn.Parameter(torch.empty(config.num_layers))
            self.embed_scale = nn.Parameter(torch.empty(config.num_layers))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are loaded; new ones are the repository's matter."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        return inputs | {"all_ids": input_ids}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int = 0, all_ids: Tensor | None = None,
        past_key_values: Any = None, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """attention_mask: of all ids so far, 0 for padding. all_ids: these ids. past_key_values: the cache, as it was
        called before transformers 5.24."""
        c, cache = self.config, past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        start = 0 if cache is None else cache.get_seq_length()
        if all_ids is None:
            if start and (c.ngrams or c.doc_token is not None):
                raise ValueError(
                    "with a cache this model needs the ids of all tokens so far; hand them over as all_ids"
                )
            all_ids = F.pad(input_ids, (start, 0))
        S = all_ids.size(1)
        is_text_BS = torch.ones_like(all_ids, dtype=torch.bool)
        if attention_mask is not None:
            is_text_BS = attention_mask[:, :S].bool()
        position_S = torch.arange(S, device=all_ids.device)
        i, j = position_S[start:, None], position_S
        mask_BTS = (j <= i) & is_text_BS[:, None]
        if c.window:
            mask_BTS = mask_BTS & (i - j < c.window)
        if c.doc_token is not None:
            docs_BS = (all_ids == c.doc_token).cumsum(1)
            mask_BTS = mask_BTS & (docs_BS[:, start:, None] == docs_BS[:, None])
        mask_B1TS = (mask_BTS | (i == j))[:, None]  # padding sees itself: a row of nothing would be NaN
        embedded = self.embed(input_ids)
        for n, table in zip(c.ngrams, self.ngram_embeds, strict=True):
            embedded = embedded + table(self._ngram_rows(all_ids, is_text_BS, n)[:, start:])
        x_BTD = embedded_BTD = norm(embedded)
        tables = [table(input_ids).unflatten(-1, (-1, c.head_dim)) for table in self.value_embeds]
        num_values, num_blocks = len(tables), len(self.blocks)
        position_BT = position_S[None, start:].float()
        for index, block in enumerate(self.blocks):
            if c.embed_skip:
                x_BTD = self.stream_scale[index] * x_BTD + self.embed_scale[index] * embedded_BTD
            value_BTHK = None
            if index < num_values:
                value_BTHK = self.value_scale[index] * tables[index]
            elif index >= num_blocks - num_values:
                place = index - (num_blocks - num_values)
                value_BTHK = self.value_scale[num_values + place] * tables[place]
            x_BTD = block(x_BTD, position_BT, mask_B1TS, cache, value_BTHK)
        x_BTD = norm(x_BTD)[:, -logits_to_keep:] if logits_to_keep else norm(x_BTD)
        logits = c.softcap * torch.tanh(self.head(x_BTD).float() / c.softcap)[..., : c.vocab_size]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)

    def _ngram_rows(self, ids_BS: Tensor, is_text_BS: Tensor, n: int) -> Tensor:
        """Rows of a table for each id and the n - 1 before it; the last row where there are fewer."""
        rows, hash_BS, is_whole_BS = self.config.ngram_rows, torch.zeros_like(ids_BS), is_text_BS.clone()
        for back, factor in enumerate(HASH_FACTORS[:n]):
            size = max(0, ids_BS.size(1) - back)
            hash_BS[:, back:] ^= factor * ids_BS[:, :size]
            is_whole_BS[:, :back] = False
            is_whole_BS[:, back:] &= is_text_BS[:, :size]
        return torch.where(is_whole_BS, hash_BS % (rows - 1), rows - 1)
