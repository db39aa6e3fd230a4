"""Forged records: each is caught, with its reason. Forgers bring summaries in line with the runs they changed."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import leaderboard.__main__ as cli
from leaderboard import tracks
from leaderboard.records import load_record
from leaderboard.verify import reasons, verify_all
from tests.records import ALL, SEEDS, Rows, Texts, edit_summary, read_texts, set_facts, set_rows, write_texts

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


@forgery(r"seed 0: val step 40: 0.500 s in log.txt, [\d.]+ s in metrics.jsonl")
def time_edited_in_the_log(texts: Texts) -> None:
    line = line_of(texts, "step:40/40 val_loss")
    before, _, after = line.partition("train_time:")
    replace(texts, "log.txt", line, f"{before}train_time:0.500s {after.split(' ')[1]}")


@forgery(r"seed 0: summary.json says train_time_s = 0.5, the metrics")
def time_edited_in_a_run_summary(texts: Texts) -> None:
    summary = json.loads(texts["seed_0"]["summary.json"]) | dict(train_time_s=0.5)
    texts["seed_0"]["summary.json"] = json.dumps(summary)


@forgery(r"seed 1: val step 40: step_avg:[\d.]+ms in log.txt, [\d.]+ ms by its time")
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


@forgery(r"git_commit differs")
def other_commit_in_one_seed(texts: Texts) -> None:
    set_facts(texts["seed_3"], lambda facts: facts.update(git_commit="0" * 40))


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


@forgery(r"seed 3: it ends at step 30 of 40 without having reached its target|the seeds stop at different steps")
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


@forgery(r"seed 0: val step 40: loss [\d.]+ in log.txt, 2.70000 in metrics.jsonl")
def loss_edited_in_the_metrics(texts: Texts) -> None:
    rows = [json.loads(line) for line in texts["seed_0"]["metrics.jsonl"].splitlines()]
    rows[-1]["val_loss"] = 2.7
    texts["seed_0"]["metrics.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)


@forgery(r"val step 10: metrics.jsonl has 1920 tokens, not 10 x 96")
def fewer_tokens_a_step_claimed(texts: Texts) -> None:
    for folder in ALL:
        set_facts(texts[folder], lambda facts: facts["config"].update(batch_tokens=96))


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


@forgery(r"seed 2: the run did not come to its end: interrupted")
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


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_record_is_caught_with_its_reason(name: str, honest: Path) -> None:
    """The forger has brought summary.json and config.toml in line with the changed runs."""
    change, reason = FORGERIES[name]
    texts = read_texts(honest)
    change(texts)
    write_texts(honest, texts)
    found = reasons(load_record(honest))
    assert any(re.search(reason, line) for line in found), found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: edit_summary(path, time_s=dict(mean=0.1, median=0.1, low=0.1, high=0.1)),
         "summary.json says time_s = {'mean': 0.1"),
        (lambda path: edit_summary(path, p=1e-9), "summary.json says p = 1e-09; its runs say"),
        (lambda path: edit_summary(path, hardware="1 x Pocket calculator"), "summary.json says hardware = '1 x Pocket"),
        (lambda path: edit_summary(path, fastest=True), "summary.json says fastest = True; its runs say None"),
        (lambda path: edit_summary(path, date="2020-01-01"), "summary.json says date = 2020-01-01, the last run"),
        (lambda path: edit_summary(path, author=""), "summary.json has no author"),
        (lambda path: edit_summary(path, foreign=dict(hardware="?", batch_tokens=192)), "its logs have facts of"),
        (lambda path: (path / "summary.json").write_text("[]"), "summary.json is not a JSON object"),
        (lambda path: (path / "config.toml").write_text("seed = 1\n"), "config.toml is not the recipe"),
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
    path.write_text(path.read_text().replace(f'val_fingerprint = "{fingerprint}"', 'val_fingerprint = ""'))
    tracks._load.cache_clear()
    (found, *_) = reasons(load_record(honest))
    assert fingerprint in found and "add it to tracks.toml" in found


def read_run_fingerprint(path: Path) -> str:
    return str(load_record(path).runs[0].log.facts["val_fingerprint"])
