"""Write the generated tables of README.md and docs/*.md from the committed results and records.

    python -m docs.generate

A section stands between <!-- name --> and <!-- /name -->, in whichever document: it is found by its name. A test fails
when a document and the results differ. Those of the records are also written by `./run.sh leaderboard publish`, which
verifies the records first and draws their figures.
"""

import json
import re
import statistics
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from data import console
from data.files import whole_file
from experiments import claims, ladder, league, lengths, neuron_report, options, rules
from experiments.comparisons import against, paired
from experiments.grokking import findings as grokking
from harness.machine import ROOT
from harness.results import RESULTS
from harness.tables import Row, markdown, mean_and_sd, table, with_section
from leaderboard import rank
from leaderboard.records import find_records, load_record
from leaderboard.verify_duel import find_duels, load_duel

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def results(pattern: str) -> list[dict[str, Any]]:
    """The committed results of a benchmark, by name: one for each device."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(f"{pattern}.json"))]


def polar_section() -> str:
    """Milliseconds by matrices and variant, a table for each device; of ours as a CUDA graph where there is one."""
    parts = []
    for result in results("polar_[!mqrt]*"):
        settings, lines = result["settings"], dict[str, Row]()
        for row in result["rows"]:
            line = lines.setdefault(row["case"], dict(case=row["case"]))
            line[row["variant"]] = row.get("graph_ms") or row.get("ms", "")
            if row["variant"] == "auto":
                line["of_roofline"] = f"{row['of_roofline']:.0%}"
        columns = {"case": "matrices"} | {row["variant"]: row["variant"] for row in result["rows"]}
        columns |= {"torch.optim.Muon": "torch.optim.Muon (bfloat16)", "auto": "ours"}
        columns["of_roofline"] = "ours of roofline"
        parts.append(
            f"{result['device']}, {settings['dtype']}, {settings['kernels']} kernels; milliseconds, medians of "
            f"{settings['passes']}. Large matrix products reach {settings['product_tflops']:.3g} TFLOP/s there, copies "
            f"{settings['copy_gbytes_per_s']:.3g} GB/s:\n\n" + markdown(list(lines.values()), columns)
        )
    return "\n".join(parts)


def quality_section() -> str:
    """The float16 Gram form beside the dense form in bfloat16, for two of the shapes."""
    parts = []
    forms = {"bfloat16 dense direct": "dense, bfloat16", "float16 gram, unit rows": "ours in training"}
    forms |= {"unrounded": "exact"}
    columns = dict(shape="matrix", spectrum="singular values") | forms
    for result in results("polar_quality_*"):
        lines: dict[tuple[str, str], Row] = {}
        for row in result["rows"]:
            if row["form"] in forms and row["shape"] in ("768x768", "2048x768"):
                place = dict(shape=row["shape"], spectrum=row["spectrum"])
                line = lines.setdefault((row["shape"], row["spectrum"]), place)
                line[row["form"]] = f"{row['orthogonality']:.4f} / {row['direction']:.5f}"
        parts.append(markdown(list(lines.values()), columns) + f"\n({result['device']})\n")
    return "".join(parts)


def methods_section() -> str:
    """Cost and range of every polar method; then its errors, by arithmetic and spectrum."""
    parts = []
    for result in results("polar_methods_*"):
        rows = result["rows"]
        for row in rows:
            for name in ("", "weak_"):
                row[f"{name}range"] = f"{row[f'{name}low']:.3f} to {row[f'{name}high']:.3f}"
            row["slope"] = f"{row['slope']:,.0f}"
        parts.append(markdown(rows, METHODS))
        lines: dict[tuple[str, str], Row] = {}
        for row in result["settings"]["errors"]:
            place = {key: row[key] for key in ("method", "arithmetic")}
            line = lines.setdefault((row["method"], row["arithmetic"]), place)
            line[row["spectrum"]] = f"{row['orthogonality']:.4f} / {row['direction']:.5f}"
        said = f"Orthogonality / direction, the larger of {' and '.join(result['settings']['shapes'])}"
        columns = {key: key for key in max(lines.values(), key=len)}
        parts.append(f"{said} ({result['device']}):\n\n" + markdown(list(lines.values()), columns))
    return "\n".join(parts)


def train_step_section() -> str:
    """Where a training step's time goes, by variant and matrix optimizer, a table for each device and label."""
    parts = []
    headings = {
        "variant": "variant", "matrix_optimizer": "matrix optimizer", "tokens_per_s": "tokens/s",
        "ratio": "of the first's", "MFU": "MFU", "peak_mib": "peak MiB", "loss_diff": "losses differ by",
    }  # fmt: skip
    for result in results("train_step_*"):
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


def by_device(pattern: str, turns: str, columns: dict[str, str]) -> str:
    """All rows of a benchmark, a table for each device; setting `turns` says of how many they are medians."""
    return "\n".join(
        f"{result['device']}, medians of {result['settings'][turns]}:\n\n" + markdown(result["rows"], columns)
        for result in results(pattern)
    )


def compile_section() -> str:
    return "\n".join(
        f"{result['device']}, `{' '.join(result['settings']['set'])}`:\n\n" + markdown(result["rows"], COMPILE_TIME)
        for result in results("compile_time_*")
    )


METHODS = {
    "method": "method", "steps": "steps", "products": "products", "flops_768x768": "FLOPs, 768x768",
    "flops_2048x768": "2048x768", "range": "range from 0.01", "weak_range": "from 0.001", "slope": "slope at 0",
    "keeps_sign": "keeps the sign",
}  # fmt: skip
OPTIMIZER_STEP = {
    "rule": "rule", "matrices_ms": "matrices (ms)", "step_ms": "whole step (ms)",
    "matrices_over_muon": "matrices, of Muon's", "matrices_over_torch.optim.Muon": "of torch.optim.Muon's",
    "step_over_adamw": "step, of AdamW's", "share_%": "% of a training step",
}  # fmt: skip
COMPILE_TIME = {
    "compiled": "compiled", "graphs": "graphs", "first_s": "first pass (s)", "first_s_ratio": "of whole's",
    "cached_s": "from the cache (s)", "cached_s_ratio": "of whole's", "pass_ms": "later passes (ms)",
    "pass_ms_ratio": "of whole's", "loss_diff": "losses differ by",
}  # fmt: skip
STEP_BOUND = {
    "recipe": "recipe", "tokens": "tokens", "step_ms": "step (ms)", "gflop": "GFLOP of products",
    "bound_ms": "at a large product's rate (ms)", "of_bound": "share", "products_%": "products %",
    "lookups_%": "lookups %", "elementwise_%": "elementwise %",
}  # fmt: skip
STEP_PARTS = {"without": "without", "step_ms": "step (ms)", "saves_ms": "saves (ms)", "saves": "share"}
CROSS_ENTROPY = {
    "tokens": "tokens", "vocabulary": "vocabulary", "width": "width", "variant": "head and loss", "ms": "ms",
    "of_plain": "of plain's time", "peak_mib": "peak MiB", "peak_of_plain": "of plain's memory",
}  # fmt: skip


def kept(name: str) -> Any:
    """The committed result of an experiment."""
    return json.loads((ROOT / f"experiments/results/{name}.json").read_text(encoding="utf-8"))


def options_section() -> str:
    """Final losses of the model's options for equal training time."""
    rows = options.summary(kept("options"))
    return markdown(rows, {key: key for key in rows[0] if key != "pays"})


def row_norms(runs: Sequence[dict[str, Any]]) -> list[Row]:
    """A row for each cell: final loss, and spread, the standard deviation over the mean of updates' row norms (columns
    of a wide one), averaged over the matrices and the steps of a run. experiments/sweep.py measures and tables the same
    of runs with neuron_stats."""
    cells: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        cells[", ".join(f"{key}={value}" for key, value in run["cell"].items())].append(run)
    return [
        {"settings": name, "final loss": mean_and_sd([run["val_loss"] for run in of_cell], 4),
         "steps to target": mean_and_sd([run["steps_to_target"] for run in of_cell], 0)}
        | {f"spread, {kind}": mean_and_sd([statistics.fmean(run["spreads"][kind]) for run in of_cell], 3)
           for kind in ("tall", "wide")}
        for name, of_cell in cells.items()
    ]  # fmt: skip


def ideas_section() -> str:
    """What was tried on top of the current record, for equal training time."""
    result = kept("record_ideas")
    rows = options.summary(result)
    said = f"{result['device']}, seeds {', '.join(map(str, result['seeds']))}"
    return markdown(rows, {key: key.replace("option", "idea") for key in rows[0]}) + f"\n({said})\n"


def float8_section() -> str:
    """Final losses of a sweep with products in 8 bits, and how they differ from plain ones with the same seeds."""
    sweep, losses = kept("float8"), defaultdict[str, list[float]](list)
    runs = sorted(sweep["runs"], key=lambda run: (sweep["cells"].index(run["overrides"]), run["seed"]))
    for run in runs:
        settings = (f"`{key}={value.replace(':', ',')}`" for key, value in run["overrides"].items())
        losses[" ".join(settings)].append(run["summary"]["val_loss"])
    plain = next(name for name in losses if "float8" not in name)
    differences, adjusted = against(losses, plain)
    rows: list[Row] = []
    for name, of_cell in losses.items():
        row: Row = {"settings": name, "final loss": mean_and_sd(of_cell, 4)}
        if name in differences:
            row |= zip(("difference", "95% interval"), differences[name].told, strict=True)
            row["p (Holm)"] = f"{adjusted[name]:.2g}"
        rows.append(row)
    summary, seeds = runs[0]["summary"], ", ".join(map(str, sorted({run["seed"] for run in runs})))
    said = f"{summary['device']}; {summary['dtype'].removeprefix('torch.')}; {summary['steps']} steps, seeds {seeds}"
    return markdown(rows, {key: key for key in rows[-1]}) + f"\n({said})\n"


def grokking_section() -> str:
    """Steps to generalisation by task and optimizer, and Muon's as a share of AdamW's."""
    names = "grokking", "grokking_variants", "grokking_width_depth"
    rows = [row for name in names for row in grokking.rows(kept(name))]
    return markdown(rows, {key: key for key in rows[0]})


def second_draw_section() -> str:
    """The same of settings that were chosen from twice as many, by another seed."""
    rows = grokking.rows(kept("grokking_second_draw"))
    return markdown(rows, {key: key for key in rows[0]})


def later_section() -> str:
    """What became of runs that had generalised."""
    rows = grokking.later_rows(kept("grokking"))
    return markdown(rows, {key: key for key in rows[0]})


def neurons_section(rows_of: Callable[[dict[str, Any]], list[Row]], hidden: Collection[str] = ()) -> str:
    """A table of the experiment on neurons, by variant and arm, without some of its columns."""
    names = "neurons", "neurons_riemannian", "neurons_variants"
    rows = [row for name in names for row in rows_of(kept(name))]
    return markdown(rows, {key: key for key in rows[0] if key not in hidden})


def claims_section(part: str) -> str:
    """A part of the experiment on smaller claims."""
    found = kept("claims")["parts"][part]
    rows = claims.TABLES[part](found)
    said = f"{found['device']}; {found['steps']} steps, seeds {', '.join(map(str, found['seeds']))}"
    return markdown(rows, {key: key for key in rows[0]}) + f"\n({said})\n"


# Columns of the leverage of updates, which differs little from their row norms here, and of one threshold
HIDDEN = {f"update: {name}" for name in ("% < 0.05", "% < 0.1", "% < 0.25", "effective", "persistence")}
HIDDEN |= {"row norms: % < 0.1", "momentum: % < 0.1"}


def ladder_section() -> str:
    """A model's bits per byte beside those of xz and n-grams."""
    found = kept("ladder")
    rows = ladder.rows_of(found)
    measured = f"{found['num_bytes']:,} bytes of validation text after {found['train_bytes']:,} of training text"
    return markdown(rows, {key: key for key in rows[0]}) + f"\n({measured}; {found['device']})\n"


def pilots_section() -> str:
    """Byte and gpt2 tokens for a model of the sample."""
    rows = kept("sotu_model_pilots")
    columns = {"tokenizer": "tokens", "num_params": "parameters", "model_dim": "width", "seq_len": "row",
               "train_steps": "steps", "batch_tokens": "tokens per step", "val_loss": "nats per token",
               "bits_per_byte": "bits per byte", "train_time_s": "seconds"}  # fmt: skip
    return markdown(rows, columns) + f"\n({rows[0]['device']}; {rows[0]['dtype'].removeprefix('torch.')}; one seed)\n"


def rules_section(question: str) -> str:
    """An experiment of experiments/rules.py: final losses of its arms, and differences from the first one."""
    result = kept(f"rules_{question}")
    rows = rules.summary(result)
    return markdown(rows, {key: key for key in rows[0]}) + f"\n({result['device']}, {result['steps']} steps)\n"


def league_section() -> str:
    """The rules of the league, those that need the fewest steps first."""
    result = kept("league")
    rows, runs = league.summary(result), result["runs"].values()
    devices = ", ".join(sorted({run["device"] for run in runs if run["device"]}))
    said = f"{devices}; {result['steps']} steps, seeds {', '.join(map(str, result['seeds']))}; {len(runs)} runs in all"
    return markdown(rows, {key: key for key in rows[0]}) + f"\n({said}; {league.correlation(result)})\n"


def crossings_section() -> str:
    """Where the losses of some of the league's rules cross the target."""
    rows = league.crossings(kept("league"))
    return markdown(rows, {key: key for key in rows[0]})


def dtypes_section() -> str:
    """The league's runs that were made in bfloat16 as well: how their losses differ from those in float32."""
    result, runs = kept("league"), kept("league_bfloat16")["runs"]
    rows: list[Row] = []
    for entry in result["entries"]:
        cell = league.cell(entry["arm"], entry["rate"], entry["decay"])
        names = [league.run_name(cell, result["steps"], seed) for seed in result["seeds"]]
        if runs.keys() >= set(names):
            found = paired([runs[name]["val_loss"] for name in names], entry["val_loss"])
            difference, interval = found.told
            rows.append({"rule": entry["arm"], "bfloat16 less float32": difference, "95% interval": interval})
    return markdown(rows, {key: key for key in rows[0]})


def lengths_section() -> str:
    """What the lengths of the steps track's first entries come from."""
    result = kept("lengths")
    rows = lengths.summary(result)
    dtype = result["dtype"].removeprefix("torch.")
    said = f"{result['device']}, {dtype}, seeds {', '.join(map(str, result['seeds']))}"
    return markdown(rows, {key: key for key in rows[0]}) + f"\n({said})\n"


DEFINITIONS = {  # of the arms of the experiment: what their transcription follows, and its name in rule_accuracy
    "muon": ("Jordan et al. 2024", "muon"), "aurora": ("arXiv 2606.27715", "aurora release"),
    "riemannian_aurora": ("arXiv 2606.27715", "riemannian aurora"), "normuon": ("arXiv 2510.05491", "normuon"),
    "normuon long": ("track 3, result 10", "normuon long"), "unormuon": ("Tilde Research 2026", "unormuon"),
    "muon_squared": ("arXiv 2604.09967", "muon_squared"), "soap": ("arXiv 2409.11321", "soap"),
    "soap_muon": ("records of track 3", "soap_muon"), "muown": ("arXiv 2605.10797", "muown"),
    "adamh": ("arXiv 2606.16899", "adamh"), "muon_eq": ("arXiv 2603.28254", "muon_eq"),
    "muon_plus": ("arXiv 2602.21545", "muon_plus"), "adamuon": ("arXiv 2507.11005", "adamuon"),
    "polar_grad": ("arXiv 2505.21799", "polar_grad"), "adamw": ("torch's own", ""),
}  # fmt: skip


def family_section() -> str:
    """Every update rule: its cost, how far it is from its definition, and its losses after equal tuning."""
    result, accuracy = kept("rules_rules"), dict[str, str]()
    for row in (row for each in results("rule_accuracy_*") for row in each["rows"]):
        accuracy[row["rule"]] = max((row[kind] for kind in ("tall", "wide", "square")), key=float)
    rows = []
    for row in rules.summary(result):
        source, name = DEFINITIONS.get(str(row["rules"]), ("", ""))
        rows.append({"rule": row.pop("rules"), "definition": source, "differs by": accuracy.get(name, ""), **row})
    said = f"{result['device']}, {result['steps']} steps, seeds {', '.join(map(str, result['seeds']))}"
    return markdown(rows, {key: key for key in rows[0]}) + f"\n({said})\n"


def example_section(path: Path) -> str:
    """The optimizers' import and what stands between `# shown` and `# end` in an example."""
    source = path.read_text(encoding="utf-8")
    (imports,) = re.findall(r"^from nanogpt_aurora import .+$", source, re.MULTILINE)
    shown = re.findall(r"^ *# shown\n(.*?)^ *# end$", source, re.MULTILINE | re.DOTALL)
    code = "\n...\n".join(textwrap.dedent(part).strip() for part in shown)
    code = re.sub(r"\n\n(?=def )", "\n\n\n", f"{imports}\n\n{code}")  # what were methods; ruff formats it here, too
    return f"```python\n{code}\n```\n"


@cache
def ranked_records() -> list[Row]:
    records = [load_record(path) for path in find_records()]
    return rank.rows(records, [load_duel(path) for path in find_duels()])


def records_section(section: Callable[[Sequence[Row]], str]) -> str:
    return section(ranked_records())


SECTIONS: dict[str, Callable[[], str]] = {
    "polar": polar_section,
    "polar_quality": quality_section,
    "polar_methods": methods_section,
    "train_step": train_step_section,
    "compile_time": compile_section,
    "cross_entropy": lambda: by_device("cross_entropy_*", "passes", CROSS_ENTROPY),
    "step_bound": lambda: by_device("step_bound_*", "turns", STEP_BOUND),
    "step_parts": lambda: by_device("step_parts_*", "turns", STEP_PARTS),
    "options": options_section,
    "float8": float8_section,
    "record_ideas": ideas_section,
    "optimizer_step": lambda: by_device("optimizer_step_*", "rounds", OPTIMIZER_STEP),
    "rules": family_section,
    "league": league_section,
    "league_crossings": crossings_section,
    "league_dtypes": dtypes_section,
    "lengths": lengths_section,
    "polar_loss": lambda: rules_section("polar"),
    "sides": lambda: rules_section("sides"),
    "row_norms": lambda: table(row_norms(kept("row_norms")), as_markdown=True),
    "grokking": grokking_section,
    "grokking_second_draw": second_draw_section,
    "grokking_later": later_section,
    "neurons_losses": partial(neurons_section, neuron_report.losses, {"diverged"}),
    "neurons_rows": partial(neurons_section, neuron_report.leverages, HIDDEN),
    "neurons_function": partial(neurons_section, neuron_report.functions, {"pruned 20%", "pruned 40%"}),
    **{f"claims_{part}": partial(claims_section, part) for part in ("masked", "clipping", "epochs")},
    "ladder": ladder_section,
    "sotu_model_pilots": pilots_section,
    **{path.stem: partial(example_section, path) for path in EXAMPLES if path.stem != "toy"},
    **{name: partial(records_section, section) for name, (_, section) in rank.SECTIONS.items()},
}


def with_sections(document: str) -> str:
    """A document with those generated sections that it has as the results say."""
    for name, section in SECTIONS.items():
        if f"<!-- {name} -->" in document:
            document = with_section(document, name, section())
    return document


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"there are no arguments, and not {' '.join(argv)}")
    for path in DOCUMENTS:
        before = path.read_text(encoding="utf-8")
        after = with_sections(before)
        if after != before:
            with whole_file(path) as file:
                file.write(after)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(console.run(lambda: main(sys.argv[1:]), "some documents may be written; the same command starts again"))
