"""Text from a model, one token at a time."""

import torch

from data.tokenizer import end_of_text, get_tokenizer
from model import GPT


def sample_text(model: GPT, tokenizer: str, seed: int) -> str:
    """The beginning of a document, about 200 characters on one line. Raises DataError without the tokenizer's files."""
    generator = torch.Generator().manual_seed(seed)
    tokens = generate(model, [end_of_text(tokenizer)], 200 if tokenizer == "byte" else 60, generator)
    text = " ".join(get_tokenizer(tokenizer).decode(tokens)[:200].split())
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


@torch.no_grad()
def generate(
    model: GPT, prompt: list[int], num_tokens: int, generator: torch.Generator, temperature: float = 0.8
) -> list[int]:
    """Sample `num_tokens` ids after `prompt`; `generator` must live on the CPU."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        context = torch.tensor([tokens[-model.config.seq_len :]], device=model.embed.weight.device)
        hidden_BTD = model.hidden(context, kind="sdpa")  # the others would compile or plan anew for every length
        logits_V = model.logits(hidden_BTD[:, -1:]).flatten()[: model.config.vocab_size]
        probabilities = (logits_V / temperature).softmax(0).cpu()
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return tokens[len(prompt) :]
