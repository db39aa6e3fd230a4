"""Aurora in Hugging Face's Trainer: its clipping, its warm-up and cosine, its checkpoints and its resume.

python examples/hugging_face_trainer.py
"""

import tempfile

import torch
from nanogpt_aurora import Aurora, CombinedOptimizer
from toy import VOCABULARY, check, sequences
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

STEPS = 60


def new_trainer(folder: str) -> Trainer:
    set_seed(0)
    size = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **size))
    data = [dict(input_ids=row, labels=row) for row in sequences(32 * STEPS, seed=0)]
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=32, max_grad_norm=1.0, lr_scheduler_type="cosine",
        warmup_steps=5, save_steps=STEPS // 2, logging_first_step=True, logging_steps=20, report_to="none",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    # shown
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]  # not embeddings, lm_head and norms
    chosen = set(matrices)
    others = [p for p in model.parameters() if p not in chosen]
    optimizer = CombinedOptimizer([Aurora(matrices, lr=0.05), torch.optim.AdamW(others, lr=0.01)])
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))  # None: its own schedule
    # end
    return trainer  # noqa: RET504 (the lines above stand in the documents)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer, resumed = new_trainer(folder), new_trainer(folder)
        trainer.train()
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
    first, last = (trainer.state.log_history[i]["loss"] for i in (0, -2))
    check(first, last, trainer.model, resumed.model)


if __name__ == "__main__":
    main()
