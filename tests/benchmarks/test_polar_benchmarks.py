"""The polar benchmarks: they refuse what is wrong and count what is done."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import polar_quality, polar_speed
from harness.settings import parse_settings
from harness.step_timer import Seconds

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    monkeypatch.setitem(polar_speed.CASES, "tiny", [(2, 48, 16), (1, 16, 16)])
    monkeypatch.setattr(polar_speed.torch, "compile", lambda function, **options: function)  # takes seconds
    return tmp_path


def test_every_variant_is_checked_then_timed(tiny: Path) -> None:
    assert polar_speed.main(polar_speed.Args(cases=("tiny",), device="cpu", passes=2)) == 0
    (path,) = tiny.glob("polar_*.json")
    rows = {row["variant"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    assert {row["check"] for row in rows.values()} == {"right"}
    dense = 2 * 5 * (4 * 16**2 * 48 + 2 * 16**3) + 5 * 6 * 16**3
    assert rows["torch eager"]["executed_gflop"] == pytest.approx(dense / 1e9)
    assert rows["direct"]["executed_gflop"] == pytest.approx(dense / 1e9)
    # 48x16 in one segment of 5 steps; the square ones take the direct form unless told otherwise
    tall = 2 * (4 * 16**2 * 48 + 17 * 2 * 16**3)
    assert rows["gram"]["executed_gflop"] == pytest.approx((tall + 4 * 16**3 + 17 * 2 * 16**3) / 1e9)
    assert rows["auto"]["executed_gflop"] == pytest.approx((tall + 5 * 6 * 16**3) / 1e9)
    assert rows["aurora K=2"]["executed_gflop"] == pytest.approx((2 * tall + 5 * 6 * 16**3) / 1e9)
    assert rows["torch eager"]["of_eager"] == 1


def test_a_wrong_variant_is_not_timed_and_ends_in_status_1(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = polar_speed.aurora_polar
    monkeypatch.setattr(
        polar_speed,
        "aurora_polar",
        lambda X, iterations, **options: right(X, iterations, **options) * (1.01 if iterations == 3 else 1),
    )
    assert polar_speed.main(polar_speed.Args(cases=("tiny",), device="cpu", passes=1)) == 1
    rows = {
        row["variant"]: row for row in json.loads(next(tiny.glob("polar_*.json")).read_text(encoding="utf-8"))["rows"]
    }
    assert rows["aurora K=1"]["check"] == "right"
    assert "error 0.0" in rows["aurora K=3"]["check"]
    assert rows["aurora K=3"]["ms"] == ""
    assert "allowed" in capsys.readouterr().out


def test_unknown_cases_and_formats_are_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match="no case huge"):
        polar_speed.main(polar_speed.Args(cases=("huge",)))
    with pytest.raises(ValueError, match=r"dtype = .float64. must be one of auto, bfloat16"):
        parse_settings(polar_speed.Args, ["--dtype=float64"])
    assert not list(tiny.iterdir())


def test_quality_of_a_small_matrix_is_reported_for_every_form(tiny: Path) -> None:
    assert polar_quality.main(polar_quality.Args(shapes=("257x101",), device="cpu")) == 0
    (path,) = tiny.glob("polar_quality_*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {row["spectrum"] for row in rows} == set(polar_quality.SPECTRA)
    exact = [row for row in rows if row["form"] == "unrounded" and row["spectrum"] == "rank-deficient"]
    assert exact[0]["direction"] < 1e-9  # all its singular values reach about the same value
    in_float16 = [row for row in rows if row["form"].startswith("float16") and row["spectrum"] != "rank one"]
    assert all(row["distance"] < 0.05 for row in in_float16)


def test_passes_are_timed_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate runs, on the tall and the wide shape, and rates are those of the bytes that a pass moves."""
    pass_tiles = pytest.importorskip("benchmarks.pass_tiles")
    if torch.cuda.is_available():
        pytest.skip("runs in the interpreter")

    def median_seconds(runs: dict[str, Callable[[], object]], passes: int, device: torch.device) -> dict[str, Seconds]:
        for run in runs.values():
            run()
        return {tile: Seconds(1e-4 * (len(runs) - i), 0.0) for i, tile in enumerate(runs)}

    monkeypatch.setattr("benchmarks.polar_tiles.median_seconds", median_seconds)
    monkeypatch.setattr("benchmarks.polar_tiles.REPEATS", 1)
    rows = pass_tiles.time_passes([(2, 40, 20), (1, 20, 40)], CPU, passes=1)
    names = ["mark_not_finite", "momentum", "momentum_rows", "normalize_rows", "scale_rows", "apply_update"]
    assert [*dict.fromkeys((row["kernel"], row["shape"]) for row in rows)] == [
        (name, shape) for shape in ("2x40x20", "1x20x40") for name in names
    ]
    by_row = len(pass_tiles.ROWS) + len(pass_tiles.COLUMNS)
    assert len(rows) == 2 * 3 * len(pass_tiles.FLAT) + 2 * by_row + 2 * len(pass_tiles.BLOCKS)
    first = rows[0]
    assert first["tile"] == str(tuple(pass_tiles.FLAT[-1])) and first["ms"] == pytest.approx(0.1)
    assert first["tb_per_s"] == pytest.approx(2 * 40 * 20 * 4 / 1e-4 / 1e12)


def test_tiles_are_timed_by_product_and_the_best_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of times that are given for ten products; every candidate has run."""
    polar_tiles = pytest.importorskip("benchmarks.polar_tiles")
    from kernels.triton_common import Tile

    if torch.cuda.is_available():
        pytest.skip("runs in the interpreter")
    tiles = (Tile(16, 16, 16, 4, 2), Tile(32, 16, 16, 4, 2))
    given = {str(tuple(tile)): Seconds(seconds, 0.0) for tile, seconds in zip(tiles, (3e-3, 2e-3), strict=True)}

    def median_seconds(runs: dict[str, Callable[[], object]], passes: int, device: torch.device) -> dict[str, Seconds]:
        for run in runs.values():
            run()
        return {tile: given[tile] for tile in runs}

    monkeypatch.setattr(polar_tiles, "median_seconds", median_seconds)
    rows = polar_tiles.time_tiles([(1, 40, 20), (1, 20, 40)], tiles, CPU, passes=1)
    assert [(row["kernel"], row["shape"]) for row in rows[:4]] == [
        ("gram", "1x40x20"), ("symmetric_product", "1x40x20"), ("apply_symmetric", "1x40x20"),
        ("apply_symmetric", "1x40x20"),
    ]  # fmt: skip
    assert [row["tile"] for row in rows[2:4]] == [str(tuple(tiles[1])), str(tuple(tiles[0]))]
    assert [row["ms"] for row in rows[2:4]] == pytest.approx([0.2, 0.3])
