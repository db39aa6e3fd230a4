"""Write the README's generated tables from the committed results.

    python -m benchmarks.readme

A section stands between <!-- name --> and <!-- /name -->; a test fails when the README and the results differ.
"""

import json
import sys
from pathlib import Path

from benchmarks.bench import RESULTS
from data import console
from data.files import whole_file
from experiments import neuron_report, options
from experiments.grokking import findings as grokking
from experiments.row_norms import cells
from harness.neuron_stats import THRESHOLDS
from harness.tables import Row, markdown, with_section

README = Path(__file__).parent.parent / "README.md"
EXPERIMENTS = README.parent / "experiments/results"


def polar_section() -> str:
    """Milliseconds by matrices and variant, a table for each device; of ours as a CUDA graph where there is one."""
    parts = []
    for path in sorted(RESULTS.glob("polar_[!qrt]*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        settings = result["settings"]
        table: dict[str, Row] = {}
        for row in result["rows"]:
            line = table.setdefault(row["case"], dict(case=row["case"]))
            line[row["variant"]] = row.get("graph_ms") or row.get("ms", "")
            if row["variant"] == "auto":
                line["of_roofline"] = f"{row['of_roofline']:.0%}"
        variants = list(dict.fromkeys(row["variant"] for row in result["rows"]))
        headings = {name: name for name in variants} | {
            "torch.optim.Muon": "torch.optim.Muon (bfloat16)",
            "auto": "ours",
        }
        parts.append(
            f"{result['device']}, {settings['dtype']}, {settings['kernels']} kernels; milliseconds, medians of "
            f"{settings['passes']}. Large matrix products reach {settings['product_tflops']:.3g} TFLOP/s there, copies "
            f"{settings['copy_gbytes_per_s']:.3g} GB/s:\n\n"
            + markdown(list(table.values()), {"case": "matrices"} | headings | {"of_roofline": "ours of roofline"})
        )
    return "\n".join(parts)


def quality_section() -> str:
    """The float16 Gram form beside the dense form in bfloat16, for two of the shapes."""
    parts = []
    for path in sorted(RESULTS.glob("polar_quality_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        forms = {"bfloat16 dense direct": "dense, bfloat16", "float16 gram": "ours, float16 Gram", "unrounded": "exact"}
        table: dict[tuple[str, str], Row] = {}
        for row in result["rows"]:
            if row["form"] in forms and row["shape"] in ("768x768", "2048x768"):
                line = table.setdefault(
                    (row["shape"], row["spectrum"]), dict(shape=row["shape"], spectrum=row["spectrum"])
                )
                line[row["form"]] = f"{row['orthogonality']:.4f} / {row['direction']:.5f}"
        columns = dict(shape="matrix", spectrum="singular values") | forms
        parts.append(markdown(list(table.values()), columns) + f"\n({result['device']})\n")
    return "".join(parts)


def optimizer_step_section() -> str:
    """Milliseconds of a whole optimizer step by rule, a table for each device."""
    parts = []
    columns = {
        "rule": "rule", "matrices_ms": "matrices (ms)", "step_ms": "whole step (ms)",
        "matrices_over_muon": "matrices, of Muon's", "matrices_over_torch.optim.Muon": "of torch.optim.Muon's",
        "step_over_adamw": "step, of AdamW's", "share_%": "% of a training step",
    }  # fmt: skip
    for path in sorted(RESULTS.glob("optimizer_step_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        rounds = result["settings"]["rounds"]
        parts.append(f"{result['device']}, medians of {rounds}:\n\n" + markdown(result["rows"], columns))
    return "\n".join(parts)


def train_step_section() -> str:
    """Where a training step's time goes, by variant and matrix optimizer, a table for each device and label."""
    parts = []
    headings = {
        "variant": "variant", "matrix_optimizer": "matrix optimizer", "tokens_per_s": "tokens/s",
        "ratio": "of the first's", "MFU": "MFU", "peak_mib": "peak MiB", "loss_diff": "losses differ by",
    }  # fmt: skip
    for path in sorted(RESULTS.glob("train_step_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        rows, settings = result["rows"], result["settings"]
        said = {key for key in headings if any(row.get(key) not in (None, "", "unknown") for row in rows)}
        if {row.get("variant") for row in rows} <= {None, "plain"}:
            said -= {"variant", "loss_diff"}
        columns = {key: heading for key, heading in headings.items() if key in said}
        columns |= {key: f"{key.removesuffix('_%')} %" for key in rows[0] if key.endswith("_%")}
        given = [word for word in settings.get("set", ()) if "_files" not in word]
        given += [f'"{text}"' for text in settings.get("variants", ()) if ":" in text]
        where = "; ".join([f"{result['device']}, `{settings['recipe']}`", *(f"`{words}`" for words in given)])
        parts.append(f"{where}:\n\n" + markdown(rows, columns))
    return "\n".join(parts)


def cross_entropy_section() -> str:
    """Time and memory of head and loss, a table for each device."""
    parts = []
    columns = {
        "tokens": "tokens", "vocabulary": "vocabulary", "width": "width", "variant": "head and loss", "ms": "ms",
        "of_plain": "of plain's time", "peak_mib": "peak MiB", "peak_of_plain": "of plain's memory",
    }  # fmt: skip
    for path in sorted(RESULTS.glob("cross_entropy_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        passes = result["settings"]["passes"]
        parts.append(f"{result['device']}, medians of {passes}:\n\n" + markdown(result["rows"], columns))
    return "\n".join(parts)


def options_section() -> str:
    """Final losses of the model's options for equal training time."""
    rows = options.summary(json.loads((EXPERIMENTS / "options.json").read_text(encoding="utf-8")))
    return markdown(rows, {key: key for key in rows[-1]})


def row_norms_section() -> str:
    """Final losses and spreads of row norms, by cell."""
    runs = json.loads((EXPERIMENTS / "row_norms.json").read_text(encoding="utf-8"))
    header, *rows = cells(runs)
    return markdown([dict(zip(header, row, strict=True)) for row in rows], dict(zip(header, header, strict=True)))


def grokking_section(name: str) -> str:
    """Steps to generalisation of each setting and optimizer, in one of the committed results."""
    table = grokking.summary(json.loads((EXPERIMENTS / f"{name}.json").read_text(encoding="utf-8")))
    return markdown(table, {key: key for key in max(table, key=len)})


def neurons_section() -> str:
    """Dead neurons and losses, by expansion and arm."""
    rows = neuron_report.summary(json.loads((EXPERIMENTS / "neurons.json").read_text(encoding="utf-8")))
    dead = [f"dead % < {threshold:g}" for threshold in THRESHOLDS[:2]]
    shown = ["MLP", "arm", "rate", "final loss", *dead, f"by peak % < {THRESHOLDS[0]:g}", "ever dead %", "CV gate, up"]
    return markdown(rows, dict(zip(shown, shown, strict=True)))


SECTIONS = {
    "polar": polar_section,
    "polar_quality": quality_section,
    "train_step": train_step_section,
    "cross_entropy": cross_entropy_section,
    "options": options_section,
    "optimizer_step": optimizer_step_section,
    "row_norms": row_norms_section,
    "grokking": lambda: grokking_section("grokking"),
    "grokking_scale": lambda: grokking_section("grokking_scale"),
    "neurons": neurons_section,
}


def with_sections(document: str) -> str:
    """The README with all its generated sections as the results say."""
    for name, section in SECTIONS.items():
        document = with_section(document, name, section())
    return document


def main() -> None:
    document = with_sections(README.read_text(encoding="utf-8"))
    with whole_file(README) as file:
        file.write(document)


if __name__ == "__main__":
    sys.exit(console.run(main, "nothing was written; the same command starts again"))
