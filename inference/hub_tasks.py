"""Tasks from the Hugging Face Hub, by name: their rows as the lines that inference/tasks.py reads.

Repositories, splits and texts are those of lm_eval 0.4.11. Fetched files stay in the Hub's own cache.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from data.console import first_line
from data.tokenizer import reachable

Row = dict[str, Any]
HUB = "hub:"  # before a task's name


@dataclass(frozen=True)
class Source:
    repository: str
    subset: str | None
    split: str
    line_of: Callable[[Row], Row]


def _same(row: Row) -> Row:
    return row


def _piqa(row: Row) -> Row:
    return dict(query=f"Question: {row['goal']}\n", choices=[row["sol1"], row["sol2"]], gold=row["label"])


def _arc(row: Row) -> Row:
    choices = row["choices"]
    gold = choices["label"].index(row["answerKey"])
    return dict(query=f"Question: {row['question']}\n", choices=choices["text"], gold=gold)


def _copa(row: Row) -> Row:
    link = {"cause": "because", "effect": "therefore"}[row["question"]]
    # After two spaces in all, as lm_eval has it
    choices = [f" {choice[0].lower()}{choice[1:]}" for choice in (row["choice1"], row["choice2"])]
    return dict(query=f"{row['premise'].strip()[:-1]} {link}", choices=choices, gold=row["label"])


def _winogrande(row: Row) -> Row:
    before, _, after = row["sentence"].partition("_")
    contexts = [before + row["option1"], before + row["option2"]]
    return dict(context_options=contexts, continuation=after.strip(), gold=int(row["answer"]) - 1)


def _lambada(row: Row) -> Row:
    context, _, word = row["text"].rpartition(" ")
    return dict(context=context, continuation=word)


SOURCES = {
    "hellaswag": Source("Rowan/hellaswag", None, "validation", _same),
    "piqa": Source("baber/piqa", None, "validation", _piqa),
    "arc_easy": Source("allenai/ai2_arc", "ARC-Easy", "test", _arc),
    "arc_challenge": Source("allenai/ai2_arc", "ARC-Challenge", "test", _arc),
    "copa": Source("aps/super_glue", "copa", "validation", _copa),
    "winogrande": Source("allenai/winogrande", "winogrande_xl", "validation", _winogrande),
    "lambada_openai": Source("EleutherAI/lambada_openai", "default", "test", _lambada),
    "blimp": Source("nyu-mll/blimp", "", "train", _same),  # all of its subsets
}


def fetch(name: str) -> Iterator[tuple[str, list[Row]]]:
    """Names of tasks and their lines, of one task by its name here. Raises ValueError for another name, and where the
    Hub cannot be reached and its cache does not have it."""
    source = SOURCES.get(name)
    if source is None:
        raise ValueError(f"{HUB}{name} is not known; choose one of {', '.join(HUB + each for each in SOURCES)}")
    for task, rows in _rows_of(name, source):
        try:
            yield task, [source.line_of(row) for row in rows]
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{HUB}{name}: a row of {source.repository} is of another form ({error!r})") from None


def _rows_of(name: str, source: Source) -> Iterator[tuple[str, Iterable[Row]]]:
    try:
        import datasets
        from huggingface_hub import constants

        if not constants.HF_HUB_OFFLINE and not reachable(
            constants.ENDPOINT, timeout_s=10.0
        ):  # the client takes longer
            raise ConnectionError("no answer; with HF_HUB_OFFLINE=1 it is what was fetched before")
        subsets = [source.subset]
        if source.subset == "":
            subsets = sorted(datasets.get_dataset_config_names(source.repository))
        for subset in subsets:
            rows = datasets.load_dataset(source.repository, subset, split=source.split)
            yield name if len(subsets) == 1 else str(subset), rows
    except Exception as error:  # the clients' errors have no common class, and all mean the same here
        why = f"cannot be read from the Hub ({first_line(error)})"
        raise ValueError(f"{HUB}{name}: {source.repository} {why}; name a file") from None
