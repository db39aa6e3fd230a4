"""Optimizers for hidden matrices, and the routing of a model's parameters to them.

    from optim import Aurora, Muon, build_optimizers

`build_optimizers(model, config)` gives every matrix inside the blocks to the matrix optimizer the config names, and
embeddings, head, gains and scalars to AdamW with a learning rate each. A step of all of them, on any number of ranks:

    start_reduction(optimizers)            before the backward pass that makes gradients final; overlaps with it
    loss.backward()
    finish_reduction(optimizers)           gradients are means over the ranks
    clip_gradients(optimizers, max_norm)
    for optimizer in optimizers: optimizer.step()

of which backward and step are enough.
"""

from optim.aurora import Aurora
from optim.config import RULES, TORCH_OPTIMIZERS, OptimizerConfig, find_rule, with_rule_options
from optim.gradients import clip_gradients, finish_reduction, start_reduction
from optim.matrix_optimizer import MatrixOptimizer
from optim.muon import Muon
from optim.normuon import NorMuon, UNorMuon
from optim.options import Option
from optim.riemannian_aurora import RiemannianAurora
from optim.routing import build_optimizers, routing_table

__all__ = [
    "RULES",
    "TORCH_OPTIMIZERS",
    "Aurora",
    "MatrixOptimizer",
    "Muon",
    "NorMuon",
    "OptimizerConfig",
    "Option",
    "RiemannianAurora",
    "UNorMuon",
    "build_optimizers",
    "clip_gradients",
    "find_rule",
    "finish_reduction",
    "routing_table",
    "start_reduction",
    "with_rule_options",
]  # fmt: skip
