"""What a run's settings have to satisfy beside having the right types."""

import math
import re
from typing import Any

import torch

from data.tokenizer import vocab_size
from kernels.attention import KINDS
from kernels.linear_cross_entropy import LARGEST_SOFTCAP

POSITIVE = (
    "vocab_size val_tokens num_layers num_heads head_dim model_dim seq_len softcap train_steps batch_tokens "
    "micro_batch_tokens val_every log_every checkpoint_keep adam_eps"
)
NOT_NEGATIVE = (
    "mlp_hidden matrix_lr matrix_weight_decay momentum_warmup_steps polar_steps embed_lr head_lr scalar_lr "
    "weight_decay warmup_steps target_loss neuron_stats checkpoint_every window window_start value_embeds z_loss "
    "tie_head_steps small_batch_steps short_row_steps"
)
LONGEST_NAME = 255 - len("-20261122T033309Z-9823dd")  # bytes; the latter is what makes a run directory's name unique


def check_config(config: Any) -> None:
    """ValueError with setting, value, rule and what would work, for the first setting of a Config that cannot be."""
    for key in f"{POSITIVE} {NOT_NEGATIVE}".split():
        value, is_positive = getattr(config, key), key in POSITIVE.split()
        if value < 0 or (is_positive and value == 0) or not math.isfinite(value):
            rule = "positive" if is_positive else "0 or more"
            raise ValueError(f"{key} = {value} must be {rule}; the default is {getattr(type(config), key)}")
    check_name(config.name)
    if not 0 <= config.cooldown_frac <= 1:
        raise ValueError(f"cooldown_frac = {config.cooldown_frac} must be between 0 and 1; 0.7 is usual")
    if config.head_dim % 2:
        raise ValueError(f"head_dim = {config.head_dim} must be even for rotary positions; 64 or 128 are usual")
    if config.tokenizer != "none" and config.vocab_size != vocab_size(config.tokenizer):
        raise ValueError(
            f"vocab_size = {config.vocab_size} does not fit tokenizer = {config.tokenizer!r}, which has "
            f"{vocab_size(config.tokenizer)} tokens; set that, or tokenizer = 'none' for ids of your own"
        )
    check_options(config)


def check_name(name: str) -> None:
    """ValueError unless `name` can begin a directory's name, and stay within the folder that is in."""
    if re.match(r"\w", name) and "/" not in name and name.isprintable() and len(name.encode()) <= LONGEST_NAME:
        return
    works = re.sub(r"[^\w.,=:+%@-]+", "_", name).lstrip("_.,=:+%@-").encode()[:LONGEST_NAME].decode(errors="ignore")
    raise ValueError(
        f"name = {name[:100]!r} must begin with a letter, a digit or _ and have no /, no control characters "
        f"and at most {LONGEST_NAME} bytes: the run directory's name begins with it; {works[:100] or 'run'!r} works"
    )


def check_options(config: Any) -> None:
    """ValueError for options that do not go with the other settings."""
    if config.attention not in KINDS:
        raise ValueError(f"attention = {config.attention!r} is unknown; choose one of {', '.join(KINDS)}")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    if config.attention == "flex" and not on_gpu:
        raise ValueError("attention = 'flex' needs a CUDA GPU: it has no gradient elsewhere; blocks is the CPU's")
    if config.attention == "blocks" and on_gpu:
        raise ValueError("attention = 'blocks' is for CPUs, and this runs on a GPU; set --attention=auto")
    uses_flex = config.attention == "flex" or (config.attention == "auto" and (config.doc_mask or config.window))
    if on_gpu and uses_flex and config.head_dim < 16:
        raise ValueError(f"head_dim = {config.head_dim} must be 16 or more for flex_attention; 64 or 128 are usual")
    if config.doc_mask and config.tokenizer == "none":
        raise ValueError("doc_mask needs a tokenizer, whose <|endoftext|> begins documents; set tokenizer = 'gpt2'")
    if config.fused_head and config.softcap > LARGEST_SOFTCAP:
        raise ValueError(
            f"fused_head needs softcap <= {LARGEST_SOFTCAP:g}, and it is {config.softcap}; 15 and 30 are usual"
        )
    if config.window_start > config.window:
        raise ValueError(
            f"window_start = {config.window_start} is more than window = {config.window}, to which it grows; raise "
            "window, or set window_start = 0"
        )
    if 2 * config.value_embeds > config.num_layers:
        raise ValueError(
            f"value_embeds = {config.value_embeds} must be at most half of num_layers = {config.num_layers}: each "
            "table serves two blocks; 1 to 3 are usual"
        )
    if config.unet_skips and config.num_layers < 2:
        raise ValueError(f"unet_skips needs two blocks or more, and num_layers = {config.num_layers}")
    if config.joint_matrices and config.neuron_stats:
        raise ValueError("neuron_stats looks at gate and up apart, which joint_matrices joins; leave one of them out")
    if config.short_row_steps and config.seq_len % 2:
        raise ValueError(f"short_row_steps cuts rows in two, and seq_len = {config.seq_len} is odd; 1024 is usual")
    if config.tie_head_steps and config.embed_lr != config.head_lr:
        raise ValueError(
            f"tie_head_steps needs one rate for both matrices, and embed_lr = {config.embed_lr}, head_lr = "
            f"{config.head_lr}; set --embed_lr={config.head_lr}"
        )
