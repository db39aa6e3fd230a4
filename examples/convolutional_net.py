"""Aurora on the filters of a convolutional net: [out, in, height, width] are matrices [out, in x height x width].

python examples/convolutional_net.py
"""

import torch
import torch.nn.functional as F
from nanogpt_aurora import Aurora, CombinedOptimizer
from torch import Tensor, nn

STEPS = 60


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images [count, 1, 16, 16] of stripes in one of four directions, and which [count]."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(4, (count,), generator=generator)
    angle = (label * torch.pi / 4)[:, None, None]
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    phase = 6 * torch.rand(count, 1, 1, generator=generator)
    images = torch.sin(1.5 * (x * angle.cos() + y * angle.sin()) + phase)
    return (images + 0.5 * torch.randn(images.shape, generator=generator)).unsqueeze(1), label


def new_model() -> nn.Module:
    def block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    blocks = nn.Sequential(block(1, 16), block(16, 32), block(32, 32))
    return nn.Sequential(blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def main() -> None:
    torch.manual_seed(0)
    model = new_model()
    # shown
    filters = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    chosen = set(filters)
    others = [p for p in model.parameters() if p not in chosen]
    aurora = Aurora(filters, lr=0.05, flatten=True)  # without it, each would be a batch of 3 x 3 matrices
    optimizer = CombinedOptimizer([aurora, torch.optim.AdamW(others, lr=0.01)])
    # end
    for step in range(STEPS):
        images, label = stripes(64, seed=step)
        F.cross_entropy(model(images), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    images, label = stripes(512, seed=STEPS)
    accuracy = (model(images).argmax(dim=1) == label).float().mean().item()
    print(f"accuracy {accuracy:.1%} (of chance: 25%)")
    assert accuracy > 0.9


if __name__ == "__main__":
    main()
