"""How long the optimizer step, the loss and the MLPs should take on an H100, said before one is asked.

    python -m benchmarks.step_model             the 124M and 1.1B models; needs no GPU

The rates are those of benchmarks/polar_model.py. A matrix product takes its FLOPs at TENSOR, in 8 bits at twice that,
or its bytes at DRAM, whichever is longer; a pass over memory takes its bytes. The loss's kernel takes the longest of
its bytes, its instructions and its special functions (kernels/cross_entropy.py); its bytes once with the second read
of a row from L2, once with none. Everything is launched without a gap, as in a CUDA graph: a step whose kernels are
shorter than Python takes to launch them is as long as that (benchmarks/host_time.py).

Operands in 8 bits (kernels/linear.py) take the passes that torch runs one by one, or those that torch.compile should
leave: the norm and the cast. The head inside linear_cross_entropy is never compiled. That 8 bits are twice as fast is
the datasheet's word. What the model leaves out is what polar_model leaves out, loads from L2 for these products, and
passes that are the same with and without 8 bits.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from benchmarks.polar_model import DRAM, LAUNCH, NORMALIZE, PROCESSORS, TENSOR, calls_of, estimate
from benchmarks.polar_speed import CASES
from data import console
from harness.tables import Row, table
from kernels.cross_entropy import ROW
from kernels.linear_cross_entropy import default_chunk_tokens
from kernels.triton_common import cdiv
from train_gpt import load_config

RECIPES = {"124m": "configs/fineweb_124m_aurora.toml", "1b": "configs/fineweb_1b_aurora.toml"}
CLOCK = 1.755e9  # Hz; assumed
# Of the loss for each logit (counted in the code for sm_90 by Triton 3.9), as the H100 ran it, and now; and how many a
# multiprocessor does per cycle.
INSTRUCTIONS_BEFORE, INSTRUCTIONS, LANES = 68, 33, 128
SPECIAL, SPECIAL_LANES = 6, 16  # the same of special functions
# What a step does around the polar factors: bytes for each element of the hidden matrices, counted in
# tests/kernels/test_elementwise.py, and at what rate: momentum_rows is taken to be no faster than normalize_rows was.
AROUND = {"check of gradients": (4, DRAM), "momentum_rows": (14, NORMALIZE), "apply_update": (10, DRAM)}
ADAMW = 28  # of each element of embedding and head: weight and two moments read and written, the gradient read


class Model(NamedTuple):
    width: int
    hidden: int
    gates: int
    layers: int
    vocabulary: int
    tokens: int  # of a micro-batch


def model(case: str) -> Model:
    c = load_config([RECIPES[case]])
    return Model(c.model_dim, c.hidden_dim, c.num_gates, c.num_layers, c.padded_vocab_size, c.micro_batch_tokens)


def product(m: int, n: int, k: int, is_float8: bool = False, output: int = 2) -> float:
    """Seconds of [m, k] times [k, n] with `output` bytes for each number of the result."""
    moved = (m * k + k * n) * (1 if is_float8 else 2) + m * n * output
    return LAUNCH + max(2 * m * n * k / (TENSOR * (2 if is_float8 else 1)), moved / DRAM)


def passes(elements: int, *sizes: int) -> float:
    """Seconds of passes over so many elements, each with its bytes for an element."""
    return sum(LAUNCH + elements * size / DRAM for size in sizes)


def quantized(elements: int, width: int, is_compiled: bool) -> float:
    """Seconds to find the scale of numbers of `width` bytes and to make them 8 bits."""
    return passes(elements, width, *(() if is_compiled else (2 * width,)), width + 1)


def optimizer_step(case: str, iterations: int) -> dict[str, float]:
    """Seconds by part: Muon, or with `iterations` Aurora."""
    of, hidden = model(case), sum(b * m * n for b, m, n in CASES[case])
    calls = calls_of(case, iterations, has_unit_rows=True)
    parts = {"polar factors of unit rows": sum(estimate(call).seconds for call in calls)}
    parts |= {what: len(CASES[case]) * LAUNCH + hidden * size / rate for what, (size, rate) in AROUND.items()}
    return parts | {"AdamW, embedding and head": passes(2 * of.vocabulary * of.width, ADAMW)}


def loss(
    case: str, is_float8: bool = False, fits_l2: bool = True, instructions: int = INSTRUCTIONS
) -> dict[str, float]:
    """Seconds by part of head and loss, forward and backward, for a micro-batch."""
    of = model(case)
    D, V, N = of.width, of.vocabulary, of.tokens
    C = min(N, default_chunk_tokens(V, torch.bfloat16, torch.device("cuda")))
    lanes = C * cdiv(V, ROW.columns) * ROW.columns  # those past the last column work, too
    cycles = lanes * max(instructions / LANES, SPECIAL / SPECIAL_LANES)
    kernel = LAUNCH + max(C * V * (4 if fits_l2 else 6) / DRAM, cycles / (PROCESSORS * CLOCK))
    chunks = cdiv(N, C)
    parts = {
        "weight and its gradient: cast, zeros": passes(V * D, 6, 4),
        "logits": chunks * product(C, V, D, is_float8),
        "cross_entropy": chunks * kernel,
        "gradient of x": chunks * product(C, D, V),
        "gradient of the weight": chunks * product(V, D, C, output=8),
        "times the gradient that arrives": passes(V * D, 8) + passes(N * D, 12),
        "operands in 8 bits": 0.0,
    }
    if is_float8:
        parts["operands in 8 bits"] = quantized(N * D, 2, is_compiled=False) + quantized(V * D, 4, is_compiled=False)
    return parts


def mlps(case: str, is_float8: bool = False, is_compiled: bool = True) -> float:
    """Seconds of the products of all MLPs, forward and backward, for a micro-batch, and of the casts around them."""
    of, seconds = model(case), 0.0
    N = of.tokens
    for n, k in ((of.gates * of.hidden, of.width), (of.width, of.hidden)):
        seconds += product(N, n, k, is_float8) + product(N, k, n, is_float8)
        seconds += product(n, k, N, is_float8, output=4 if is_float8 else 2)
        if not is_float8:
            seconds += passes(n * k, 6, 6)  # the weight to bfloat16, its gradient to float32
            continue
        seconds += (
            quantized(N * k, 2, is_compiled) + quantized(n * k, 4, is_compiled) + quantized(N * n, 2, is_compiled)
        )
        seconds += passes(N * k, 2) + passes(N * n, 2) + passes(n * k, 2)  # transposed copies
        seconds += passes(n * k, 5) if is_compiled else passes(n * k, 8, 5)  # the weight in 8 bits once more
    return of.layers * seconds


def rows_of(parts: Sequence[dict[str, float]], names: Iterable[str]) -> list[Row]:
    """A row for each part and one for their sum, in milliseconds."""
    columns = dict(zip(names, parts, strict=True))
    rows: list[Row] = [
        {"part, ms": part, **{name: 1e3 * each[part] for name, each in columns.items()}} for part in parts[0]
    ]
    return [*rows, {"part, ms": "in all", **{name: 1e3 * sum(each.values()) for name, each in columns.items()}}]


def main(argv: list[str]) -> int:
    if argv:
        raise ValueError(f"there are no arguments, and not {' '.join(argv)}")
    for case in RECIPES:
        what = f"{case}, {model(case).tokens:,} tokens"
        print(f"{case}, optimizer step")
        print(table(rows_of([optimizer_step(case, n) for n in (0, 2)], ["Muon", "Aurora"])) + "\n")
        variants = [loss(case, fits_l2=False, instructions=INSTRUCTIONS_BEFORE), loss(case), loss(case, fits_l2=False)]
        variants += [loss(case, is_float8=True)]
        print(f"{what}: head and loss")
        print(table(rows_of(variants, ["before", "now", "nothing from L2", "logits in 8 bits"])) + "\n")
        plain, compiled, eager = (1e3 * mlps(case, *how) for how in ((False, True), (True, True), (True, False)))
        print(f"{what}: products of the MLPs {plain:.1f} ms, in 8 bits {compiled:.1f}, not compiled {eager:.1f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(lambda: main(sys.argv[1:]), "the same command starts again"))
