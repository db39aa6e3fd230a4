"""A program of someone who has the wheel, beside another package called `kernels`; then it meets the repository.

python wheel_user.py REPOSITORY RESULTS
"""

import importlib.util
import sys
from typing import Any

import torch
from torch import nn


def train(optim: Any, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """A model and its optimizers after three steps from the start, or from `state`, the result of a call before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8))
    optimizers = optim.build_optimizers(model, optim.OptimizerConfig())
    if state is not None:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    for _ in range(3):
        optim.start_reduction(optimizers)
        model(torch.randn(5, 24)).square().sum().backward()
        optim.clip_gradients(optimizers, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}


def gram(kernels: Any) -> torch.Tensor:
    """By the package's own Triton kernel, under the interpreter where there is no GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    X = torch.randn(1, 20, 12, generator=torch.Generator().manual_seed(0)).to(device)
    found: torch.Tensor = kernels.backend("triton", device).gram(X)
    return found.cpu()


def main(repository: str, results: str) -> None:
    import nanogpt_aurora
    import nanogpt_aurora.kernels

    import kernels

    found = {"trained": train(nanogpt_aurora), "others": kernels.__doc__}
    found["optim"] = importlib.util.find_spec("optim") is not None
    has_triton = nanogpt_aurora.kernels.HAS_TRITON
    if has_triton:
        found["gram"] = gram(nanogpt_aurora.kernels)
    del sys.modules["kernels"]
    sys.path.insert(0, repository)

    import kernels
    import optim

    found["in the repository"] = train(optim)
    if has_triton:
        found["gram in the repository"] = gram(kernels)
    torch.save(found, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
