"""The step's options as a run has them: schedules, data, checkpoints, profile, mistakes. What they compute is in
test_model.py, tests/kernels/test_attention.py, tests/kernels/test_fused.py and tests/kernels/test_cross_entropy.py."""

import dataclasses
import gzip
import json
import re
from decimal import Decimal, localcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType

import train_gpt
from data.loader import TokenLoader, TokenStream
from data.shards import write_shard
from harness.profiling import largest_costs
from harness.resume import FIXED, FREE_TO_DIFFER
from leaderboard.runs import read_run
from tests.conftest import Trainer, at_step, python, stop, torchrun
from train_gpt import Config, load_config, plan_step, set_up, train_step, warm_up

PLAIN, FUSED = ["--fused=none"], ["--fused=norm,mlp,head,blocks"]
EVERYTHING = [
    *FUSED, "--window=12", "--window_start=4", "--value_embeds=1", "--embed_skip=true", "--ngrams=2,3",
    "--ngram_sparse=true", "--ngram_rows=997",
    "--mask_padding=true", "--z_loss=1e-3", "--tie_head_steps=15", "--embed_lr=0.004",
    "--small_batch_steps=13", "--short_row_steps=22", "--micro_batch_tokens=96", "--data_start=seed", "--seed=1003",
    "--weight_decay=0.1", "--matrix_weight_decay=0.1", "--decay_schedule=rate", "--adamw_cautious", "--cautious",
    "--adamw_cooldown=cosine", "--adamw_cooldown_frac=0.3", "--momentum_warmup_steps=8", "--momentum_cooldown_steps=12",
    "--lookahead=0.3", "--lookahead_decay=0.9", "--lookahead_start=5", "--lookahead_end=25",
    "--average_steps=6", "--average_start=15", "--average_share=0.6",
]  # fmt: skip


def metrics(directory: Path, key: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def only(folder: Path) -> Path:
    (directory,) = folder.iterdir()
    return directory


def tiny_run(tiny_recipe: Path, *arguments: str) -> train_gpt.Run:
    config = load_config([str(tiny_recipe), *arguments])
    return set_up(config, train_gpt.find_machine(config.device, config.dtype))


# Schedules


@pytest.mark.parametrize("micro_batch_tokens", [32, 64, 128])
@pytest.mark.parametrize("world_size", [1, 2])
def test_small_batches_take_the_same_stream_in_the_same_order(
    tmp_path: Path, micro_batch_tokens: int, world_size: int
) -> None:
    """The first 3 steps take 128 tokens, the others 256: every token once, over the steps and ranks in order."""
    if world_size * micro_batch_tokens > 128:
        pytest.skip("one micro-batch of each rank is the whole batch; the other cases cut it")
    write_shard(tmp_path / "a.bin", np.arange(2000) % 1000)
    stream = TokenStream([tmp_path / "a.bin"], 1000)
    loaders = [TokenLoader(stream, micro_batch_tokens, rank, world_size) for rank in range(world_size)]
    config = Config(batch_tokens=256, seq_len=16, small_batch_steps=3)
    position = 0
    for step in [0, 1, 2, 3, 4]:
        plan = plan_step(config, step)
        assert plan.first_token == position
        batches = [loader.batch(position, plan.batch_tokens, plan.row_tokens) for loader in loaders]
        inputs, targets = (torch.cat([pair[i].flatten() for pair in batches]) for i in (0, 1))
        count = 128 if step < 3 else 256
        assert inputs.tolist() == [(position + i) % 1000 for i in range(count)]
        assert targets.tolist() == [(position + i + 1) % 1000 for i in range(count)]
        assert all(pair[0].shape[2] == 16 for pair in batches)
        position += count
    for loader in loaders:
        loader.close()


def test_short_rows_are_the_same_tokens_cut_in_two(tiny_recipe: Path) -> None:
    long, short = tiny_run(tiny_recipe), tiny_run(tiny_recipe, "--short_row_steps=2")
    for step, rows in enumerate([12, 12, 6]):
        for run in (long, short):
            run.follow(plan_step(run.config, step))
        for whole, cut in zip(long.batch(), short.batch(), strict=True):
            assert cut.shape == (1, rows, 192 // rows)
            assert torch.equal(whole.flatten(), cut.flatten())
    for run in (long, short):
        run.loader.close()


def test_the_log_counts_the_tokens_of_small_batches(trainer: Trainer, tmp_path: Path) -> None:
    result = trainer("--small_batch_steps=15")
    assert result.returncode == 0, result.stderr
    tokens = metrics(only(tmp_path / "runs"), "tokens")
    assert tokens == {step: 96 * min(step, 15) + 192 * max(0, step - 15) for step in range(0, 41, 5)}
    losses = metrics(only(tmp_path / "runs"), "train_loss")
    assert losses[5] == pytest.approx(np.log(64), rel=0.5)  # a mean over the tokens there were
    assert "after 6,240 tokens" in result.stdout
    verified = read_run(only(tmp_path / "runs"))
    assert tokens == {step: verified.tokens_at(step) for step in tokens}  # what a record is held to


def test_embedding_and_head_are_one_matrix_until_they_are_untied(tiny_recipe: Path) -> None:
    run = tiny_run(tiny_recipe, "--tie_head_steps=3", "--embed_lr=0.004")
    equal = []
    for step in range(5):
        run.follow(plan_step(run.config, step))
        train_step(run, *run.batch())
        equal.append(torch.equal(run.model.embed.weight, run.model.head.weight))
    assert equal == [True, True, True, False, False]
    run.loader.close()


def test_documents_begin_at_the_tokenizers_own_token(tiny_recipe: Path) -> None:
    byte = ["--tokenizer=byte", "--vocab_size=257"]
    assert tiny_run(tiny_recipe, *byte, "--doc_mask=true").model.doc_token == 256
    gpt2 = ["--tokenizer=gpt2", "--vocab_size=50257"]
    assert tiny_run(tiny_recipe, *gpt2, "--doc_mask=true").model.doc_token == 50256
    assert tiny_run(tiny_recipe, *byte).model.doc_token is None


# The run


def test_warm_up_with_everything_on_leaves_no_trace(tiny_recipe: Path) -> None:
    cold, warm = (tiny_run(tiny_recipe, *EVERYTHING) for _ in range(2))
    warm_up(warm)
    for step in range(3):
        for run in (cold, warm):
            run.follow(plan_step(run.config, step))
            train_step(run, *run.batch())
    for p, q in zip(cold.model.parameters(), warm.model.parameters(), strict=True):
        assert torch.equal(p, q)
    for run in (cold, warm):
        run.loader.close()


def test_warm_up_moves_nothing(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rates = tiny_run(tiny_recipe, *EVERYTHING), list[float]()

    def note_rates(*_: Any) -> None:
        rates.extend(group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups)

    monkeypatch.setattr(train_gpt, "train_step", note_rates)
    warm_up(run)
    assert len(rates) > 4
    assert set(rates) == {0.0}
    run.loader.close()


def test_warm_up_meets_every_shape_and_window_before_the_clock_starts(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tiny_recipe, *EVERYTHING)
    run.config = dataclasses.replace(run.config, compile=True)  # as if: then windows count, too
    seen: list[tuple[torch.Size, Any, bool]] = []
    run.compiled = lambda inputs, targets, window: (
        seen.append((inputs.shape, window, torch.is_grad_enabled())) or run.model(inputs, targets, window)
    )
    warm_up(run)
    warmed = set(seen)
    seen.clear()
    for step in range(run.config.train_steps):
        run.follow(plan_step(run.config, step))
        train_step(run, *run.batch())
        if step % 10 == 0:
            train_gpt.evaluate(run)
    assert len(warmed) > 6
    assert set(seen) <= warmed
    run.loader.close()


def test_a_resumed_run_with_everything_on_is_the_uninterrupted_one(trainer: Trainer, tmp_path: Path) -> None:
    """Checkpoints in each phase: before, between and after the ends of small batches, tied head and short rows."""
    assert trainer(*EVERYTHING, "--checkpoint_every=10", "--checkpoint_keep=9").returncode == 0
    whole = only(tmp_path / "runs")
    for step in (10, 20, 30):
        folder = tmp_path / f"from_{step}"
        result = trainer(*EVERYTHING, f"--resume={whole}/checkpoint_0000{step}.pt", f"--run_dir={folder}")
        assert result.returncode == 0, result.stderr
        for key in ("val_loss", "train_loss", "tokens"):
            assert metrics(only(folder), key) == metrics(whole, key)


def test_the_micro_batch_does_not_matter(trainer: Trainer, tmp_path: Path) -> None:
    for size in (96, 32):
        result = trainer(*EVERYTHING, f"--micro_batch_tokens={size}", f"--run_dir={tmp_path / str(size)}")
        assert result.returncode == 0, result.stderr
    whole, parts = (metrics(only(tmp_path / str(size)), "val_loss") for size in (96, 32))
    assert whole == pytest.approx(parts, rel=1e-4)


@pytest.mark.slow
def test_two_ranks_with_everything_on_train_as_one(trainer: Trainer, tiny_recipe: Path, tmp_path: Path) -> None:
    arguments = [*EVERYTHING, "--micro_batch_tokens=32", "--batch_tokens=128", "--train_steps=30"]
    one = trainer(*arguments)
    assert one.returncode == 0, one.stderr
    two = python(torchrun(2), tiny_recipe, *arguments, f"--run_dir={tmp_path / 'two'}")
    assert two.returncode == 0, two.stderr
    losses = [metrics(only(tmp_path / name), "val_loss") for name in ("runs", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_seed_shifts_where_the_data_begin(tiny_recipe: Path) -> None:
    """By multiples of the golden ratio, here in 60 digits, of the 7,001 tokens."""
    starts = {}
    for seed in (0, *range(1000, 1005), 10**6):
        run = tiny_run(tiny_recipe, "--data_start=seed", f"--seed={seed}", "--small_batch_steps=1")
        tokens = run.loader.stream.read(0, 7001)
        with localcontext(prec=60):
            starts[seed] = int((seed * (Decimal(5).sqrt() - 1) / 2 % 1) * 7001)
        for step, count in enumerate([96, 192, 192]):
            run.follow(plan := plan_step(run.config, step))
            places = (starts[seed] + plan.first_token + np.arange(count + 1)) % 7001
            for found, expected in zip(run.batch(), (places[:-1], places[1:]), strict=True):
                np.testing.assert_array_equal(found.flatten(), tokens[expected])
        run.loader.close()
    assert starts[0] == 0
    ordered = sorted(start for seed, start in starts.items() if 1000 <= seed < 1005)
    assert min(np.diff([*ordered, ordered[0] + 7001])) > 7001 / 8  # five seeds in a row


@pytest.mark.parametrize("matrix_optimizer", ["muon", "aurora"])
def test_options_off_and_fused_parts_on_train_alike(trainer: Trainer, tmp_path: Path, matrix_optimizer: str) -> None:
    for name, options in (("plain", PLAIN), ("fused", FUSED)):
        result = trainer(*options, f"--matrix_optimizer={matrix_optimizer}", f"--run_dir={tmp_path / name}")
        assert result.returncode == 0, result.stderr
    plain, fused = (metrics(only(tmp_path / name), "val_loss") for name in ("plain", "fused"))
    assert plain == pytest.approx(fused, rel=1e-3)


def test_resume_by_name_may_change_how_but_not_what(trainer: Trainer, tmp_path: Path) -> None:
    assert trainer("--checkpoint_every=20").returncode == 0
    checkpoint = only(tmp_path / "runs") / "checkpoint_000020.pt"
    assert trainer(f"--resume={checkpoint}", *FUSED, f"--run_dir={tmp_path / 'fused'}").returncode == 0
    refused = trainer(f"--resume={checkpoint}", "--ngrams=2,3", f"--run_dir={tmp_path / 'ngrams'}")
    assert refused.returncode == 2
    assert "ngrams is () there and (2, 3) here" in refused.stderr


def test_what_an_older_checkpoint_does_not_have_was_its_default(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings lack the options, and its training was without them."""
    with monkeypatch.context() as patch:
        at_step(patch, 25, stop)
        assert trainer("--checkpoint_every=20").returncode == 130
    checkpoint = only(tmp_path / "runs") / "checkpoint_000020.pt"
    state = torch.load(checkpoint, weights_only=True)
    for key in ("z_loss", "mask_padding", "fused", "decay_schedule"):
        del state["config"][key]
    for group in (group for saved in state["optimizers"] for group in saved["param_groups"]):
        del group["initial_weight_decay"]
    torch.save(state, checkpoint)
    refused = trainer(f"--resume={checkpoint}", "--mask_padding=true")
    assert refused.returncode == 2
    assert "mask_padding is False there and True here" in refused.stderr
    anew = trainer("--resume=auto", "--z_loss=0.1", f"--run_dir={tmp_path / 'runs'}", "--train_steps=2")
    assert "no checkpoint of an unfinished run with these settings" in anew.stdout
    tied = trainer(f"--resume={checkpoint}", "--decay_schedule=rate", f"--run_dir={tmp_path / 'rate'}")
    assert tied.returncode == 0, tied.stderr
    goes_on = trainer("--resume=auto", *PLAIN)
    assert "resumed from" in goes_on.stdout


def test_every_option_is_known_to_resume() -> None:
    """What only changes how a step is computed may differ; what changes its result may not, unless it is asked for."""
    how = {"fused", "profile", "dry_run", "compile", "compile_blocks"}
    parameters = {"architecture", "objective", "value_embeds", "embed_skip", "ngrams", "ngram_rows", "activation"}
    # another loss, tied matrices, data
    race = {"mask_padding", "tie_head_steps", "small_batch_steps", "data_start", "shard_tail"}
    rest = {"doc_mask", "window", "window_start", "z_loss", "short_row_steps"}
    assert how <= set(FREE_TO_DIFFER.split())
    assert parameters | race <= set(FIXED.split())
    assert not (parameters | race | rest) & set(FREE_TO_DIFFER.split())


# Profile


def test_profile_writes_a_trace_and_the_ten_largest_costs(trainer: Trainer, tmp_path: Path) -> None:
    result = trainer("--profile=true", "--train_steps=12", *PLAIN)
    assert result.returncode == 0, result.stderr
    directory = only(tmp_path / "runs")
    table = result.stdout.partition("ten largest costs")[2].splitlines()[1:11]
    rows = [re.fullmatch(r" +([\d.]+) ms +([\d.]+)% +(\d+) calls  (\S.*)", line) for line in table]
    costs = [float(row[1]) for row in rows if row]
    assert len(costs) == 10
    assert costs == sorted(costs, reverse=True)
    trace = json.loads(gzip.decompress((directory / "trace.json.gz").read_bytes()))
    products = [event for event in trace["traceEvents"] if event.get("name") == "aten::mm"]
    assert len(products) == 3 * (
        4 * 2 + 1
    )  # of one step: forward and both gradients of 4 products a block and the head
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    assert summary["phase_s"]["profile"] > 0
    assert summary["status"] == "finished"


def test_the_largest_costs_are_told_by_their_own_time() -> None:
    """Not by that of what they called; kernels for a GPU, operators for a CPU."""

    def event(key: str, is_kernel: bool, own_us: float, count: int) -> Any:
        kind = DeviceType.CUDA if is_kernel else DeviceType.CPU
        return SimpleNamespace(key=key, device_type=kind, count=count, self_cpu_time_total=own_us, cpu_time_total=9e9,
                               self_device_time_total=2 * own_us, device_time_total=9e9)  # fmt: skip

    events = [event("small", False, 1e3, 4), event("large", False, 3e3, 2), event("kernel", True, 5e2, 1)]
    assert [line.split() for line in largest_costs(events, is_cuda=False)] == [
        ["3.000", "ms", "75.0%", "2", "calls", "large"], ["1.000", "ms", "25.0%", "4", "calls", "small"],
    ]  # fmt: skip
    assert [line.split() for line in largest_costs(events, is_cuda=True)] == [
        ["1.000", "ms", "100.0%", "1", "calls", "kernel"]
    ]
    assert len(largest_costs([event(str(i), False, i, 1) for i in range(30)], is_cuda=False)) == 10


def test_a_run_too_short_for_a_profile_says_so(trainer: Trainer, tmp_path: Path) -> None:
    result = trainer("--profile=true", "--train_steps=5")
    assert result.returncode == 0, result.stderr
    assert "profile: none, as it is of the 6th step to come, and 5 are left" in result.stdout
    assert not (only(tmp_path / "runs") / "trace.json.gz").exists()


def test_without_it_nothing_is_profiled(trainer: Trainer, tmp_path: Path) -> None:
    assert trainer().returncode == 0
    assert not (only(tmp_path / "runs") / "trace.json.gz").exists()


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attention=flex"], ["attention is not a setting; write fused = "]),
        (["--fused_mlp=true"], ["fused_mlp is not a setting; write fused = 'auto', 'none' or some of "]),
        (["--joint_matrices=true"], ["joint_matrices is not a setting; it has never paid"]),
        (["--fused=auto,norm"], ["auto and none stand alone"]),
        (["--fused=flash"], ["fused = 'flash' must be one of auto, none, norm, mlp, head, blocks"]),
        (["--doc_mask=true"], ["doc_mask needs a tokenizer", "tokenizer = 'gpt2'"]),
        (["--window=8", "--window_start=9"], ["window_start = 9 is more than window = 8", "raise window"]),
        (["--unet_skips=true"], ["unet_skips is not a setting; it has never paid"]),
        (["--ngrams=2,2"], ["ngrams = (2, 2) names a length twice"]),
        (["--ngrams=1,2"], ["ngrams = '1,2' must be >= 2"]),
        (["--window=-1"], ["window = -1 must be >= 0; 0 works"]),
        (["--value_embeds=2"], ["value_embeds = 2 must be at most half of num_layers = 2"]),
        (["--short_row_steps=5", "--seq_len=3", "--micro_batch_tokens=192"], ["seq_len = 3 is odd"]),
        (["--tie_head_steps=5"], ["embed_lr = 0.3, head_lr = 0.004", "--embed_lr=0.004"]),
        (["--tie_head_steps=5", "--embed_lr=0.004", "--head_betas=0.5,0.9"], ["the same betas for both"]),
        (["--fused=head", "--softcap=50"], ["fused = 'head' needs softcap <= 40", "50"]),
        (["--small_batch_steps=5", "--seq_len=64"], ["small_batch_steps = 5", "in some steps batch_tokens: found 96"]),
    ],
    ids=lambda value: " ".join(value) if value and str(value[0]).startswith("--") else "",
)
def test_what_does_not_go_together_is_refused(
    trainer: Trainer, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    result = trainer(*arguments)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert not (tmp_path / "runs").exists()


# A GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "options", [[], [option.replace(",blocks", "") for option in EVERYTHING]], ids=["plain", "everything"]
)
def test_steps_never_wait_for_the_gpu(tiny_recipe: Path, options: list[str]) -> None:
    """After warm-up nothing in a step stops the host: no copy back, no size that depends on data."""
    shape = ["--head_dim=16", "--seq_len=64", "--batch_tokens=512", "--micro_batch_tokens=256", "--val_tokens=2048"]
    run = tiny_run(tiny_recipe, *options, "--device=cuda", *shape)
    warm_up(run)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(10):
            run.follow(plan_step(run.config, step))
            train_step(run, *run.batch())
    finally:
        torch.cuda.set_sync_debug_mode("default")
        run.loader.close()
