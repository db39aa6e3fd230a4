"""Aurora and AdamW as two optimizers of a LightningModule, which steps them by hand; clipping, schedules, a resume.

    python examples/lightning_two_optimizers.py

Lightning steps one optimizer by itself, but not two. CombinedOptimizer, as in the other examples, is one.
"""

import tempfile
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from nanogpt_aurora import Aurora
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from toy import TinyTransformer, check, sequences

STEPS = 60


class Module(lightning.LightningModule):  # type: ignore[misc]  # which has no types
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = TinyTransformer()

    # shown
    def configure_optimizers(self) -> Any:
        matrices = [p for name, p in self.model.blocks.named_parameters() if p.ndim == 2]
        chosen = set(matrices)
        others = [p for p in self.parameters() if p not in chosen]
        optimizers = [Aurora(matrices, lr=0.05), torch.optim.AdamW(others, lr=0.01)]
        return optimizers, [LambdaLR(each, lambda step: 1 - step / STEPS) for each in optimizers]

    def training_step(self, batch: Tensor, index: int) -> None:
        self.manual_backward(loss := self.model(batch))
        for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        self.log("loss", loss)

    # end


def new_trainer(folder: str) -> lightning.Trainer:
    """It writes a checkpoint after each of two epochs."""
    lightning.seed_everything(0, verbose=False)
    return lightning.Trainer(
        max_epochs=2, callbacks=ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1), accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def main() -> None:
    with torch.no_grad():
        first = Module().model(sequences(64, seed=0)).item()
    data: Any = sequences(32 * STEPS, seed=0)
    loader = DataLoader(data, batch_size=64)
    with tempfile.TemporaryDirectory() as folder:
        whole = new_trainer(folder)
        whole.fit(Module(), loader)
        resumed = new_trainer(folder)
        resumed.fit(Module(), loader, ckpt_path=f"{folder}/epoch=0.ckpt")
    last = whole.callback_metrics["loss"].item()
    check(first, last, whole.model, resumed.model)


if __name__ == "__main__":
    main()
