"""Parts of the GPU suite: each part's command, its time, and what is read from its results. No torch in here,
but in `print_facts`, which the suite calls in a process of its own."""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.files import whole_file
from data.shards import write_shard

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
NO_WAITING = "tests/test_options.py::test_steps_never_wait_for_the_gpu"
FUSED = "fused=norm,mlp,head"  # the setting of the trainer that "all" is
OPTIMIZERS = ("adamw", "muon", "aurora")
TINY_RECIPE = "data/tiny.toml"  # the toy model, for benchmarks that take settings from nowhere else
TARGET_BATCH = 524288  # tokens of a step for which the optimizers' shares are wanted
SHARES = {"muon": 1.5, "aurora": 2.0}  # % of such a step


@dataclass(frozen=True)
class Facts:
    """Facts of the machine and of this checkout."""

    device: str
    slug: str
    on_gpu: bool
    memory_gib: float
    peak_flops: float  # bfloat16; 0: unknown
    commit: str
    versions: dict[str, str]


NOWHERE = Facts("", "", False, 0.0, 0.0, "", {})


def print_facts() -> None:
    import torch

    from harness.machine import find_machine, git_commit, versions
    from harness.tables import slug

    machine = find_machine("auto", "auto")
    on_gpu = machine.device.type == "cuda"
    memory = torch.cuda.get_device_properties(machine.device).total_memory if on_gpu else 0
    print(json.dumps(vars(Facts(machine.name, slug(machine.name), on_gpu, memory / 2**30, machine.peak_flops or 0.0,
                                git_commit(), versions()))))  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A figure, and what it should be, if anything is asked of it."""

    name: str
    value: float | None  # None: not measured here
    wanted: str = ""
    verdict: str = ""


def target(name: str, value: float | None, wanted: float, at_least: bool = True) -> Target:
    """Met or not, and by how far."""
    margin = ((value or 0.0) - wanted) * (1 if at_least else -1)
    verdict = f"{'met' if margin >= 0 else 'NOT MET'} by {abs(margin):.2f}" if value is not None else "not measured"
    return Target(name, value, f"{'>=' if at_least else '<='} {wanted:g}", verdict)


@dataclass(frozen=True)
class Found:
    figures: dict[str, Any]
    targets: list[Target] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    name: str
    what: str
    command: tuple[str, ...]  # of Python; {seconds} stands for what it may take, less a margin to end in
    limit_s: float
    find: Callable[[list[str], Row], Found]  # in the lines it printed and the JSON it wrote
    least_s: float = 20.0  # not begun with less
    files: str = "none"  # pattern of the results it writes
    skip: str = ""  # why it cannot run here

    def command_within(self, limit_s: float) -> list[str]:
        seconds = f"{limit_s - min(25, 0.2 * limit_s):.0f}"  # imports come before it, and the result after
        return [word.replace("{seconds}", seconds) for word in self.command]


def find_tests(lines: list[str], _: Row) -> Found:
    summary = next(line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error|skipped)", line))
    return Found({outcome: int(count) for count, outcome in re.findall(r"(\d+) ([a-z]+)(?=[, ])", summary)})


def find_train_step(content: Row, with_targets: bool) -> Found:
    """Tokens a second; then, by optimizer, MFU with all on, all over plain, the optimizer's share of a large step, and
    how far the losses of all and plain are apart."""
    rows = {(row["variant"], row["matrix_optimizer"]): row for row in content["rows"]}
    batch = content["settings"]["batch_tokens"]
    rates: dict[str, dict[str, float]] = {}  # tokens/s, by optimizer and variant
    targets: list[Target] = []
    for rule in dict.fromkeys(rule for _, rule in rows):
        plain, best = rows["plain", rule], rows["all", rule]
        rates[rule] = {"plain": plain["tokens_per_s"], "all": best["tokens_per_s"]}
        share = best["optimizer_%"]
        share = 100 * share / (share + (100 - share) * TARGET_BATCH / batch)  # the rest of a step grows with the batch
        mfu = 100 * best["MFU"] if best["MFU"] != "unknown" else None
        ratio = best["tokens_per_s"] / plain["tokens_per_s"]
        of_step = f"{rule}: optimizer's share at {TARGET_BATCH} tokens per step (%)"
        targets += [
            *(Target(f"{rule}: tokens/s, {variant}", rate) for variant, rate in rates[rule].items()),
            target(f"{rule}: MFU, all on (%)", mfu, 50),
            target(f"{rule}: tokens/s, all on over plain", ratio, 1.3),
            target(of_step, share, SHARES[rule], False) if rule in SHARES else Target(of_step, share),
            Target(f"{rule}: losses of all on and plain differ by at most (nats)", best["loss_diff"]),
            *(Target(f"{rule}: peak memory, {row['variant']} (GiB)", row["peak_mib"] / 1024)
              for row in (plain, best) if row["peak_mib"]),
        ]  # fmt: skip
    figures = {"batch_tokens": batch, "rounds": content["settings"]["rounds_done"], "rates": rates}
    return Found(figures, targets if with_targets else [Target(each.name, each.value) for each in targets])


def find_race(_: list[str], content: Row) -> Found:
    figures: dict[str, Any] = {"target loss": content["settings"]["target_loss"]}
    for row in content["rows"]:
        name = row["run"]
        figures |= {f"{name} loss": f"{row['val_loss']:.4f}", f"{name} s to target": row["time_to_target_s"] or "never"}
    return Found(figures | {"s of training each": content["rows"][0]["train_time_s"]})


def find_polar(_: list[str], content: Row) -> Found:
    rows = [row for row in content["rows"] if row["check"] == "right"]
    case = rows[0]["case"]
    ours = next(row for row in rows if row["case"] == case and row["variant"] == "auto")
    best_ms = ours.get("graph_ms") or ours["ms"]
    return Found({f"{case} ms": best_ms, "of eager": ours["of_eager"], "of roofline": ours["of_roofline"]})


def find_tiles(_: list[str], content: Row) -> Found:
    rows = reversed(content["rows"])  # the fastest of a kernel and shape comes first, and stays
    return Found({f"{row['kernel']} {row['shape']}": row["tile"] for row in rows})


def find_quality(_: list[str], content: Row) -> Found:
    rows = content["rows"]
    return Found({"worse than dense": sum(row["no_worse"] == "NO" for row in rows), "of": len(rows)})


def find_cross_entropy(_: list[str], content: Row) -> Found:
    rows = {row["variant"]: row for row in content["rows"]}
    found: Row = {"fused ms": rows["fused"]["ms"], "of plain's time": rows["fused"]["of_plain"]}
    found["of plain's memory"] = rows["fused"]["peak_of_plain"]
    return Found(found | ({"float8 ms": rows["float8"]["ms"]} if "float8" in rows else {}))


def short(path: Path) -> Path:
    """The path as seen from the repository, where parts run: results name no machine's folders."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


TINY = [
    "num_layers=1", "num_heads=1", "head_dim=16", "model_dim=32", "seq_len=32", "vocab_size=48", "tokenizer=none",
    "val_tokens=1024", "batch_tokens=256", "micro_batch_tokens=128", "device=cpu", "dtype=float32", "embed_lr=0.1",
]  # fmt: skip


def train_step_part(label: str, recipe: str, facts: Facts, folder: Path, settings: list[str], tiny: bool) -> Part:
    data = short(folder / "data")
    files = [f"train_files={data}/synthetic_train_*.bin", f"val_files={data}/synthetic_val_*.bin"]
    # One rate for all optimizers, small enough for AdamW: what is compared is two ways to compute the same losses.
    common = ["matrix_lr=0.003", "warmup_steps=0", "momentum_warmup_steps=0"]
    optimizers = OPTIMIZERS if tiny or facts.memory_gib >= (70 if label == "355m" else 30) else ("muon",)
    command = [
        "-m", "benchmarks.train_step", recipe, "--label", label, "--matrix_optimizers", *optimizers,
        "--variants", "plain: compile=true fused=none", f"all: compile=true {FUSED}",
        "--rounds", "1" if tiny else "4", "--steps", "2", "--max_seconds", "{seconds}",
        "--set", *common, *files, *(TINY if tiny else ["tokenizer=none", "val_tokens=8192", *settings]),
    ]  # fmt: skip
    what = f"training steps of the {label} model, compiled, plain and with {FUSED}"
    is_124m = label == "124m"
    return Part(
        f"train_step_{label}", what, tuple(command), 150 if is_124m else 170,  # 12 and 24 layers to compile, twice
        lambda _, content: find_train_step(content, is_124m and not tiny), 60, f"train_step_{label}_*.json",
    )  # fmt: skip


def race_part(facts: Facts, folder: Path, data: Path, micro_batch: int, tiny: bool) -> Part:
    wanted = ("*_train_*.bin", "*_val_*.bin")
    there = tiny or all(any(data.glob(pattern)) or any(data.glob(f"{pattern}.xz")) for pattern in wanted)
    skip = "" if there else (
        f"no shards in {short(data)}: put classics_train_000001.bin and classics_val_000000.bin there (or .bin.xz), or "
        "name their folder with --data"
    )  # fmt: skip
    settings = [*TINY, "compile=false"] if tiny else [f"micro_batch_tokens={min(micro_batch, 32768)}"]
    command = [
        "-m", "experiments.race", *(f"configs/classics_124m_{name}.toml" for name in OPTIMIZERS),
        "--seconds", "14" if tiny else "{seconds}", "--data", str(short(data)), "--folder", str(short(folder / "race")),
        "--set", FUSED, *settings,
    ]  # fmt: skip
    what = f"{', '.join(OPTIMIZERS)} on the classics shards for equal training time"
    return Part("classics", what, tuple(command), 420, find_race, 90, "race_*", skip)


def make_parts(facts: Facts, folder: Path, data: Path, tiny: bool) -> list[Part]:
    """The parts in order of worth. `folder` is the suite's own, `data` has the classics shards."""
    has = {name: importlib.util.find_spec(name) is not None for name in ("pytest", "xdist")}
    tests = ["tests/kernels"]
    workers = ["-n", "8"] if has["xdist"] else []  # 4 minutes are too short for fewer
    tests += ["-k", "refusals or empty_batch"] if tiny else [NO_WAITING, "-k", "not every_architecture", *workers]
    micro = next(size for size, gib in ((32768, 70), (16384, 38), (8192, 20), (4096, 0)) if facts.memory_gib >= gib)
    batch = TARGET_BATCH if facts.peak_flops >= 600e12 else TARGET_BATCH // 8
    steps = [
        ("124m", "configs/classics_124m_muon.toml", [f"batch_tokens={batch}", f"micro_batch_tokens={micro}"]),
        ("355m", "configs/fineweb_355m_aurora.toml",
         [f"batch_tokens={min(batch, 2**17)}", f"micro_batch_tokens={micro // 4}"]),
    ]  # fmt: skip

    def benchmark(name: str, what: str, find: Callable[[list[str], Row], Found], limit_s: float = 120,
                  files: str = "", skip: str = "", arguments: tuple[str, ...] = ()) -> Part:  # fmt: skip
        command = ("-m", f"benchmarks.{name}", *(arguments if tiny else ()))
        return Part(name, what, command, limit_s, find, files=files or f"{name}_*.json", skip=skip)

    parts = [
        Part("kernel_tests", "tests of the kernels", ("-m", "pytest", "-p", "no:cacheprovider", *tests), 240,
             find_tests, skip="" if has["pytest"] else "pytest is not installed"),
        *(train_step_part(label, recipe, facts, folder, settings, tiny) for label, recipe, settings in steps),
        race_part(facts, folder, folder / "data" if tiny else data, micro, tiny),
        benchmark("loss_head", "loss of the head", find_cross_entropy, files="cross_entropy_*.json",
                  skip="" if facts.on_gpu else "needs a GPU"),
        benchmark("optimizer_step", "steps of every rule",
                  lambda _, content: Found({f"{row['rule']} ms": row["step_ms"] for row in content["rows"]}),
                  arguments=(str(folder / TINY_RECIPE), "--tokens", "64", "--rounds", "2")),
        Part("optimizer_graphs", "steps as CUDA graphs",
             ("-m", "benchmarks.optimizer_step", "--graphs", "true", "--rules", "muon", "aurora release"), 120,
             lambda _, content: Found({f"{row['rule']} ms": row["graph_ms"] for row in content["rows"]}),
             files="optimizer_graphs_*.json", skip="" if facts.on_gpu else "needs a GPU"),
        benchmark("polar_speed", "polar factors", find_polar, limit_s=240, files="polar_[!qrt]*.json",
                  arguments=("--cases", "512", "--passes", "1")),
        benchmark("polar_tiles", "tile sizes", find_tiles, skip="" if facts.on_gpu else "needs a GPU"),
        benchmark("pass_tiles", "passes by tile", find_tiles, skip="" if facts.on_gpu else "needs a GPU"),
        benchmark("polar_quality", "accuracy of the polar factors", find_quality, arguments=("--shapes", "257x101")),
    ]  # fmt: skip
    return [dataclasses.replace(part, limit_s=120, least_s=10) for part in parts] if tiny else parts


def make_inputs(folder: Path, tiny: bool) -> None:
    """Synthetic shards: a walk around the vocabulary in steps of 1, 2 or 5, which a model can learn. And the recipe."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    vocabulary, tokens = (48, 20_000) if tiny else (50257, 8 * TARGET_BATCH)
    walk = np.cumsum(np.random.default_rng(0).choice([1, 2, 5], size=tokens, p=[0.7, 0.2, 0.1])) % vocabulary
    for name in ("synthetic_train_000001.bin", "synthetic_val_000000.bin"):
        if not (data / name).exists():
            write_shard(data / name, walk[: tokens if "train" in name else tokens // 4])
    if tiny:
        pairs = [word.split("=") for word in TINY]
        with whole_file(folder / TINY_RECIPE) as file:
            file.writelines(f"{key} = {value if value[0].isdigit() else repr(value)}\n" for key, value in pairs)
