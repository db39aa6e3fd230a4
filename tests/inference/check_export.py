"""Run in an environment that has transformers: an export against what the repository's own model gave.

python check_export.py FOLDER EXPECTED.safetensors TEXTS.json
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, expected: str, texts: str) -> None:
    known = load_file(expected)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids, logits, greedy = known["ids"], known["logits"], known["greedy"]  # [B, T], [B, T, V], [2, 11 + new]
    end, new = model.config.eos_token_id, greedy.size(1) - 11
    pad, zeros, ones = torch.full((len(ids), 5), end), torch.zeros(len(ids), 5), torch.ones_like(ids)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)
        left = model(torch.cat([pad, ids], 1), attention_mask=torch.cat([zeros, ones], 1)).logits[:, 5:]
        torch.testing.assert_close(left, logits, rtol=1e-5, atol=2e-5)
        right = model(torch.cat([ids, pad], 1), attention_mask=torch.cat([ones, zeros], 1)).logits[:, :-5]
        torch.testing.assert_close(right, logits, rtol=1e-5, atol=1e-5)
        loss = model(ids, labels=ids).loss
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        )
    how = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=end)
    for use_cache in (True, False):  # a prompt of 11 tokens, one of 5, and both at once
        for row, length in ((0, 11), (1, 5)):
            prompt = greedy[row : row + 1, 11 - length : 11]
            found = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=use_cache, **how)
            assert found[0, length:].tolist() == greedy[row, 11:].tolist(), (use_cache, length)
        mask = torch.ones(2, 11, dtype=torch.int64)
        mask[1, :6] = 0
        found = model.generate(greedy[:, :11], attention_mask=mask, use_cache=use_cache, **how)
        assert torch.equal(found[:, 11:], greedy[:, 11:]), use_cache
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for text, of_text in json.loads(Path(texts).read_text(encoding="utf-8")):
        assert tokenizer(text)["input_ids"] == of_text, text
        assert tokenizer.decode(of_text) == text
    assert tokenizer("<|endoftext|>")["input_ids"] == [end]
    print("equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
