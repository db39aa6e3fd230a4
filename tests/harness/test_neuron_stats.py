"""Neuron statistics against other ways to compute them, on networks whose dead neurons are known, and in real runs."""

import copy
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import model
import train_gpt
from harness import neuron_stats
from harness.machine import Clock, find_machine
from harness.neuron_stats import (
    KINDS,
    LEVERAGES,
    MATRICES,
    MEASURES,
    PRUNED,
    THRESHOLDS,
    NeuronStats,
    contributions,
    effective_rank,
    effective_share,
    leverage,
    loss_without,
    magnitudes,
    pruning,
    rank_correlation,
)
from kernels.attention import attention
from model import GPT, IGNORE_INDEX, ModelConfig, rms_norm
from optim import Aurora, MatrixOptimizer, Muon
from tests.conftest import Trainer, python, torchrun
from tests.test_train import assert_refused, metrics, only_run, summary

NUM_NEURONS = 64


def strict_json(text: str) -> Any:
    """JSON as the standard has it, without NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


# ------------------------------------------------------------------------------------------------------------
# Leverage and rank


@pytest.mark.parametrize("rank", [7, 3, 1], ids="rank {}".format)
@pytest.mark.parametrize("shape", [(20, 7), (7, 20), (7, 7)], ids=str)
def test_leverage_is_the_squared_row_norms_of_the_polar_factor(shape: tuple[int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    m, n = shape
    X = torch.randn(m, rank, generator=generator).double() @ torch.randn(rank, n, generator=generator).double()
    X *= torch.logspace(-1, 1, m)[:, None]  # rows of very different size
    left, s, right = torch.linalg.svd(X, full_matrices=False)
    assert (s > 1e-6 * s.norm()).sum() == rank
    of_polar = (left[:, :rank] @ right[:rank]).square().sum(-1)
    torch.testing.assert_close(leverage(X[None])[0], of_polar * m / rank, rtol=1e-4, atol=1e-4)


def test_leverage_is_equal_for_equal_rows_and_nothing_for_a_zero_matrix() -> None:
    Q = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).double()).Q
    equal, zero = leverage(torch.stack([Q * 1e-4, torch.zeros(16, 16)]))
    torch.testing.assert_close(equal, torch.ones(16, dtype=torch.float64))
    assert not zero.isfinite().any()


def test_effective_rank_of_known_matrices() -> None:
    wide = torch.eye(5, 9) * 3
    torch.testing.assert_close(effective_rank(wide[None]).item(), 5.0)
    Q = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(0))).Q
    s = torch.tensor([4.0, 2.0, 1.0, 0, 0, 0, 0, 0, 0])
    expected = (16 + 4 + 1) ** 2 / (256 + 16 + 1)
    torch.testing.assert_close(effective_rank(((Q * s) @ Q.mT)[None]).item(), expected, rtol=1e-5, atol=0)
    assert math.isnan(effective_rank(torch.zeros(1, 4, 3)).item())


def test_effective_share_of_known_numbers() -> None:
    x = torch.tensor([[1.0, 1, 1, 1], [0, 0, 3, 0], [2, 2, 0, 0], [0, 0, 0, 0]])
    assert effective_share(x)[:3].tolist() == [1, 0.25, 0.5]
    assert math.isnan(effective_share(x)[3].item())


def test_rank_correlation_is_spearmans_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(6, (2, 3, 20), generator=generator).double()
    expected = [stats.spearmanr(one, other).statistic for one, other in zip(x, y, strict=True)]
    assert rank_correlation(x, y).tolist() == pytest.approx(expected)
    assert rank_correlation(x, x**3).tolist() == pytest.approx([1] * 3)
    assert not rank_correlation(x, torch.ones_like(y)).isfinite().any()
    assert not rank_correlation(x, y.masked_fill(y == y.max(), math.nan)).isfinite().any()


# ------------------------------------------------------------------------------------------------------------
# Looks


class Planted:
    """A small new model with looks at it; its neurons answer alike, but for those that `scale` changes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = ModelConfig(48, num_layers=2, num_heads=1, head_dim=8, model_dim=16, mlp_hidden=NUM_NEURONS, seq_len=8)
        self.model = GPT(config, torch.float32)
        self.stats, self.step = NeuronStats(self.model), 0
        self.tokens = torch.arange(64).reshape(8, 8) % 48

    def mlp(self, layer: int) -> model.MLP:
        block = self.model.blocks[layer]
        assert isinstance(block, model.Block)
        return block.mlp

    @torch.no_grad()
    def scale(self, layer: int, matrix: int, neurons: slice, factor: float) -> None:
        """Of gate (0) or up (1)."""
        self.mlp(layer).gate_up[matrix, neurons] *= factor

    def measure(self, *updates: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """Move gate and up, and down, of the first layers by these updates; the row, through JSON."""
        self.stats.before_step()
        for layer, (gate_up, down) in enumerate(updates):
            with torch.no_grad():
                self.mlp(layer).gate_up += gate_up
                self.mlp(layer).down += down
        self.step += 10
        row = self.stats.measure(self.step, self.tokens, self.tokens)
        return strict_json(json.dumps(row))


def test_magnitudes_are_those_of_the_neurons_by_hand() -> None:
    planted = Planted()
    planted.measure(*[(torch.randn(2, NUM_NEURONS, 16), torch.randn(16, NUM_NEURONS)) for _ in range(2)])
    gpt = planted.model
    x = rms_norm(gpt.embed(planted.tokens))
    for layer, found in enumerate(magnitudes(gpt, planted.tokens)):
        block, mlp = gpt.blocks[layer], planted.mlp(layer)
        x = x + block.attention(rms_norm(x), gpt.rotary, attention("auto", planted.tokens))  # type: ignore[operator]
        gate, up = (rms_norm(x) @ weight.mT for weight in mlp.gate_up)
        size = (gate / (1 + (-gate).exp()) * up).abs().flatten(0, 1)
        torch.testing.assert_close(found.float(), torch.stack([size.mean(0), size.amax(0)]), rtol=1e-4, atol=1e-5)
        x = x + mlp(rms_norm(x))
    assert not any(block.mlp._forward_pre_hooks for block in gpt.blocks)


def test_rows_that_only_fill_a_batch_up_do_not_count() -> None:
    whole, part, filled = (Planted() for _ in range(3))
    targets = filled.tokens.clone()
    targets[5:] = IGNORE_INDEX
    for planted in (whole, part, filled):
        planted.stats.before_step()
    expected = part.stats.measure(1, part.tokens[:5], part.tokens[:5])
    assert (
        filled.stats.measure(1, filled.tokens, targets)
        == expected
        != whole.stats.measure(1, whole.tokens, whole.tokens)
    )


def test_planted_dead_neurons_are_counted_by_layer_and_threshold_and_may_revive() -> None:
    planted = Planted()
    before = planted.measure()
    for measure in MEASURES:
        assert before["dead"][measure]["0.01"] == before["dead"][measure]["0.03"] == [0, 0]
        assert before["dead_since"][measure] is None
    planted.scale(0, matrix=1, neurons=slice(0, 5), factor=0.0)
    planted.scale(0, matrix=1, neurons=slice(5, 8), factor=0.005)  # far below 0.03 and above 1e-4 of its own size
    planted.scale(1, matrix=0, neurons=slice(0, 9), factor=0.0)  # silu(0) = 0
    after = planted.measure()
    for measure in MEASURES:
        assert after["dead"][measure]["0.03"] == pytest.approx([8 / 64, 9 / 64], rel=1e-4)
        assert after["dead"][measure]["0.01"][1] == pytest.approx(9 / 64, rel=1e-4)
        assert after["revived"][measure]["0.03"] == [0, 0]
        assert after["dead_since"][measure] == 20
        assert after["median"][measure][0] > 0
    planted.scale(0, matrix=1, neurons=slice(5, 8), factor=200.0)
    planted.scale(1, matrix=0, neurons=slice(9, 20), factor=0.0)
    end = planted.measure()
    for measure in MEASURES:
        assert end["dead"][measure]["0.03"] == pytest.approx([5 / 64, 20 / 64], rel=1e-4)
        assert end["revived"][measure]["0.03"] == pytest.approx([3 / 64, 0], rel=1e-4)
        assert end["ever_dead"][measure]["0.03"] == pytest.approx([8 / 64, 20 / 64], rel=1e-4)
        assert end["dead_since"][measure] == 20  # 14 neurons of the second measurement, 11 of the third


def test_a_neuron_that_fires_rarely_is_dead_by_its_mean_and_not_by_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = Planted()
    answers = torch.ones(8, 8, NUM_NEURONS)
    answers[:, :, 7] = 0
    answers[0, 0, 7] = -2  # 2/64 in the mean
    monkeypatch.setattr(model.MLP, "activations", lambda mlp, x_BTD: answers)
    row = planted.measure()
    assert row["median"] == {"mean": [1, 1], "peak": [1, 1]}
    for threshold in THRESHOLDS:
        dead = 1 / 64 if threshold > 2 / 64 else 0.0
        assert row["dead"]["mean"][f"{threshold:g}"] == pytest.approx([dead, dead], rel=1e-4)
        assert row["dead"]["peak"][f"{threshold:g}"] == [0, 0]


def test_hand_made_updates_have_their_known_spread_and_shares() -> None:
    planted = Planted()
    sizes = torch.linspace(1, 3, NUM_NEURONS)
    gate, up = torch.zeros(NUM_NEURONS, 16), torch.zeros(NUM_NEURONS, 16)
    gate[:, 3], up[:, 5] = sizes, 1.0
    down = torch.zeros(16, NUM_NEURONS)
    down[2] = sizes.flip(0)
    row = planted.measure((torch.stack([gate, up]), down))
    cv = (sizes.std() / sizes.mean()).item()
    assert [row[name]["update_cv"][0] for name in MATRICES] == pytest.approx([cv, 0, cv], abs=1e-5)
    assert [row[name]["update_cv"][1] for name in MATRICES] == [None] * 3  # that layer did not move
    assert row["gate"]["leverage"]["update"]["effective"][1] is row["down"]["least_moved_share"][1] is None
    scores = sizes.square() / sizes.square().mean()  # of a matrix of rank one
    of_update = row["gate"]["leverage"]["update"]
    assert of_update["effective"][0] == pytest.approx((1 / scores.square().mean()).item(), rel=1e-3)
    assert {edge: shares[0] for edge, shares in of_update["below"].items()} == {
        f"{edge:g}": pytest.approx((scores < edge).double().mean().item(), rel=1e-4) for edge in LEVERAGES
    }
    assert of_update["persistence"] == [None] * 2  # there was none before
    assert row["up"]["least_moved_share"][0] == pytest.approx(0.1, rel=1e-4)
    assert row["gate"]["least_moved_share"][0] == pytest.approx(
        0.1 * (sizes[:6].mean() / sizes.mean()).item(), rel=1e-4
    )
    row = planted.measure((torch.stack([-gate.flip(0), up]), -down))  # what moved least moves most now
    assert [row[name]["leverage"]["update"]["persistence"][0] for name in ("gate", "down")] == pytest.approx([-1, 1])
    assert row["gate"]["least_moved_share"][0] == pytest.approx(0.1, rel=1e-4)
    assert row["gate"]["update_cv"][0] == pytest.approx(cv, abs=1e-5)
    assert row["down"]["least_moved_share"][0] == pytest.approx(
        0.1 * (sizes[:6].mean() / sizes.mean()).item(), rel=1e-4
    )
    assert row["down"]["effective_rank"][0] is None  # moved back to zero


def test_weights_that_are_not_finite_are_no_numbers_in_json() -> None:
    planted = Planted()
    row = planted.measure((torch.full((2, NUM_NEURONS, 16), math.nan), torch.full((16, NUM_NEURONS), math.inf)))
    assert row["gate"]["leverage"]["update"]["below"]["4"][0] is row["down"]["update_cv"][0] is None
    assert row["contributing"][0] is row["median"]["mean"][0] is None
    assert row["dead"]["mean"]["0.1"][0] is row["revived"]["peak"]["0.3"][0] is None


def test_planted_idle_rows_are_found_exactly() -> None:
    """64 rows along 16 axes, four to each: the score of a row is four times its part of the square on its axis."""
    planted, gate = Planted(), torch.eye(16).repeat(4, 1)
    gate[:7] *= 0.1  # 4 * 0.01 / 3.01 = 0.013
    gate[7:10] *= 0.3  # 4 * 0.09 / 3.09 = 0.117
    up, down = torch.eye(16).repeat(4, 1), torch.zeros(16, NUM_NEURONS)
    row = planted.measure((torch.stack([gate, up]), down))
    shares = {0.01: 0, 0.025: 7, 0.05: 7, 0.1: 7, 0.25: 10, 0.5: 10, 2: 64, 4: 64}
    found = row["gate"]["leverage"]["update"]["below"]
    assert 10 / 64 < found.pop("1")[0] < 35 / 64  # rounding decides for 24 rows
    assert {float(edge): NUM_NEURONS * of_layers[0] for edge, of_layers in found.items()} == pytest.approx(
        shares, rel=1e-4
    )
    assert row["up"]["leverage"]["update"]["effective"][0] == pytest.approx(1)
    assert neuron_stats.idle_share(row, "update") == pytest.approx(10 / 64 / 2, rel=1e-4)
    assert neuron_stats.idle_share(row, "momentum") is None  # no optimizer was given


@pytest.mark.parametrize("rule", [Muon, Aurora])
def test_leverage_of_momentum_and_update_is_that_of_their_svd(rule: type[MatrixOptimizer]) -> None:
    planted = Planted()
    mlp, generator = planted.mlp(0), torch.Generator().manual_seed(3)
    matrices = [mlp.gate_up, mlp.down]
    optimizer = rule(matrices, lr=0.1, polar_method="svd")
    planted.stats = NeuronStats(planted.model, [torch.optim.AdamW([planted.model.head.weight]), optimizer])
    kept = list[dict[str, list[Tensor]]]()
    for _ in range(2):
        planted.stats.before_step()
        before = [p.detach().clone() for p in matrices]
        for p in matrices:
            rows = torch.logspace(-2, 0, p.size(-2))[:, None]
            p.grad = rows * torch.randn(p.shape, generator=generator)
        optimizer.step()
        planted.step += 1
        row = planted.stats.measure(planted.step, planted.tokens, planted.tokens)
        momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in matrices]
        updates = [p.detach() - old for p, old in zip(matrices, before, strict=True)]
        found = dict(row_norms=updates, update=updates, momentum=momenta)
        kept += [{kind: [*gate_up, down.mT] for kind, (gate_up, down) in found.items()}]

    def scores_of(X: Tensor, kind: str) -> Tensor:
        left, _, right = torch.linalg.svd(X.double(), full_matrices=False)
        scores = (X.double() if kind == "row_norms" else left @ right).square().sum(-1)
        return scores / scores.mean()

    for kind in KINDS:
        both = ([scores_of(X, kind) for X in each[kind]] for each in kept)
        for name, earlier, now in zip(MATRICES, *both, strict=True):
            measured = row[name]["leverage"][kind]
            assert {edge: of_layers[0] for edge, of_layers in measured["below"].items()} == pytest.approx(
                {f"{edge:g}": (now < edge).double().mean().item() for edge in LEVERAGES}, abs=1e-4
            )
            assert measured["effective"][0] == pytest.approx(effective_share(now).item(), rel=1e-3)
            assert measured["persistence"][0] == pytest.approx(stats.spearmanr(earlier, now).statistic, abs=1e-3)
    idle = {kind: neuron_stats.idle_share(row, kind) or 0.0 for kind in KINDS}
    assert idle["momentum"] > 0.2  # gradients' rows were uneven
    assert (idle["row_norms"] == idle["update"] == 0) == (rule is Aurora)


def test_pruning_takes_what_contributes_least_and_gives_it_back() -> None:
    planted = Planted()
    with torch.no_grad():
        planted.model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        for layer in range(2):
            planted.mlp(layer).down.normal_(generator=torch.Generator().manual_seed(layer))
            planted.mlp(layer).down *= torch.linspace(0.1, 1, NUM_NEURONS)
    planted.scale(0, matrix=1, neurons=slice(20, 40), factor=0.0)  # silent: a tenth, two and three of them cost nothing
    planted.scale(1, matrix=0, neurons=slice(40, 60), factor=0.0)
    gpt, tokens = planted.model, planted.tokens
    targets = tokens.roll(1, 1).clone()
    targets[0, 3:6] = IGNORE_INDEX
    sizes = magnitudes(gpt, tokens)
    of_blocks = contributions(gpt, [size[0] for size in sizes])
    for layer, values in enumerate(of_blocks):
        down = planted.mlp(layer).down
        torch.testing.assert_close(values, sizes[layer][0] * down.detach().double().square().sum(0).sqrt())
        assert ((values == 0).nonzero().flatten() == torch.arange(20) + (20, 40)[layer]).all()
    before = copy.deepcopy(gpt.state_dict())
    with torch.no_grad():
        batches = [(tokens[:3], targets[:3]), (tokens[3:], targets[3:])]
        found = loss_without(gpt, of_blocks, batches)
        torch.testing.assert_close(gpt.state_dict(), before, rtol=0, atol=0)
        whole = gpt(tokens, targets).item() / (targets >= 0).sum().item()
        for share in PRUNED:
            pruned = copy.deepcopy(gpt)
            for block, values in zip(pruned.blocks, of_blocks, strict=True):
                block.mlp.down[:, values.sort().indices[: round(share * NUM_NEURONS)]] = 0  # type: ignore[union-attr, operator, index]
            expected = pruned(tokens, targets).item() / (targets >= 0).sum().item()
            assert found[share] == pytest.approx(expected, rel=1e-6)
    assert list(found) == [0, *PRUNED]
    assert found[0] == found[0.1] == found[0.3] == pytest.approx(whole, rel=1e-6)
    assert abs(found[0.5] - found[0]) > 1e-3
    filled = torch.cat([tokens[3:], tokens[:2]]), torch.cat([targets[3:], torch.full_like(targets[:2], IGNORE_INDEX)])
    rises = pruning(gpt, [(tokens[:3], targets[:3]), filled])  # rows that only fill a batch up are no tokens
    assert rises == {f"{share:g}": pytest.approx(found[share] - found[0], abs=2e-6) for share in PRUNED}
    planted.stats.last_step = 20
    assert planted.measure()["pruning"] is None
    planted.stats.before_step()
    assert planted.stats.measure(20, tokens, targets)["pruning"] == pytest.approx(rises, abs=2e-6)


def test_looks_cost_less_than_a_hundredth_of_training(tiny_recipe: Path) -> None:
    """Floating-point operations of sotu_base's model and schedule with a look every 100 steps, the last one prunes."""
    size = ["--num_layers=4", "--head_dim=64", "--model_dim=128", "--seq_len=256", "--micro_batch_tokens=2048"]
    size += ["--batch_tokens=2048", "--train_steps=600", "--val_tokens=2048", "--matrix_optimizer=muon", "--fused=none"]
    config = train_gpt.load_config([str(tiny_recipe), *size])
    run = train_gpt.set_up(config, find_machine("cpu", "float32"))
    looks = NeuronStats(run.model, run.optimizers, last_step=2)
    tokens, targets = next(train_gpt.validation(config, run.machine, run.val_stream))

    def solved(L: tuple[int, ...], B: tuple[int, ...], *_: Any, **__: Any) -> int:
        return math.prod(B) * L[-1]

    def factorised(gram: tuple[int, ...], *_: Any, **__: Any) -> int:
        return math.prod(gram) * gram[-1] // 3

    counted = {torch.ops.aten.linalg_solve_triangular: solved, torch.ops.aten.linalg_cholesky_ex: factorised}
    flops = []
    for work in (
        lambda: train_gpt.train_step(run, *run.batch()),
        lambda: looks.measure(1, tokens, targets),
        lambda: looks.measure(2, tokens, targets),
    ):
        looks.before_step()
        with FlopCounterMode(display=False, custom_mapping=counted) as counter:
            work()
        flops.append(counter.get_total_flops())
    run.loader.close()
    step, look, last = flops
    assert 6 * 0.8e6 * config.batch_tokens < step
    assert (5 * look + last) / (config.train_steps * step) < 0.01


# ------------------------------------------------------------------------------------------------------------
# In the trainer


def looks(directory: Path) -> dict[int, Any]:
    for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        strict_json(line)
    return metrics(directory, "neurons")


@pytest.fixture(scope="module")
def watched(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the tiny recipe with a measurement at every fourth step and a checkpoint at every tenth."""
    folder = tmp_path_factory.mktemp("watched")
    arguments = ["--neuron_stats=4", "--checkpoint_every=10", "--checkpoint_keep=9", f"--run_dir={folder}"]
    handler = signal.getsignal(signal.SIGTERM)
    assert train_gpt.main([str(tiny_recipe), *arguments]) == 0
    signal.signal(signal.SIGTERM, handler)
    (directory,) = folder.iterdir()
    return directory


def test_looks_leave_the_training_as_it_is(trainer: Trainer, tmp_path: Path, watched: Path) -> None:
    result = trainer("--checkpoint_every=40")
    assert result.returncode == 0
    assert not [line for line in result.stdout.splitlines() if line.startswith("neurons")]
    plain = only_run(tmp_path)
    for key in ("val_loss", "train_loss"):
        assert metrics(watched, key) == metrics(plain, key)
    one, other = (torch.load(path / "checkpoint_000040.pt", weights_only=True) for path in (watched, plain))
    for part in ("model", "rng"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    assert sorted(looks(watched)) == list(range(4, 41, 4))
    assert not looks(plain)
    final = summary(watched)
    assert final["neurons"] == {"step": 40, **looks(watched)[40]}
    assert final["phase_s"]["neurons"] > 0
    assert summary(plain)["neurons"] is None
    assert [step for step, row in looks(watched).items() if row["pruning"]] == [40]
    assert looks(watched)[8]["up"]["leverage"]["momentum"]["persistence"][0] > 0
    dead = 100 * sum(final["neurons"]["dead"]["mean"]["0.1"]) / 2
    assert f"neurons      step 40: {dead:.2f}% dead (mean below 0.1" in (watched / "log.txt").read_text(
        encoding="utf-8"
    )


def test_a_resumed_run_writes_the_rows_of_an_uninterrupted_one(trainer: Trainer, tmp_path: Path, watched: Path) -> None:
    result = trainer("--neuron_stats=4", f"--resume={watched / 'checkpoint_000010.pt'}")
    assert result.returncode == 0, result.stderr
    assert looks(only_run(tmp_path)) == looks(watched)
    assert summary(only_run(tmp_path))["neurons"] == summary(watched)["neurons"]


def test_a_checkpoint_of_a_run_without_looks_is_enough(trainer: Trainer, tmp_path: Path, watched: Path) -> None:
    path = tmp_path / "checkpoint_000020.pt"
    state = torch.load(watched / path.name, weights_only=True)
    del state["neurons"], state["config"]["neuron_stats"]  # as before there were any
    torch.save(state, path)
    assert trainer("--neuron_stats=20", f"--resume={path}").returncode == 0
    found = looks(only_run(tmp_path))
    assert sorted(found) == [40]
    assert found[40]["gate"]["update_cv"] == looks(watched)[40]["gate"]["update_cv"]
    assert found[40]["gate"]["least_moved_share"] != looks(watched)[40]["gate"]["least_moved_share"]


def test_looks_are_off_the_clock(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[str] = []
    seen: list[tuple[str, str]] = []

    def noted(name: str, genuine: Any) -> Any:
        def note(*arguments: Any) -> Any:
            if name == "switch":
                phases.append(arguments[1])
            else:
                seen.append((name, phases[-1]))
            return genuine(*arguments)

        return note

    for place, name in (
        (Clock, "switch"),
        (NeuronStats, "before_step"),
        (NeuronStats, "measure"),
        (train_gpt, "train_step"),
    ):
        monkeypatch.setattr(place, name, noted(name, getattr(place, name)))
    assert trainer("--neuron_stats=2", "--train_steps=3").returncode == 0
    trained = ("train_step", "train")
    assert [found for found in seen if found != ("train_step", "warmup")] == [
        trained, ("before_step", "neurons"), trained, ("measure", "neurons"), trained
    ]  # fmt: skip


def test_a_run_resumed_without_looks_reports_none(trainer: Trainer, tmp_path: Path, watched: Path) -> None:
    assert trainer(f"--resume={watched / 'checkpoint_000030.pt'}").returncode == 0
    assert summary(only_run(tmp_path))["neurons"] is None


def test_every_first_step_is_json(trainer: Trainer, tmp_path: Path) -> None:
    """A new model's first step moves its head alone, the second down alone: ratios of nothing are null."""
    assert trainer("--neuron_stats=1", "--train_steps=3", "--matrix_optimizer=muon").returncode == 0
    found = looks(only_run(tmp_path))
    first, second, third = (found[step] for step in (1, 2, 3))
    assert first["down"]["effective_rank"] == first["down"]["update_cv"] == [None] * 2
    assert [first["gate"]["leverage"][kind]["effective"] for kind in KINDS] == [[None] * 2] * 3
    assert second["gate"]["update_cv"] == second["up"]["least_moved_share"] == [None] * 2
    assert all(value > 0 for value in second["down"]["update_cv"] + third["gate"]["update_cv"])


@pytest.mark.slow
def test_two_ranks_write_the_rows_of_one(trainer: Trainer, tiny_recipe: Path, tmp_path: Path) -> None:
    arguments = ["--neuron_stats=2", "--train_steps=4", "--micro_batch_tokens=96"]
    assert trainer(*arguments).returncode == 0
    result = python(torchrun(2), tiny_recipe, *arguments, f"--run_dir={tmp_path / 'two'}")
    assert result.returncode == 0, result.stderr
    (two,) = (tmp_path / "two").iterdir()
    assert sorted(looks(two)) == [2, 4]
    one = looks(only_run(tmp_path))
    for step, row in looks(two).items():
        for part in ("dead", "ever_dead", "dead_since"):
            assert row[part] == one[step][part]
        for part in MATRICES:
            for key, values in row[part].items():
                expected = [value or 0 for value in one[step][part][key]]
                if key != "leverage":
                    assert [value or 0 for value in values] == pytest.approx(expected, rel=1e-3), (part, key)
            assert row[part]["leverage"]["momentum"]["effective"] == [None] * 2  # each rank has a share of it
            of_update, alone = (each[part]["leverage"]["update"]["effective"] for each in (row, one[step]))
            assert [x or 0 for x in of_update] == pytest.approx([x or 0 for x in alone], rel=1e-2)


class Plain(nn.Module):
    """An MLP of someone's own, without a gate."""

    def __init__(self, config: ModelConfig, parts: set[str]) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(config.model_dim, config.hidden_dim))
        self.gate_up = nn.Parameter(torch.empty(config.hidden_dim, config.model_dim))


def test_another_mlp_is_refused_before_there_is_a_run(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.Block, "mlp_type", Plain)
    assert_refused(trainer("--neuron_stats=10"), tmp_path / "runs", ["mlp.gate_up [2 or 1, F, D]", "neuron_stats = 0"])
    assert_refused(trainer("--neuron_stats=-1"), tmp_path / "runs", ["neuron_stats = -1 must be >= 0"])


def test_in_words_says_what_has_no_value() -> None:
    row = Planted().measure()
    row["step"] = 10
    assert neuron_stats.in_words(row).startswith("step 10: 0.00% dead")
    assert neuron_stats.in_words(row).endswith("below 0.25 of the mean: row_norms -, update -, momentum -")


class Wrapped(nn.Module):
    """As torch.compile and activation checkpointing wrap a module: its parameters get other names."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inside

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(x)


def test_wrapped_mlps_and_torch_s_defaults_change_nothing() -> None:
    expected, planted = Planted().measure(), Planted()
    for block in planted.model.blocks:
        block.mlp = Wrapped(block.mlp)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")  # whatever is made without a device is of no use
    try:
        planted.stats = NeuronStats(planted.model)
        found = planted.measure()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert found == expected
