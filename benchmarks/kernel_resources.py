"""What the compiler makes of every kernel as it would be launched, for GPUs that are not here.

    python -m benchmarks.kernel_resources [--usual]
        a table; exit status 1 if a kernel has a fault; --usual: of each kernel only the launches that take most of a
        training step, a tenth of all of them

Faults: registers spilled, too much shared memory, products in half precision without tensor cores, two bytes written at
a time, denormal numbers seen to in the loss; and of products in half precision, on Hopper, fewer than two blocks on a
multiprocessor, a loop longer than LONGEST_LOOP, or one that loads or stores besides its bulk copies.

The wrappers are called with their own tiles for each architecture, at the shapes of a 124 M model, but the launch is
caught and its kernel compiled for that architecture instead: the same types, constants and alignment as in training.
Needs Triton, no GPU; a second or so for each kernel and core.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from data import console
from data.processes import Workers
from harness.tables import align
from kernels.apply_symmetric import apply_symmetric
from kernels.apply_update import apply_update
from kernels.cross_entropy import cross_entropy
from kernels.gram import gram
from kernels.momentum import momentum, momentum_rows
from kernels.normalize_rows import normalize_rows
from kernels.not_finite import mark_not_finite
from kernels.scale_rows import scale_rows
from kernels.scattered import Scattered, scattered
from kernels.symmetric_product import symmetric_product
from kernels.triton_common import ARCHITECTURES, DTYPES

# Most shared memory one block may ask for, in bytes (CUDA C programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
TYPES |= {torch.int64: "*i64", torch.bool: "*i1"}
# Of a Hopper multiprocessor (CUDA C programming guide): 32-bit registers, threads, and bytes of shared memory, of which
# each block takes 1 KiB more than it asks for.
REGISTERS, THREADS, SHARED = 65536, 2048, 228 * 1024
ROW_COMPARISONS = 8  # of a row's logarithm and division; the handling of denormal numbers has three for each element
LONGEST_LOOP = 100  # instructions for 128 x 128 x 64 multiplications and additions
WITHOUT_PRODUCTS = ("momentum", "normalize_rows", "scale_rows", "not_finite", "apply_update", "cross_entropy")


class Launch(NamedTuple):
    """A caught launch: what names a kernel, and what it would be compiled with."""

    what: str
    architecture: int
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]


class Resources(NamedTuple):
    launch: Launch
    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack and local memory
    shared: int  # bytes of a block
    loop: tuple[str, ...]  # instructions of the loop with the products; empty where there is none
    stores: tuple[str, ...]  # instructions that write to memory
    comparisons: int  # instructions that compare floating-point numbers

    @property
    def tensor_cores(self) -> bool:
        return any("MMA" in instruction for instruction in self.loop)

    @property
    def blocks(self) -> int:
        """Blocks that fit on a multiprocessor of Hopper at once."""
        threads = 32 * self.launch.options["num_warps"]
        registers = threads * 8 * -(-self.registers // 8)
        return min(REGISTERS // registers, THREADS // threads, SHARED // (self.shared + 1024))

    @property
    def faults(self) -> list[str]:
        what, limit = self.launch.what, SHARED_LIMIT[self.launch.architecture]
        is_half_product = not what.startswith(WITHOUT_PRODUCTS) and "_kernel float32 " not in what
        faults = ["spills"] if self.spilled else []
        faults += ["shared memory"] if self.shared > limit else []
        faults += ["no tensor cores"] if is_half_product and not self.tensor_cores else []
        faults += ["narrow stores"] if any(".U16" in store for store in self.stores) else []
        if what.startswith("cross_entropy") and self.comparisons > ROW_COMPARISONS:
            faults.append(f"{self.comparisons} comparisons around approximate functions")
        if is_half_product and self.launch.architecture == 90:
            moves = [op for op in self.loop if op.startswith(("LDG", "LDS", "STS", "STG"))]
            faults += [f"{self.blocks} block on a multiprocessor"] if self.blocks < 2 else []
            faults += [f"loop of {len(self.loop)}"] if len(self.loop) > LONGEST_LOOP else []
            faults += ["no bulk copies"] if not any(op.startswith("UTMALDG") for op in self.loop) else []
            faults += [f"{len(moves)} loads and stores in the loop"] if moves else []
        return faults


def launches(architecture: int, usual: bool = False) -> list[Launch]:
    """Every kernel with every tile and variant that the optimizers and the public functions reach; or, of each kernel,
    the launch of a 124 M model's training step."""
    caught: list[Launch] = []

    def catch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        caught.append(as_launch(what, architecture, kernel, arguments, options))

    with (
        mock.patch.object(triton.JITFunction, "run", catch),
        mock.patch("kernels.triton_common.architecture", return_value=architecture),
        mock.patch("kernels.triton_common.can_launch", return_value=True),
    ):
        if usual:
            what = "float16 768"
            X, S = torch.empty(2, 2048, 768, dtype=torch.float16), torch.empty(2, 768, 768, dtype=torch.float16)
            scale = torch.empty(2)
            gram(X, scale)
            symmetric_product(S, S, 2.0, 3.0)
            symmetric_product(S, S, 1.0, 3.0)
            symmetric_product(S, S, 1.0, 2.0, 3.0)
            apply_symmetric(X, S, 2.0)
            apply_symmetric(X, S, 2.0, scale)
            normalize_rows(X.float(), torch.float16)
            scale_rows(X, torch.empty(2, 2048), X.dtype)
            what = "float32 768"
            G, rate, U, active = torch.empty(2, 2048, 768), torch.empty(()), X.bfloat16(), torch.ones(2).bool()
            for B in (G, G.mT.contiguous()):
                momentum_rows(one_by_one(B), B, 0.95, True, active)
            mark_not_finite(one_by_one(G), torch.zeros(2))
            momentum(one_by_one(G), G.clone(), 0.95, True, active)
            apply_update([*G], U, [0, 1], rate, 2.0, 0.1)
            what = "bfloat16 50304"
            logits, targets = torch.empty(2, 50304, dtype=torch.bfloat16), torch.empty(2, dtype=torch.int64)
            cross_entropy(logits, targets, 15.0, 50257, 0.0, -1, gradient=True)
            return caught
        for dtype in DTYPES:
            for n in (768,) if dtype == torch.float32 else (768, 128):  # float32 has one tile, half formats two
                X, S = torch.empty(2, 3 * n, n, dtype=dtype), torch.empty(2, n, n, dtype=dtype)
                scale = torch.empty(2)
                what = f"{dtype} {n}".replace("torch.", "")
                gram(X)
                gram(X, scale)
                symmetric_product(S, S, 1.0, 2.0, 3.0)
                apply_symmetric(X, S, 2.0)
                apply_symmetric(X, S, 2.0, scale)
                if dtype != torch.float16:  # bfloat16 is the same by another name, float32 nobody's first choice
                    continue
                wide = X.new_empty(2, n, 3 * n)
                gram(wide.mT, scale)
                for each in (X, wide.mT):
                    gram(each, scale, dtype=torch.float32)
                symmetric_product(S, S, 2.0, 3.0)
                symmetric_product(S, S, 1.0, 3.0)
                symmetric_product(S, S, 2.0, 3.0, unrounded_A=S.float())
                symmetric_product(S, S, 1.0, 3.0, unrounded_A=S.float())
                apply_symmetric(wide.mT, S, 2.0)
                apply_symmetric(X, S, 2.0, scale, torch.bfloat16)
                apply_symmetric(wide.mT, S, 2.0, scale, torch.bfloat16)
                apply_symmetric(X, S, 2.0, scale, outputs="row_square")
                apply_symmetric(wide.mT, S, 2.0, scale, outputs="both")
        for dtype in DTYPES:
            what = f"{dtype} 768".replace("torch.", "")
            X = torch.empty(2, 2048, 768, dtype=dtype)
            normalize_rows(X, torch.float16)
            normalize_rows(X.new_empty(2, 768, 2048).mT, torch.float16)
            for each in (X, X.new_empty(2, 768, 2048).mT):
                scale_rows(each, torch.empty(2, 2048), dtype)
            for U in (X, X.new_empty(2, 768, 2048).mT):
                apply_update([torch.empty(2048, 768)], U, [0], torch.empty(()), 2.0, 0.1)
                apply_update([torch.empty(2048, 768)], U, [0], 0.02, 2.0, 0.1, cautious=True)
                apply_update([torch.empty(2048, 768)], U, [0], torch.empty(()), 2.0, torch.empty(()))
        what, G = "float32 768", torch.empty(2, 2048, 768)
        kinds: list[tuple[Any, Any]] = [(0.95, None), (torch.empty(()), None), (0.95, torch.ones(2).bool())]
        for nesterov in (True, False):
            for share, active in kinds:
                momentum(G, G.clone(), share, nesterov, active)
        for B in (G, G.mT.contiguous()):
            momentum_rows(one_by_one(B), B, torch.empty(()), False, torch.ones(2).bool())
            momentum_rows(B.clone(), B, 0.95, True)
        for dtype in (torch.float32, torch.bfloat16):
            what, gradients = f"{dtype} 768".replace("torch.", ""), one_by_one(G.to(dtype))
            mark_not_finite(gradients, torch.zeros(2))
            momentum(gradients, G.clone(), 0.95, True)
            for B in (G, G.mT.contiguous()):
                momentum_rows(gradients, B, 0.95, True)
        for dtype in (torch.float32, torch.bfloat16):
            what = f"{dtype} 50304".replace("torch.", "")
            logits, targets = torch.empty(2, 50304, dtype=dtype), torch.empty(2, dtype=torch.int64)
            cross_entropy(logits, targets, 15.0, 50257, 1e-4, -1, gradient=True)
        cross_entropy(logits, targets, 15.0, 50257, 1e-4, -1, gradient=False)
    return caught


def one_by_one(X: Tensor) -> Scattered:
    """The matrices of X [B, m, n] as tensors of their own."""
    result = scattered([*X], X.device)
    assert result is not None
    return result


def as_launch(what: str, architecture: int, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """Triton's own reading of arguments: None and 1 are constants, multiples of 16 and tensors are aligned."""
    names = kernel.arg_names
    values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in options.items() if k in names}
    signature, constants, attributes = dict[str, str](), dict[tuple[int, ...], Any](), dict[tuple[int, ...], Any]()
    for i, name in enumerate(names):
        value = values[name]
        if name.isupper() or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype].removeprefix('*')}[{block}]>"
        else:
            signature[name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    variant = " ".join(f"{k}={v}".lower() for k, v in options.items() if k in names and k not in ("PRECISION",))
    meta = {k: v for k, v in options.items() if k not in names}
    transposed = " transposed" if values.get("stride_m", values.get("stride_xm")) == 1 else ""
    output = f" to {values['out'].dtype}".replace("torch.", "") if isinstance(values.get("out"), Tensor) else ""
    title = f"{kernel.__name__} {what}{output} {variant}{transposed}"
    return Launch(title, architecture, kernel.__module__, kernel.__name__, signature, constants, attributes, meta)


def compile_launch(launch: Launch) -> Resources:
    """Compile for the launch's architecture and read the registers, stack and shared memory off the cubin."""
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    source = ASTSource(kernel, launch.signature, constexprs=launch.constants, attrs=launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", launch.architecture, 32), options=launch.options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, check=True, encoding="utf-8").stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    shared = found["SHARED"] + compiled.metadata.shared
    loop, stores = read_code(code)
    spilled = found["STACK"] + found["LOCAL"]
    return Resources(launch, found["REG"], spilled, shared, loop, stores, code.count("FSETP"))


def read_code(code: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(instructions of the shortest loop with matrix products, those that write to global memory) of disassembled code.
    A loop lies between a label and a branch back to it."""
    labels, jumps, instructions = dict[str, int](), list[tuple[int, str]](), list[str]()
    for line in code.splitlines():
        if match := re.match(r"\s*(\.L_x_\w+):", line):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            if "BRA" in match[1] and (target := re.search(r"\.L_x_\w+", match[2])):
                jumps.append((len(instructions), target[0]))
            instructions.append(match[1])
    loops = [instructions[labels[name] : end + 1] for end, name in jumps if labels.get(name, end) < end]
    loops = [loop for loop in loops if any(re.match(r"[HQU]\w*MMA(?!2)", op) for op in loop)]
    shortest: list[str] = min(loops, key=len, default=[])
    return tuple(shortest), tuple(op for op in instructions if op.startswith("STG"))


def main(argv: list[str]) -> int:
    if argv not in ([], ["--usual"]):
        raise ValueError(f"the one argument is --usual, and not {' '.join(argv)}")
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set: Triton would interpret the kernels, not compile them; unset it")
    unique = {repr(launch): launch for architecture in ARCHITECTURES for launch in launches(architecture, bool(argv))}
    with Workers(os.cpu_count() or 1, start="fork") as pool:
        rows = list(pool.map(compile_launch, unique.values()))
    lines = [["registers", "spilled B", "shared KiB", "limit", "loop", "sm"]]
    lines += [[str(row.registers), str(row.spilled), f"{row.shared / 1024:.1f}",
               str(SHARED_LIMIT[row.launch.architecture] // 1024), str(len(row.loop) or "-"),
               str(row.launch.architecture)] for row in rows]  # fmt: skip
    titles = ["kernel", *(row.launch.what + "".join(f"   BAD: {fault}" for fault in row.faults) for row in rows)]
    print("\n".join(f"{line}   {title}" for line, title in zip(align(lines).splitlines(), titles, strict=True)))
    bad = sum(bool(row.faults) for row in rows)
    print(f"{len(rows)} kernels compiled; {bad} with a fault")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(console.run(lambda: main(sys.argv[1:]), "the same command starts again"))
