"""Adagrad with sparse gradients (Duchi, Hazan and Singer 2011): a step moves the rows that it saw and reads no others.

    G_r <- G_r + g_r^2,   W_r <- W_r - lr g_r / (sqrt(G_r) + eps)        for every row r with a gradient, elementwise

The cost of a step goes with the tokens, not with the table. A row that is seen rarely keeps a high rate, and nothing
moves it in between, where Adam's momentum would. torch.optim.Adagrad computes the same in more passes over the rows,
and warns of sparse tensors that nobody checks.
"""

from collections.abc import Callable
from typing import Any

import torch


class Adagrad(torch.optim.Optimizer):
    """For weights [rows, width] of nn.Embedding(sparse=True), float32 or wider: a checkpoint would round the state of
    shorter ones, which are a ValueError. State: `sum`, [rows, width], in their dtype. Dense gradients are taken, too,
    with the same result."""

    def __init__(self, params: Any, lr: float = 0.3, eps: float = 1e-10) -> None:
        super().__init__(params, dict(lr=lr, eps=eps))
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.dtype.itemsize < torch.float32.itemsize:
                raise ValueError(f"Adagrad: weights of {p.dtype} are too short for its sums; torch.float32 works")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["sum"] = torch.zeros_like(p)
                if p.grad.is_sparse:
                    gradient = p.grad.coalesce()  # a row's gradients have to be one before they are squared
                    rows, values = gradient.indices()[0], gradient.values()
                    total = state["sum"].index_select(0, rows).addcmul_(values, values)
                    state["sum"].index_copy_(0, rows, total)
                    update = values.div(total.sqrt_().add_(group["eps"]))
                    p.index_add_(0, rows, update, alpha=-group["lr"])
                else:
                    total = state["sum"].addcmul_(p.grad, p.grad)
                    p.addcdiv_(p.grad, total.sqrt().add_(group["eps"]), value=-group["lr"])
        return loss
