"""What becomes of the MLPs' neurons in training: how evenly updates move them, which do something, which fall silent.

    python train_gpt.py configs/sotu_base.toml --neuron_stats=100

Neuron i of an MLP is row i of gate, up and down transposed, all [F, D]. A measurement at step s is taken around the
training step that makes step s, by the first rank, off the training clock: the weights are copied before the optimizers
move them, the update is the difference afterwards (weight decay included), and activations are those of the new weights
on the first validation micro-batch, at most `micro_batch_tokens`. A measurement changes neither weights, gradients nor
random numbers. It holds one float32 copy of all MLP weights and works on a layer at a time in float64; it costs a
forward pass, and for each matrix three Gram matrices, two Cholesky factors and two triangular solves. The measurement
at the schedule's last step costs seven forward passes more.

A row {"step", "tokens", "train_time_s", "neurons"} of metrics.jsonl has, in lists with one number a layer:

  gate, up, down  (without gate where the MLP has none)
                  leverage: how evenly rows move, in three KINDS of scores with mean 1. `row_norms`: squared row norms
                  of the update as it was. `update` and `momentum`: leverage scores (see there), squared row norms of
                  the exact polar factor, of that update and of the momentum after the step (Adam's first moment,
                  RMSprop's last steps), without Nesterov's look-ahead. An update that is orthogonal has the same
                  `row_norms` and `update`. Equal rows are Aurora's by construction, so that only its momentum says how
                  uneven they would be under Muon: compare it with Muon's momentum. Of each kind: `below`, the share of
                  rows whose score is below each of LEVERAGES; `effective`, the participation ratio of the scores over
                  F, 1 if all are equal; `persistence`, Spearman's correlation with the scores at the measurement
                  before. null for momentum that several ranks share. An update is a difference of weights: under SGD
                  or a tiny rate rounding is a part of it, and with lookahead its shift.
                  update_cv: standard deviation over mean of the row norms of the update
                  least_moved_share: row norms of the updates summed over the measurements so far (a sample of the
                  steps): the share of the total that the least-moved tenth of neurons has, 0.1 if all are equal
                  effective_rank: of the weights (see there)
  contributing    participation ratio over F of the neurons' contributions, mean size of the output times norm of the
                  column of down: 1 if all add as much to the residual stream
  median          over neurons, of their outputs' size, by its mean over the tokens and by its peak (largest) over them
  dead            share of neurons below each threshold times that median, by mean and by peak
  ever_dead       share that was dead at this or an earlier measurement
  revived         share that was dead at an earlier measurement and is not now

and, for all layers together, dead_since: half of the neurons that are dead at the main threshold now have been dead at
every measurement from this step on, or longer; pruning (at the schedule's last step, else null): see there. null is
what has no value: ratios of a zero update, anything not finite.

Uneven leverage, little contribution and silence are three things: a neuron with small updates may be alive, and needed.
One that fires rarely may be dead by its mean; by its peak it is not. Relative to a median no more than half of a
layer can be dead, so watch `median` as well: a layer that falls silent as a whole shows there alone. And an optimizer
that makes neurons alike by design, as Aurora does, has fewer far below the median for that reason alone.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
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
KINDS = ("row_norms", "update", "momentum")
LEVERAGES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # times the mean; a histogram, summed up
IDLE = 0.25  # below this times the mean a row is called idle in words, tables and figures
PRUNED = (0.1, 0.2, 0.3, 0.4, 0.5)
TOKENS_AT_ONCE = 4096  # through the model with pruned MLPs: its logits may be whole, where training's are not
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


def effective_share(x: Tensor) -> Tensor:
    """Participation ratio (sum x)^2 / sum x^2 over F, of x [..., F] >= 0: 1 if all are equal, 1 / F if one is all."""
    return x.sum(-1).square() / (x.size(-1) * x.square().sum(-1))


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's, over the last dimension; equal values share their mean rank. Not finite where one side has no two
    values that differ, or some that are not finite."""

    def ranks(values: Tensor) -> Tensor:
        values = values.contiguous()
        ordered = values.sort(dim=-1).values
        twice = (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)).double()
        known = values.isfinite().all(-1, keepdim=True)
        return (twice - twice.mean(-1, keepdim=True)).masked_fill(~known, math.nan)

    x, y = ranks(x), ranks(y)
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


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


def contributions(model: GPT, mean_sizes: Iterable[Tensor]) -> list[Tensor]:
    """What each block's neurons add to the residual stream: the mean sizes of their outputs [F], as of `magnitudes`,
    times the norms of the columns of down; float64 [F] on the CPU."""
    columns = [block.mlp.down.detach().double().norm(dim=0).cpu() for block in blocks(model)]
    return [size * column for size, column in zip(mean_sizes, columns, strict=True)]


@torch.no_grad()
def loss_without(
    model: GPT,
    of_blocks: Sequence[Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    window: int | Tensor | None = None,
) -> dict[float, float]:
    """Mean loss in nats per token over `batches` of inputs and targets [B, T], by the share of its neurons that every
    block is without, 0 and PRUNED: those with the least of `of_blocks` [F] each, the first ones among equals."""
    lowest = [values.argsort(stable=True) for values in of_blocks]
    totals, num_tokens = dict.fromkeys((0.0, *PRUNED), 0.0), 0
    for inputs_BT, targets_BT in batches:
        num_tokens += int((targets_BT >= 0).sum())
        for share in totals:
            with _pruned(model, [order[: round(share * len(order))] for order in lowest]):
                totals[share] += float(model(inputs_BT, targets_BT, window))
    return {share: total / num_tokens for share, total in totals.items()}


def pruning(
    model: GPT, batches: Iterable[tuple[Tensor, Tensor]], window: int | Tensor | None = None
) -> dict[str, float | None]:
    """By how many nats per token the loss over `batches` of inputs and targets [B, T] rises when every block is without
    one of the shares PRUNED of its neurons, those that contribute least over these very tokens."""
    pieces = list[tuple[Tensor, Tensor]]()
    for inputs_BT, targets_BT in batches:
        rows = targets_BT[:, 0] >= 0  # others only fill a batch up
        length = max(1, TOKENS_AT_ONCE // inputs_BT.size(1))
        pieces += zip(inputs_BT[rows].split(length), targets_BT[rows].split(length), strict=True)
    num_rows = sum(len(inputs_BT) for inputs_BT, _ in pieces)
    sizes = [[len(inputs_BT) / num_rows * size[0] for size in magnitudes(model, inputs_BT, window)]
             for inputs_BT, _ in pieces]  # fmt: skip
    mean_sizes = [torch.stack(of_block).sum(0) for of_block in zip(*sizes, strict=True)]
    losses = loss_without(model, contributions(model, mean_sizes), pieces, window)
    return {f"{share:g}": number(losses[share] - losses[0]) for share in PRUNED}


@contextlib.contextmanager
def _pruned(model: GPT, of_blocks: Iterable[Tensor]) -> Iterator[None]:
    """Without the neurons of these places in each block: their columns of down are zero in the meantime."""
    kept = [block.mlp.down.detach().clone() for block in blocks(model)]
    try:
        for block, places in zip(blocks(model), of_blocks, strict=True):
            block.mlp.down[:, places.to(block.mlp.down.device)] = 0
        yield
    finally:
        for block, down in zip(blocks(model), kept, strict=True):
            block.mlp.down.copy_(down)


def blocks(model: GPT) -> list[Any]:
    return list(model.blocks)


def weights(mlp: Any) -> Tensor:
    """Copy of gate, up and down transposed, or of the last two: [3 or 2, F, D]."""
    return torch.stack([*mlp.gate_up.detach(), mlp.down.detach().mT])


class NeuronStats:
    """Measurements of a model's MLPs: `before_step`, the training step, then `measure`.

    `state` is what accumulates, tensors on the CPU, one per layer, and the `last` measurement with its step, for the
    summary; a checkpoint keeps it and it is given back here. Momentum is read from the states of `optimizers`;
    `last_step` is the schedule's. Raises ValueError for a model whose blocks have other MLPs.
    """

    def __init__(
        self,
        model: GPT,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        last_step: int | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        for block in blocks(model):
            if not _is_gated(getattr(block, "mlp", None)):
                raise ValueError(
                    "neuron_stats needs blocks with mlp.gate_up [2 or 1, F, D], mlp.down [D, F] and mlp.activations, "
                    "which this model has not; set neuron_stats = 0, or teach harness/neuron_stats.py your MLP"
                )
        self.model, self.optimizers, self.last_step, self._before = model, optimizers, last_step, list[Tensor]()
        self.matrices = MATRICES[-1 - blocks(model)[0].mlp.gate_up.size(0) :]
        zeros = partial(torch.zeros, device="cpu")
        widths = [block.mlp.down.size(1) for block in blocks(model)]
        num = len(self.matrices)
        self.state: dict[str, Any] = dict(
            moved=[zeros(num, F, dtype=torch.float64) for F in widths],  # sums of row norms
            leverage=[zeros(len(KINDS), num, F, dtype=torch.float64) for F in widths],  # at the last measurement
            ever_dead=[zeros(len(MEASURES), len(THRESHOLDS), F, dtype=torch.bool) for F in widths],
            dead_since=[zeros(len(MEASURES), F, dtype=torch.int64) for F in widths],  # 0: alive
            last=None,
        )
        if state and self.state.keys() == state.keys():  # an older version's begins anew
            self.state = state

    def before_step(self) -> None:
        self._before = [weights(block.mlp) for block in blocks(self.model)]

    @torch.no_grad()
    def measure(self, step: int, inputs_BT: Tensor, targets_BT: Tensor, window: int | Tensor | None = None) -> Row:
        """The `neurons` of a row, for the step that was just made; adds to `state`.

        Activations are of `inputs_BT`, without rows that only fill the batch up, whose targets are negative, with the
        step's attention `window` (None: the model's own).
        """
        names = *self.matrices, "median", "dead", "ever_dead", "revived"
        row: Row = {name: {} for name in names}
        sizes = magnitudes(self.model, inputs_BT[targets_BT[:, 0] >= 0], window)
        for layer, size in enumerate(sizes):
            self._measure_weights(layer, row)
            self._measure_activations(layer, size, step, row)
        self._before.clear()
        of_blocks = contributions(self.model, [size[0] for size in sizes])
        row["contributing"] = [number(effective_share(values)) for values in of_blocks]
        since = torch.cat(self.state["dead_since"], dim=-1)
        row["dead_since"] = {m: number(s[s > 0].double().quantile(0.5)) if s.any() else None
                             for m, s in zip(MEASURES, since, strict=True)}  # fmt: skip
        is_last = step == self.last_step
        row["pruning"] = pruning(self.model, [(inputs_BT, targets_BT)], window) if is_last else None
        self.state["last"] = dict(step=step, **row)
        return row

    def _momentum(self, mlp: Any) -> Tensor | None:
        """Of gate, up and down transposed, as `weights`; None where this process does not hold it whole."""
        found = []
        for p in (mlp.gate_up, mlp.down):
            states = [optimizer.state[p] for optimizer in self.optimizers if p in optimizer.state]
            state = states[0] if states else {}
            buffer = state.get("momentum_buffer", state.get("exp_avg"))
            if buffer is None or buffer.is_meta or buffer.shape != p.shape:
                return None
            found.append(buffer)
        return torch.stack([*found[0], found[1].mT])

    def _measure_weights(self, layer: int, row: Row) -> None:
        mlp = blocks(self.model)[layer].mlp
        after = weights(mlp)
        update, momentum = after - self._before[layer], self._momentum(mlp)
        norms, moved = update.double().norm(dim=-1), self.state["moved"][layer]
        moved += norms.cpu()
        measured = dict(
            update_cv=spread(norms), least_moved_share=0.1 * lowest_tenth(moved), effective_rank=effective_rank(after)
        )
        for key, of_each in measured.items():
            for name, value in zip(self.matrices, of_each.tolist(), strict=True):
                row[name].setdefault(key, []).append(number(value))
        squares = norms.square() / norms.square().mean(-1, keepdim=True)
        of_momentum = torch.full_like(squares, math.nan) if momentum is None else leverage(momentum)
        self._measure_leverage(layer, torch.stack([squares, leverage(update), of_momentum]).cpu(), row)

    def _measure_leverage(self, layer: int, scores: Tensor, row: Row) -> None:
        """scores: of each of KINDS, float64 [3, matrices, F]."""
        effective, persistence = effective_share(scores), rank_correlation(scores, self.state["leverage"][layer])
        below = (scores[..., None] < scores.new_tensor(LEVERAGES)).double().mean(-2)
        below.masked_fill_(~scores.isfinite().all(-1)[..., None], math.nan)
        self.state["leverage"][layer] = scores
        for i, kind in enumerate(KINDS):
            for j, name in enumerate(self.matrices):
                lists = row[name].setdefault("leverage", {}).setdefault(kind, {})
                for key, values in ("effective", effective), ("persistence", persistence):
                    lists.setdefault(key, []).append(number(values[i, j]))
                for edge, share in zip(LEVERAGES, below[i, j], strict=True):
                    lists.setdefault("below", {}).setdefault(f"{edge:g}", []).append(number(share))

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


def idle_share(row: Row, kind: str, edge: float = IDLE) -> float | None:
    """Share of the rows of gate and up, or of up alone, whose score of one of KINDS is below `edge` times the mean; the
    mean over layers."""
    matrices = [name for name in MATRICES[:2] if name in row]
    return pooled(pooled(row[name]["leverage"][kind]["below"][f"{edge:g}"]) for name in matrices)


def in_words(row: Row) -> str:
    """A measurement, with its step, in one line; pooled over the layers."""

    def percent(share: float | None, digits: int) -> str:
        return "-" if share is None else f"{100 * share:.{digits}f}%"

    idle = ", ".join(f"{kind} {percent(idle_share(row, kind), 1)}" for kind in KINDS)
    dead = percent(pooled(row["dead"]["mean"][f"{MAIN:g}"]), 2)
    return (
        f"step {row['step']}: {dead} dead (mean below {MAIN:g} of the median); "
        f"gate and up rows below {IDLE:g} of the mean: {idle}"
    )
