"""Run in an environment that has lm_eval and transformers: what lm_eval makes of an export on files of tasks.

python check_lm_eval.py FOLDER OUT.json TASK.jsonl [TASK.jsonl ...]

OUT.json: for each file, by its name, the accuracy of each item (acc, and acc_norm where lm_eval has it) and lm_eval's
results. Its tasks are described here as in its own collection, with a local file in place of the Hub's.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

ACC = dict(metric="acc", aggregation="mean", higher_is_better=True)
ACC_NORM = ACC | dict(metric="acc_norm")
PERPLEXITY = dict(metric="perplexity", aggregation="perplexity", higher_is_better=False)
CHOICES = dict(
    output_type="multiple_choice", doc_to_text="{{query.strip()}}\nAnswer:", doc_to_target="gold",
    doc_to_choice="{{choices}}", metric_list=[ACC, ACC_NORM],
)  # fmt: skip
HELLASWAG = CHOICES | dict(
    doc_to_text="{{query}}", doc_to_target="{{label}}", doc_to_choice="choices", process_docs="!function"
)  # fmt: skip
WORDS = dict(
    output_type="loglikelihood", doc_to_text="{{context}}", doc_to_target="{{' '+continuation}}", target_delimiter="",
    metric_list=[PERPLEXITY, ACC],
)  # fmt: skip
CONTEXTS = dict(
    output_type="multiple_choice", doc_to_text="gold", doc_to_target="continuation",
    doc_to_choice="{{context_options}}", metric_list=[ACC],
)  # fmt: skip
SENTENCES = dict(
    output_type="multiple_choice", doc_to_text="", doc_to_target=0, doc_to_choice="{{[sentence_good, sentence_bad]}}",
    metric_list=[ACC],
)  # fmt: skip


def described(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        row = json.loads(file.readline())
    if "endings" in row:
        kind = HELLASWAG
    elif "choices" in row:
        kind = CHOICES if row["query"].startswith("Question: ") else CHOICES | dict(doc_to_text="{{query}}")
    else:
        of_key = dict(context_options=CONTEXTS, sentence_good=SENTENCES, continuation=WORDS)
        kind = next(kind for key, kind in of_key.items() if key in row)
    files = dict(validation=str(path.resolve()))
    local = dict(dataset_path="json", dataset_kwargs=dict(data_files=files), validation_split="validation")
    return dict(task=f"local_{path.stem}", **local, **kind, metadata=dict(version=1.0))


def main(folder: str, out: str, *paths: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        shutil.copy(Path(lm_eval.__file__).parent / "tasks/hellaswag/utils.py", made)
        for path in map(Path, paths):
            text = yaml.safe_dump(described(path), allow_unicode=True)
            (Path(made) / f"{path.stem}.yaml").write_text(
                text.replace("process_docs: '!function'", "process_docs: !function utils.process_docs"),
                encoding="utf-8",
            )
        names = [f"local_{Path(path).stem}" for path in paths]
        model = HFLM(pretrained=folder, trust_remote_code=True, dtype="float32", device="cpu", batch_size=8)
        tasks = TaskManager(include_path=made, include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=model, tasks=names, task_manager=tasks, bootstrap_iters=0, log_samples=True
        )  # fmt: skip
    kept = {}
    for name in names:
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        of_items = {key: [sample[key] for sample in samples] for key in ("acc", "acc_norm") if key in samples[0]}
        numbers = {
            key.split(",")[0]: value for key, value in found["results"][name].items() if isinstance(value, float)
        }
        kept[name.removeprefix("local_")] = dict(items=of_items, results=numbers)
    Path(out).write_text(json.dumps(kept), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
