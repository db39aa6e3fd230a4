"""What becomes of the MLPs' neurons in training: how evenly updates move them, and which fall silent.

    python train_gpt.py configs/sotu_base.toml --neuron_stats=100

Neuron i of an MLP is row i of gate, up and down transposed, all [F, D]. A measurement at step s is taken around the
training step that makes step s, by the first rank, off the training clock: the weights are copied before the optimizers
move them, the update is the difference afterwards (weight decay included), and activations are those of the new weights
on the first validation micro-batch, at most `micro_batch_tokens`. A measurement changes neither weights, gradients nor
random numbers. It holds one float32 copy of all MLP weights, and costs a forward pass and a Gram matrix for each
matrix.

A row {"step", "tokens", "train_time_s", "neurons"} of metrics.jsonl has, in lists with one number a layer:

  gate, up, down  (without gate where the MLP has none)
                  update_cv: standard deviation over mean of the row norms of the update
                  leverage_cv, leverage_low: of its leverage scores (see `leverage`), which have mean 1: standard
                  deviation, and mean of the lowest tenth, 1 if all are equal
                  least_moved_share: row norms of the updates summed over the measurements so far (a sample of the
                  steps): the share of the total that the least-moved tenth of neurons has, 0.1 if all are equal
                  effective_rank: of the weights (see there)
  median          over neurons, of their outputs' size, by its mean over the tokens and by its peak (largest) over them
  dead            share of neurons below each threshold times that median, by mean and by peak
  ever_dead       share that was dead at this or an earlier measurement
  revived         share that was dead at an earlier measurement and is not now

and dead_since, for all layers together: half of the neurons that are dead at the main threshold now have been dead at
every measurement from this step on, or longer. null is what has no value: ratios of a zero update, anything not finite.

A neuron that fires rarely may be dead by its mean; by its peak it is not. Relative to a median no more than half of a
layer can be dead, so watch `median` as well: a layer that falls silent as a whole shows there alone. And an optimizer
that makes neurons alike by design, as Aurora does, has fewer far below the median for that reason alone.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model import GPT

# All four are always reported. They and the main one were fixed before any run had been looked at.
THRESHOLDS = (0.3, 0.1, 0.03, 0.01)
MAIN = 0.1
MEASURES = ("mean", "peak")
MATRICES = ("gate", "up", "down")
RIDGE = 1e-12

Row = dict[str, Any]


def leverage(X: Tensor) -> Tensor:
    """Leverage scores of the rows of X [B, F, D], scaled to mean 1; float64 [B, F], not finite for X = 0.

    They are the squared row norms of X's polar factor U = X (X^T X)^(-1/2): with X^T X = L L^T (Cholesky) those of
    X L^-T, which needs no SVD. Their sum is the rank, so that all are rank / F for a matrix that treats its rows alike.
    The Gram matrix of X / ||X||_F gets a ridge of 1e-12: X may be wide or rank-deficient, and singular values far below
    1e-6 ||X||_F count as zero (the polar factor is then the partial isometry on what is left).
    """
    X = X.double()
    X = X / X.norm(dim=(-2, -1), keepdim=True)
    gram = X.mT @ X
    gram.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
    L, failed = torch.linalg.cholesky_ex(gram)
    scores = torch.linalg.solve_triangular(L, X.mT, upper=False).square().sum(-2)
    return (scores / scores.mean(-1, keepdim=True)).masked_fill((failed != 0)[:, None], math.nan)


def effective_rank(W: Tensor) -> Tensor:
    """Participation ratio (sum s^2)^2 / sum s^4 of the singular values s of W [B, F, D]: 1 to min(F, D); float64 [B].

    With the Gram matrix G = W^T W it is tr(G)^2 / ||G||_F^2. Not finite for W = 0.
    """
    W = W.double()
    gram = W.mT @ W
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1).square() / gram.square().sum((-2, -1))


def spread(values: Tensor) -> Tensor:
    """Standard deviation over mean of the last dimension."""
    return values.std(-1) / values.mean(-1)


def lowest_tenth(values: Tensor) -> Tensor:
    """Mean of the lowest tenth (at least one) of the last dimension, over the mean of all."""
    count = max(1, round(values.size(-1) / 10))
    return values.topk(count, largest=False).values.mean(-1) / values.mean(-1)


def number(value: Tensor | float) -> float | None:
    """Five significant digits, for JSON; None for what is not finite."""
    return float(f"{float(value):.5g}") if math.isfinite(value) else None


def pooled(values: Iterable[float | None]) -> float | None:
    """Mean over the layers that have a value."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@torch.no_grad()
def magnitudes(model: GPT, inputs_BT: Tensor, window: int | Tensor | None = None) -> list[Tensor]:
    """Size of the outputs of each block's neurons, mean and peak over the tokens; float64 [2, F] on the CPU."""
    found = []

    def note(mlp: Any, arguments: tuple[Tensor]) -> None:
        size_NF = mlp.activations(arguments[0]).abs().flatten(0, -2)
        found.append(torch.stack([size_NF.mean(0, dtype=torch.float32), size_NF.amax(0).float()]).cpu().double())

    hooks = [block.mlp.register_forward_pre_hook(note) for block in blocks(model)]
    try:
        model.hidden(inputs_BT, window)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def blocks(model: GPT) -> list[Any]:
    return list(model.blocks)


def weights(mlp: Any) -> Tensor:
    """Copy of gate, up and down transposed, or of the last two: [3 or 2, F, D]."""
    return torch.stack([*mlp.gate_up.detach(), mlp.down.detach().mT])


class NeuronStats:
    """Measurements of a model's MLPs: `before_step`, the training step, then `measure`.

    `state` is what accumulates, tensors on the CPU, one per layer, and the `last` measurement with its step, for the
    summary; a checkpoint keeps it and it is given back here.
    Raises ValueError for a model whose blocks have other MLPs.
    """

    def __init__(self, model: GPT, state: dict[str, Any] | None = None) -> None:
        for block in blocks(model):
            if not _is_gated(getattr(block, "mlp", None)):
                raise ValueError(
                    "neuron_stats needs blocks with mlp.gate_up [2 or 1, F, D], mlp.down [D, F] and mlp.activations, "
                    "which this model has not; set neuron_stats = 0, or teach harness/neuron_stats.py your MLP"
                )
        self.model, self._before = model, list[Tensor]()
        self.matrices = MATRICES[-1 - blocks(model)[0].mlp.gate_up.size(0) :]
        zeros = partial(torch.zeros, device="cpu")
        widths = [block.mlp.down.size(1) for block in blocks(model)]
        self.state = state or dict(
            moved=[zeros(len(self.matrices), F, dtype=torch.float64) for F in widths],  # sums of row norms
            ever_dead=[zeros(len(MEASURES), len(THRESHOLDS), F, dtype=torch.bool) for F in widths],
            dead_since=[zeros(len(MEASURES), F, dtype=torch.int64) for F in widths],  # 0: alive
            last=None,
        )

    def before_step(self) -> None:
        self._before = [weights(block.mlp) for block in blocks(self.model)]

    @torch.no_grad()
    def measure(self, step: int, inputs_BT: Tensor, targets_BT: Tensor, window: int | Tensor | None = None) -> Row:
        """The `neurons` of a row, for the step that was just made; adds to `state`.

        Activations are of `inputs_BT`, without rows that only fill the batch up, whose targets are negative, with the
        step's attention `window` (None: the model's own).
        """
        row: Row = {name: {} for name in (*self.matrices, "median", "dead", "ever_dead", "revived")}
        for layer, size in enumerate(magnitudes(self.model, inputs_BT[targets_BT[:, 0] >= 0], window)):
            self._measure_weights(layer, row)
            self._measure_activations(layer, size, step, row)
        self._before.clear()
        since = torch.cat(self.state["dead_since"], dim=-1)
        row["dead_since"] = {m: number(s[s > 0].double().quantile(0.5)) if s.any() else None
                             for m, s in zip(MEASURES, since, strict=True)}  # fmt: skip
        self.state["last"] = dict(step=step, **row)
        return row

    def _measure_weights(self, layer: int, row: Row) -> None:
        after = weights(blocks(self.model)[layer].mlp)
        update = after - self._before[layer]
        norms, scores, moved = update.double().norm(dim=-1), leverage(update), self.state["moved"][layer]
        moved += norms.cpu()
        found = dict(
            update_cv=spread(norms), leverage_cv=spread(scores), leverage_low=lowest_tenth(scores),
            least_moved_share=0.1 * lowest_tenth(moved), effective_rank=effective_rank(after),
        )  # fmt: skip
        for key, of_each in found.items():
            for name, value in zip(self.matrices, of_each.tolist(), strict=True):
                row[name].setdefault(key, []).append(number(value))

    def _measure_activations(self, layer: int, size: Tensor, step: int, row: Row) -> None:
        """size: mean and peak of each neuron [2, F]."""
        median = size.quantile(0.5, dim=-1)
        limits = median[:, None] * median.new_tensor(THRESHOLDS)
        dead = size[:, None] < limits[:, :, None]
        ever, since = self.state["ever_dead"][layer], self.state["dead_since"][layer]
        shares = dict(dead=dead, revived=ever & ~dead, ever_dead=ever.logical_or_(dead))
        now = dead[:, THRESHOLDS.index(MAIN)]
        since.copy_(torch.where(now, since.masked_fill(since == 0, step), 0))
        for i, measure in enumerate(MEASURES):
            row["median"].setdefault(measure, []).append(number(median[i]))
            for name, share in shares.items():
                lists = row[name].setdefault(measure, {})
                for threshold, value in zip(THRESHOLDS, share[i].double().mean(-1), strict=True):
                    known = value if median[i].isfinite() else math.nan  # nothing is below a median that is none
                    lists.setdefault(f"{threshold:g}", []).append(number(known))


def _is_gated(mlp: object) -> bool:
    """Whether the MLP is laid out as model.MLP's, whatever its class."""
    if not isinstance(mlp, nn.Module) or not hasattr(mlp, "activations"):
        return False
    gate_up, down = getattr(mlp, "gate_up", None), getattr(mlp, "down", None)  # a compiled one has other names for them
    return isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.shape[1:] == down.mT.shape


def in_words(row: Row) -> str:
    """A measurement, with its step, in one line; pooled over the layers."""
    dead = 100 * (pooled(row["dead"]["mean"][f"{MAIN:g}"]) or 0.0)
    cvs = [(name, pooled(row[name]["update_cv"])) for name in MATRICES if name in row]
    told = ", ".join(f"{name} {'-' if cv is None else f'{cv:.3f}'}" for name, cv in cvs)
    return f"step {row['step']}: {dead:.2f}% dead (mean below {MAIN:g} of the median); spread of update rows: {told}"
