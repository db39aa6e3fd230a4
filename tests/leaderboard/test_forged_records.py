"""Forged records: each is caught, with its reason. Forgers bring summaries in line with the runs they changed."""

import dataclasses
import gzip
import io
import json
import lzma
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import leaderboard.__main__ as cli
from harness.tables import with_section
from leaderboard import rank, tracks
from leaderboard.page import render
from leaderboard.records import load_record
from leaderboard.runs import parse_log
from leaderboard.verify import _of_declaration, reasons, verify_all
from tests.record_fixtures import ALL, SEEDS, Rows, Texts, edit_summary, read_texts, set_facts, set_rows, write_texts

# What is changed, and the reason that has to be among those found
FORGERIES: dict[str, tuple[Callable[[Texts], Any], str]] = {}


def forgery(reason: str) -> Callable[[Callable[[Texts], Any]], Callable[[Texts], Any]]:
    def keep(change: Callable[[Texts], Any]) -> Callable[[Texts], Any]:
        FORGERIES[change.__name__] = change, reason
        return change

    return keep


def replace(texts: Texts, name: str, old: str, new: str, *folders: str, count: int = 1) -> None:
    for folder in folders or ALL[:1]:
        assert old in texts[folder][name], (folder, old)
        texts[folder][name] = texts[folder][name].replace(old, new, count)


def line_of(texts: Texts, beginning: str, folder: str = "seed_0") -> str:
    return next(line for line in texts[folder]["log.txt"].splitlines() if line.startswith(beginning))


@forgery(r"seed 0: log.txt has 'step:40/40 val_loss:[\d.]+ train_time:0.500s .*' where metrics.jsonl has 'step:40/40")
def time_edited_in_the_log(texts: Texts) -> None:
    line = line_of(texts, "step:40/40 val_loss")
    before, _, after = line.partition("train_time:")
    replace(texts, "log.txt", line, f"{before}train_time:0.500s {after.split(' ')[1]}")


@forgery(r"seed 0: summary.json says train_time_s = 0.5, the metrics")
def time_edited_in_a_run_summary(texts: Texts) -> None:
    summary = json.loads(texts["seed_0"]["summary.json"]) | dict(train_time_s=0.5)
    texts["seed_0"]["summary.json"] = json.dumps(summary)


@forgery(r"seed 1: log.txt has 'step:40/40 val_loss:.*' where metrics.jsonl has")
def time_edited_everywhere_but_in_the_average(texts: Texts) -> None:
    average = line_of(texts, "step:40/40 val_loss", "seed_1").partition("step_avg:")[2]

    def faster(rows: Rows) -> Rows:
        return [row | dict(train_time_s=row["train_time_s"] * 0.7) for row in rows]

    set_rows(texts["seed_1"], faster)
    line = line_of(texts, "step:40/40 val_loss", "seed_1")
    replace(texts, "log.txt", line, line.partition("step_avg:")[0] + "step_avg:" + average, "seed_1")


@forgery(r"seed 1: steps 20 to 25 took .* ms each, a tenth or less of the run's usual")
def time_cut_out_in_all_files(texts: Texts) -> None:
    def cut(rows: Rows) -> Rows:
        times = {(row["step"], "val_loss" in row): row["train_time_s"] for row in rows}
        gap = 0.99 * (times[25, False] - times[20, True])
        return [row | dict(train_time_s=row["train_time_s"] - gap * (row["step"] > 20)) for row in rows]

    set_rows(texts["seed_1"], cut)


@forgery(r"seed 2: the clock goes backwards")
def clock_set_back(texts: Texts) -> None:
    def back(rows: Rows) -> Rows:
        return [row | dict(train_time_s=row["train_time_s"] * (0.5 if row["step"] > 30 else 1)) for row in rows]

    set_rows(texts["seed_2"], back)


@forgery(r"the seeds are \[0, 1, 3\]")
def seed_dropped(texts: Texts) -> None:
    del texts["seed_2"]


@forgery(r"seed 0 declares num_seeds = 4, and there are 3 runs: a record is of as many as each run has declared")
def last_seed_dropped(texts: Texts) -> None:
    del texts["seed_3"]


@forgery(r"seed 3 declares num_seeds = 0, and there are 4 runs")
def number_of_seeds_undeclared(texts: Texts) -> None:
    for folder in ALL:
        set_facts(texts[folder], lambda facts: facts["config"].pop("num_seeds") and None)


@forgery(r"seed 2 has data_start = 'first', the track's is 'seed'")
def data_as_for_all_seeds(texts: Texts) -> None:
    for folder in ALL:
        set_facts(texts[folder], lambda facts: facts["config"].update(data_start="first"))


@forgery(r"the seeds are \[0, 1, 2, 6\]; 4 runs have 0 to 3, each once")
def another_seed_than_declared(texts: Texts) -> None:
    texts["seed_6"] = texts.pop("seed_3")
    set_facts(texts["seed_6"], lambda facts: facts["config"].update(seed=6))


@forgery(r"seed 3 and seed 4 have the same losses to the last digit: one run twice")
def seed_doubled_under_a_new_number(texts: Texts) -> None:
    texts["seed_4"] = dict(texts["seed_3"])
    set_facts(texts["seed_4"], lambda facts: facts["config"].update(seed=4))


@forgery(r"seed 3 is a run of seed 0")
def seed_renamed(texts: Texts) -> None:
    texts["seed_3"] = dict(texts["seed_0"])


@forgery(r"the validation data is not the track's: fingerprint 0123456789abcdef")
def validation_shard_swapped(texts: Texts) -> None:
    for folder in ALL:
        set_facts(texts[folder], lambda facts: facts.update(val_fingerprint="0123456789abcdef"))


@forgery(r"the training data is not the track's")
def training_shards_swapped(texts: Texts) -> None:
    for folder in ALL:
        set_facts(texts[folder], lambda facts: facts.update(train_fingerprint="0123456789abcdef"))


@forgery(r"val_tokens = 960, the track's is 3840")
def fewer_validation_tokens(texts: Texts) -> None:
    for folder in ALL:
        set_facts(texts[folder], lambda facts: facts["config"].update(val_tokens=960))


@forgery(r"target_loss = 3.3, the track's is 3.2")
def easier_target(texts: Texts) -> None:
    for folder in ALL:
        set_facts(texts[folder], lambda facts: facts["config"].update(target_loss=3.3))


@forgery(r"track = 'sotu-byte' is not 'tiny', in whose folder the record is")
def of_another_track(texts: Texts) -> None:
    for folder in ALL:
        set_facts(
            texts[folder], lambda facts: (facts.update(track="sotu-byte"), facts["config"].update(track="sotu-byte"))
        )


@forgery(r"the data stream may be modified: data/loader.py is no version that tracks.toml knows")
def loader_changed(texts: Texts) -> None:
    replace(texts, "log.txt", "# file: data/loader.py\n", "# file: data/loader.py\n# easy documents first\n", *ALL)


@forgery(r"the data stream may be modified: the log has no source of data/loader.py")
def loader_left_out(texts: Texts) -> None:
    replace(texts, "log.txt", "# file: data/loader.py\n", "# data/loader.py\n", *ALL)


@forgery(r"seed 2 ran another source than seed 0: model.py differ")
def source_changed_in_one_seed(texts: Texts) -> None:
    replace(texts, "log.txt", "# file: model.py\n", "# file: model.py\n# and a trick\n", "seed_2")


@forgery(r"settings differ: matrix_lr = 0.03 in seed 1, 0.02 in seed 0")
def settings_changed_in_one_seed(texts: Texts) -> None:
    set_facts(texts["seed_1"], lambda facts: facts["config"].update(matrix_lr=0.03))


@forgery(r"hardware differs: 'A faster CPU, 64 threads' in seed 3")
def other_hardware_in_one_seed(texts: Texts) -> None:
    set_facts(texts["seed_3"], lambda facts: facts.update(device="A faster CPU, 64 threads"))


@forgery(r"seed 0: log.txt is cut off: the block after --- is missing")
def log_truncated(texts: Texts) -> None:
    texts["seed_0"]["log.txt"] = texts["seed_0"]["log.txt"].partition("\n---\n")[0]


@forgery(r"seed 0: log.txt has no train line of step 35")
def log_line_missing(texts: Texts) -> None:
    replace(texts, "log.txt", line_of(texts, "step:35/40 train_loss") + "\n", "")


@forgery(r"seed 0: metrics.jsonl has no val line of step 30")
def bad_validation_left_out_everywhere(texts: Texts) -> None:
    set_rows(texts["seed_0"], lambda rows: [row for row in rows if not (row["step"] == 30 and "val_loss" in row)])


@forgery(r"seed 0: log.txt is out of order: step 15 comes after step 20")
def lines_reordered(texts: Texts) -> None:
    one, other = line_of(texts, "step:15/40 train_loss"), line_of(texts, "step:20/40 train_loss")
    head, _, rest = texts["seed_0"]["log.txt"].partition(one)
    texts["seed_0"]["log.txt"] = head + other + rest.replace(other, one)


@forgery(r"seed 0: log.txt has the validation line of step 40 more than once")
def validation_repeated(texts: Texts) -> None:
    line = line_of(texts, "step:40/40 val_loss")
    replace(texts, "log.txt", line, f"{line}\n{line}")


@forgery(r"seed 3: summary.json says status = .finished., the metrics not one that ends at step 30")
def one_seed_stopped_where_it_looked_good(texts: Texts) -> None:
    set_rows(texts["seed_3"], lambda rows: [row for row in rows if row["step"] <= 30])


@forgery(r"the seeds stop at different steps, \[40, 40, 40, 30\]")
def one_seed_stopped_at_its_target(texts: Texts) -> None:
    def stop(rows: Rows) -> Rows:
        kept = [row for row in rows if row["step"] <= 30]
        return [row | (dict(val_loss=3.05) if row["step"] == 30 and "val_loss" in row else {}) for row in kept]

    for folder in ALL:
        set_facts(texts[folder], lambda facts: facts["config"].update(stop_at_target=True))
    set_rows(texts["seed_3"], stop)


@forgery(r"seed 1: the val loss of step 20 is nan")
def loss_nan(texts: Texts) -> None:
    def spoil(rows: Rows) -> Rows:
        return [row | (dict(val_loss=float("nan")) if row["step"] == 20 and "val_loss" in row else {}) for row in rows]

    set_rows(texts["seed_1"], spoil)


@forgery(r"seed 0: log.txt has 'step:40/40 val_loss:3.* where metrics.jsonl has 'step:40/40 val_loss:2.70000")
def loss_edited_in_the_metrics(texts: Texts) -> None:
    rows = [json.loads(line) for line in texts["seed_0"]["metrics.jsonl"].splitlines()]
    rows[-1]["val_loss"] = 2.7
    texts["seed_0"]["metrics.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)


@forgery(r"val step 10: metrics.jsonl has 1920 tokens, the settings 960")
def fewer_tokens_a_step_claimed(texts: Texts) -> None:
    for folder in ALL:
        set_facts(texts[folder], lambda facts: facts["config"].update(batch_tokens=96))


@forgery(r"the settings have no schedule: small_batch_steps = -40 must be >= 0")
def more_tokens_by_small_batches_below_none(texts: Texts) -> None:
    for folder in ALL:
        set_facts(texts[folder], lambda facts: facts["config"].update(small_batch_steps=-40))


@forgery(r"the settings: small_batch_steps is 'all', not int")
def small_batch_steps_in_words(texts: Texts) -> None:
    for folder in ALL:
        set_facts(texts[folder], lambda facts: facts["config"].update(small_batch_steps="all"))


@forgery(r"do not show that it is below 3.2: one-sided p = ")
def too_few_seeds(texts: Texts) -> None:
    for folder in ALL[1:]:
        del texts[folder]


@forgery(r"seeds with mean loss [\d.]+ do not show that it is below 3.2")
def loss_just_below_the_target(texts: Texts) -> None:
    for folder, loss in zip(ALL, (3.10, 3.25, 3.15, 3.29), strict=True):
        set_rows(texts[folder], lambda rows, loss=loss: [*rows[:-1], rows[-1] | dict(val_loss=loss)])


@forgery(r"the record is from the future: 2099")
def from_the_future(texts: Texts) -> None:
    set_facts(texts["seed_3"], lambda facts: facts.update(start_utc="2099-01-01T00:00:00Z"))


@forgery(r"seed 2: the run was resumed")
def resumed(texts: Texts) -> None:
    line = line_of(texts, "step:0/40", "seed_2")
    replace(
        texts, "log.txt", line, f"resumed from runs/x/checkpoint_000020.pt at step 20; in log.txt ...\n{line}", "seed_2"
    )


@forgery(r"seed 2: log.txt ends with run = .interrupted., and .finished. is meant")
def interrupted(texts: Texts) -> None:
    replace(texts, "log.txt", "run          finished", "run          interrupted", "seed_2")
    replace(texts, "summary.json", '"status": "finished"', '"status": "interrupted"', "seed_2")


@forgery(r"seed 2: summary.json says device = 'Another', log.txt")
def another_device_in_a_summary(texts: Texts) -> None:
    summary = json.loads(texts["seed_2"]["summary.json"]) | dict(device="Another")
    texts["seed_2"]["summary.json"] = json.dumps(summary)


@forgery(r"seed 1: metrics.jsonl is missing")
def metrics_left_out(texts: Texts) -> None:
    del texts["seed_1"]["metrics.jsonl"]


@forgery(r"seed 0: log.txt ends with target = '3.2 nats reached after 0.1 s .*, and '3.2 nats reached after")
def time_edited_in_the_last_block(texts: Texts) -> None:
    line = line_of(texts, "target ")
    replace(texts, "log.txt", line, "target       3.2 nats reached after 0.1 s of training, 40 steps, 7,680 tokens")


@forgery(r"seed 0: log.txt ends with seconds = ")
def seconds_not_a_number(texts: Texts) -> None:
    line = line_of(texts, "seconds ")
    replace(texts, "log.txt", line, "seconds      setup 0.1, train nan, validation 0.1")


@forgery(r"seed 0: what log.txt says of python, git and hardware before its facts are other ones")
def hardware_edited_before_the_facts(texts: Texts) -> None:
    line = line_of(texts, "1 x ")
    replace(texts, "log.txt", f"\n{line}\n", "\n8 x NVIDIA H100\n")


@forgery(r"seed 0: log.txt ends with directory = .*, and '-20200101T000000Z-' is meant")
def start_moved(texts: Texts) -> None:
    set_facts(texts["seed_0"], lambda facts: facts.update(start_utc="2020-01-01T00:00:00Z"))


@forgery(r"seed 0: the run was resumed")
def resumed_without_a_word_in_the_log(texts: Texts) -> None:
    summary = json.loads(texts["seed_0"]["summary.json"])
    texts["seed_0"]["summary.json"] = json.dumps(summary | dict(lineage=["first", "second"]))


@forgery(r"seed 0: summary.json says phase_s = None")
def phases_left_out(texts: Texts) -> None:
    summary = json.loads(texts["seed_0"]["summary.json"])
    del summary["phase_s"]
    texts["seed_0"]["summary.json"] = json.dumps(summary)


@forgery(r"seed 0: log.txt has 3 rulers of 100 =, and two are meant")
def a_second_body_before_the_real_one(texts: Texts) -> None:
    head, ruler, rest = texts["seed_0"]["log.txt"].rpartition("=" * 100 + "\n")
    texts["seed_0"]["log.txt"] = head + ruler + "step:40/40 val_loss:9.00000 train_time:9.000s\n" + ruler + rest


@forgery(r"seed 0: log.txt has a step line after ---")
def a_step_line_at_the_end(texts: Texts) -> None:
    texts["seed_0"]["log.txt"] += "step:40/40 val_loss:9.00000 train_time:9.000s step_avg:225.00ms\n"


@forgery(r"seed 0: log.txt has the source of data/loader.py twice")
def an_unchanged_loader_behind_a_changed_one(texts: Texts) -> None:
    for folder in ALL:
        source = parse_log(texts[folder]["log.txt"]).sources["data/loader.py"]
        replace(texts, "log.txt", "# file: data/loader.py\n", "# file: data/loader.py\n# mine\n", folder)
        replace(
            texts, "log.txt", "\n# file: model.py\n", f"\n# file: data/loader.py\n{source}\n# file: model.py\n", folder
        )


@forgery(r"seed 0: summary.json says status = .finished., the metrics not one that ends at step 40")
def went_on_after_its_target(texts: Texts) -> None:
    """Settings say to stop at the target; the loss dips below it at step 30 already."""
    set_facts(texts["seed_0"], lambda facts: facts["config"].update(stop_at_target=True))


@forgery(r"seed 0: the train loss of step 5 is -5.5")
def a_loss_below_zero(texts: Texts) -> None:
    set_rows(texts["seed_0"], lambda rows: [
        row | (dict(train_loss=-5.5) if row["step"] == 5 else {}) for row in rows
    ])  # fmt: skip


@forgery(r"seed 0: the model was not a new one at step 0: loss 3.000")
def a_model_trained_before(texts: Texts) -> None:
    set_rows(texts["seed_0"], lambda rows: [row | (dict(val_loss=3.0) if row["step"] == 0 else {}) for row in rows])


@forgery(r"seed 0: metrics.jsonl line 1 has \['real_val_loss'\], which no trainer here writes")
def another_key_in_the_metrics(texts: Texts) -> None:
    replace(texts, "metrics.jsonl", '{"step": 0', '{"real_val_loss": 9.0, "step": 0')


@forgery(r"seed 0: val step 0: metrics.jsonl has 1.5 bits per byte, its loss is None")
def bits_per_byte_of_what_is_no_text(texts: Texts) -> None:
    replace(texts, "metrics.jsonl", '{"step": 0', '{"bits_per_byte": 1.5, "step": 0')


@forgery(r"seed 0: metrics.jsonl line 1 cannot be read as JSON \(a key comes twice\)")
def a_key_twice_in_the_metrics(texts: Texts) -> None:
    replace(texts, "metrics.jsonl", '{"step": 0', '{"step": 0, "step": 0')


@forgery(r"seed 0: metrics.jsonl has neuron statistics, .* a record's go without: neuron_stats = 0")
def neuron_statistics(texts: Texts) -> None:
    look = dict(step=20, tokens=20 * 192, train_time_s=1.0, neurons=dict(dead={}))
    texts["seed_0"]["metrics.jsonl"] += 2 * f"{json.dumps(look)}\n"


@forgery(r"seed 0: metrics.jsonl has results of tasks, .* a record's go without: eval_every = 0")
def results_of_tasks(texts: Texts) -> None:
    found = dict(step=20, tokens=20 * 192, train_time_s=1.0, tasks=dict(piqa=dict(acc=0.5)))
    texts["seed_0"]["metrics.jsonl"] += f"{json.dumps(found)}\n"


@forgery(r"seed 0: the run began with the weights of another \(init_from = '/tmp/better'\)")
def weights_of_another_run(texts: Texts) -> None:
    for folder in ALL:
        replace(texts, "log.txt", '"init_from": ""', '"init_from": "/tmp/better"', folder)


@forgery(r"seed 1 had another learning-rate schedule than seed 0")
def another_schedule_in_one_seed(texts: Texts) -> None:
    set_rows(texts["seed_1"], lambda rows: [row | (dict(lr_scale=0.5) if "lr_scale" in row else {}) for row in rows])


@forgery(r"seed 2 and seed 3 have the same losses to the last digit: one run twice")
def a_copy_with_one_loss_moved(texts: Texts) -> None:
    seed_3 = json.loads(texts["seed_3"]["metrics.jsonl"].splitlines()[1])["train_loss"]
    rows = [json.loads(line) for line in texts["seed_2"]["metrics.jsonl"].splitlines()]
    rows[1]["train_loss"] = seed_3
    set_rows(texts["seed_3"], lambda _: rows)


@forgery(r"seed 0: metrics.jsonl line 2: train_loss is .inf., not float")
def a_word_for_a_number(texts: Texts) -> None:
    line = texts["seed_0"]["metrics.jsonl"].splitlines()[1]
    replace(texts, "metrics.jsonl", line, json.dumps(json.loads(line) | dict(train_loss="inf")))


@forgery(r"seed 0: summary.json cannot be read as JSON")
def nested_beyond_reading(texts: Texts) -> None:
    texts["seed_0"]["summary.json"] = "[" * 100_000


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_record_is_caught_with_its_reason(name: str, honest: Path) -> None:
    """The forger has brought summary.json and config.toml in line with the changed runs."""
    change, reason = FORGERIES[name]
    texts = read_texts(honest)
    change(texts)
    write_texts(honest, texts)
    found = reasons(load_record(honest))
    assert any(re.search(reason, line) for line in found), found


def test_declared_seeds_begin_at_the_tracks_first(honest: Path) -> None:
    """Below it rates are tuned. What ran before there was the rule has 0 to n - 1, and nothing declared."""
    record = load_record(honest)
    track = dataclasses.replace(tracks.find_track("tiny"), first_seed=1000)
    assert list(_of_declaration(record, track)) == [
        "the seeds are [0, 1, 2, 3]; 4 runs have 1000 to 1003, each once, so that none is picked or left out"
    ]
    before = dataclasses.replace(track, declared_from="2099-01-01")
    assert len(list(_of_declaration(record, before))) == 1  # its source knows the rule, whatever its clock says
    for run in record.runs:
        del run.config["num_seeds"], run.config["data_start"]
    assert list(_of_declaration(record, before)) == []


def test_neuron_statistics_are_one_reason(honest: Path) -> None:
    texts = read_texts(honest)
    neuron_statistics(texts)
    write_texts(honest, texts)
    assert len(reasons(load_record(honest))) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: edit_summary(path, time_s=dict(mean=0.1, median=0.1, low=0.1, high=0.1)),
         "summary.json says time_s = {'mean': 0.1"),
        (lambda path: edit_summary(path, p=1e-9), "summary.json says p = 1e-09; its runs say"),
        (lambda path: edit_summary(path, hardware="1 x Pocket calculator"), "summary.json says hardware = '1 x Pocket"),
        (lambda path: edit_summary(path, fastest=True), "summary.json says fastest = True; its runs say None"),
        (lambda path: edit_summary(path, date="2020-01-01"), "summary.json says date = 2020-01-01, the last run"),
        (lambda path: edit_summary(path, author=""), "author = '' has to be one line of 1 to 200 characters"),
        (lambda path: edit_summary(path, foreign=dict(hardware="?", source="?", batch_tokens=1)), "its log is of"),
        (lambda path: (path / "summary.json").write_text("[]", encoding="utf-8"), "summary.json is not a JSON object"),
        (lambda path: (path / "config.toml").write_bytes(b"seed = 1\n"), "config.toml is not the recipe"),
        (lambda path: (path / "README.md").unlink(), "README.md is missing"),
        (lambda path: (path / "runs.tar.xz").write_bytes((path / "runs.tar.xz").read_bytes()[:999]), "runs.tar.xz"),
        (lambda path: (path / "weights.pt").write_bytes(bytes(2**20)), "less than 1,048,576 can be committed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_change_beside_the_runs_is_caught(change: Callable[[Path], Any], reason: str, honest: Path) -> None:
    change(honest)
    found = reasons(load_record(honest))
    assert any(reason in line for line in found), found


def test_a_run_that_stands_in_two_records_is_caught(
    honest: Path, tiny_runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["add", *map(str, tiny_runs), "--name=again", "--into", str(honest.parent.parent)]) == 1
    assert "seed 3 is seed 3 of tiny/" in capsys.readouterr().err
    copy = honest.with_name(honest.name.replace("honest", "copy"))
    shutil.copytree(honest, copy)
    edit_summary(copy, name="copy")
    found = verify_all([load_record(honest), load_record(copy)])
    assert not found[honest] and len(found[copy]) == SEEDS
    assert cli.main(["verify"]) == 1


def test_a_track_without_a_fingerprint_has_no_records(honest: Path, tmp_path: Path) -> None:
    path = tmp_path / "tracks.toml"
    fingerprint = read_run_fingerprint(honest)
    path.write_text(
        path.read_text(encoding="utf-8").replace(f'val_fingerprint = "{fingerprint}"', 'val_fingerprint = ""'),
        encoding="utf-8",
    )
    tracks._load.cache_clear()
    (found, *_) = reasons(load_record(honest))
    assert fingerprint in found and "enter it: ./run.sh leaderboard fingerprint tiny" in found


def read_run_fingerprint(path: Path) -> str:
    return str(load_record(path).runs[0].log.facts["val_fingerprint"])


# Hostile files: a reason, never a traceback, and nothing read that is not the record's


def tar_of(**members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member in members.values():
            archive.addfile(member, io.BytesIO(bytes(member.size)) if member.isreg() else None)
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


ARCHIVES = {
    "a bomb": lambda honest: lzma.compress(bytes(2**27)),
    "a gzip within": lambda honest: lzma.compress(gzip.compress(lzma.decompress(honest))),
    "a second stream": lambda honest: honest + lzma.compress(b"more"),
    "cut off": lambda honest: honest[:-40],
    "a path out of it": lambda honest: lzma.compress(tar_of(a=member("../../seed_0/log.txt"))),
    "a link to itself": lambda honest: lzma.compress(tar_of(a=member("seed_0/log.txt", tarfile.SYMTYPE, "log.txt"))),
    "a link to nothing": lambda honest: lzma.compress(tar_of(a=member("seed_0/log.txt", tarfile.LNKTYPE, "none"))),
    "a folder for a file": lambda honest: lzma.compress(tar_of(a=member("seed_0/log.txt", tarfile.DIRTYPE))),
    "a file twice": lambda honest: lzma.compress(tar_of(a=member("seed_0/log.txt"), b=member("seed_0/log.txt"))),
    "an unknown file": lambda honest: lzma.compress(tar_of(a=member("seed_0/model.pt"))),
    "no archive": lambda honest: b"not an archive",
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_hostile_archive_is_refused(kind: str, honest: Path) -> None:
    archive = honest / "runs.tar.xz"
    archive.write_bytes(ARCHIVES[kind](archive.read_bytes()))
    (reason,) = reasons(load_record(honest))
    assert reason.startswith("runs.tar.xz ")


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_record_is_plain_files(kind: str, honest: Path, tmp_path: Path) -> None:
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes((honest / "config.toml").read_bytes())
        (honest / "config.toml").unlink()
        (honest / "config.toml").symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        (honest / "more").mkdir()
    else:
        os.mkfifo(honest / "more")
    (reason,) = reasons(load_record(honest))
    assert "a record is a folder of plain files" in reason


@pytest.mark.parametrize(
    "words",
    [
        dict(description="one line\n# another"), dict(description="\ud800"), dict(author="\x1b[31mred"), dict(author=7),
        dict(description="x" * 201), dict(name="$x^{$"), dict(name="a\nb"), dict(date="today"), dict(hardware=["H100"]),
    ],
    ids=str,
)  # fmt: skip
def test_words_that_cannot_stand_in_a_table_are_refused(words: dict[str, Any], honest: Path) -> None:
    edit_summary(honest, **words)
    (key,) = words
    assert any(reason.startswith(f"{key} = ") for reason in reasons(load_record(honest)))


def test_words_in_a_table_stay_words(honest: Path) -> None:
    """A description that would end the README's section, and one that would be a link or a cell of its own."""
    edit_summary(honest, description="<!-- /leaderboard --> [here](x) | <b>")
    loaded = load_record(honest)
    assert reasons(loaded) == []
    document = "<!-- leaderboard -->\n<!-- /leaderboard -->\n"
    section = rank.readme_section(rank.rows([loaded]))
    once = with_section(document, "leaderboard", section)
    assert with_section(once, "leaderboard", section) == once
    assert "&lt;!-- /leaderboard --> \\[here\\](x) \\| &lt;b>" in once
    shown = render([loaded])
    assert "&lt;!-- /leaderboard --&gt; [here](x) | &lt;b&gt;" in shown and "<b>" not in shown


# What is honest holds


def test_a_copy_does_not_push_the_original_out(honest: Path) -> None:
    copy = honest.with_name("2020-01-01_junk")
    shutil.copytree(honest, copy)
    found = verify_all([load_record(path) for path in (copy, honest)])
    assert found[honest] == []
    assert any("is seed 0 of tiny/" in reason for reason in found[copy])
    (honest.parent / ".new-x").mkdir()
    assert cli.main(["verify", str(honest), str(honest)]) == 0


def test_the_same_losses_in_other_times_are_another_run(honest: Path) -> None:
    """A recipe run again, or made faster without a change to what is computed."""
    again = honest.with_name(honest.name.replace("honest", "again"))
    shutil.copytree(honest, again)
    texts = read_texts(again)
    for folder in ALL:
        set_rows(texts[folder], lambda rows: [row | dict(train_time_s=row["train_time_s"] * 0.9) for row in rows])
    edit_summary(again, name="again")
    write_texts(again, texts)
    assert not any(verify_all([load_record(path) for path in (honest, again)]).values())


def test_asking_to_resume_is_not_having_resumed(honest: Path) -> None:
    texts = read_texts(honest)
    for folder in ALL:
        set_facts(texts[folder], lambda facts: facts["config"].update(resume="auto"))
    write_texts(honest, texts)
    assert reasons(load_record(honest)) == []
