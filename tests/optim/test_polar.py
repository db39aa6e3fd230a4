"""polar against float64 SVD: quality, shapes, forms, formats, hostile scales and spectra, refusals."""

import pytest
import torch

from benchmarks import polar_methods, polar_quality
from benchmarks.polar_speed import dense_polar
from kernels import backend
from optim.polar import COEFFICIENTS, LONGEST_SEGMENT, flops, plan_segments, polar, row_scaled_polar, scale_columns

# Largest distance of a singular value from 1 after the method's own number of steps, for Gaussian matrices of the
# shapes below, from the coefficients: the quintic oscillates within [0.68, 1.14], Polar Express ends close to 1.
WORST_SINGULAR_VALUE = {
    "polar_express": 0.15, "quintic": 0.35, "simple_quintic": 1e-4, "cans": 0.13, "deepseek_v4": 1e-3, "cubic5": 0.31,
    "aol": 0.15,
}  # fmt: skip
# The polynomials' slope at 0, least and largest value over [0.01, 1], each as published or by hand.
FACTS = {
    "polar_express": (989, 0.859, 1.141), "quintic": (485, 0.682, 1.134), "simple_quintic": (4096, 1.0, 1.0),
    "cans": (1049, 0.884, 1.120), "deepseek_v4": (79263, 1.0, 1.001), "cubic5": (119.3, 0.774, 1.3),
    "aol": (120.6, 0.973, 1.145),
}  # fmt: skip
SHAPES = [(64, 64), (96, 32), (32, 96), (61, 17), (1, 9), (9, 1), (1, 1)]


def exact_polar(X: torch.Tensor) -> torch.Tensor:
    W, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    return W @ Vh


def as_taken(X: torch.Tensor, method: str) -> torch.Tensor:
    """What the polynomials of `method` are applied to, by its definition."""
    if method != "aol":
        return X / (X.norm() * (1.02 if method in ("polar_express", "cans", "cubic5") else 1.0))
    if X.size(0) > X.size(1):
        return as_taken(X.mT, method).mT
    return torch.diag((X @ X.mT).abs().sum(dim=1) ** -0.5) @ X


def gaussian(m: int, n: int, *batch: int) -> torch.Tensor:
    return torch.randn(*batch, m, n, generator=torch.Generator().manual_seed(m * 1000 + n))


@pytest.mark.parametrize("method", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (61, 17)], ids=str)
def test_polar_is_near_orthogonal_and_points_where_the_svd_does(method: str, shape: tuple[int, int]) -> None:
    X = gaussian(*shape)
    U = polar(X, method, dtype=torch.float32).double()
    singular_values = torch.linalg.svdvals(U)
    assert (singular_values - 1).abs().max() < WORST_SINGULAR_VALUE[method]
    exact = exact_polar(as_taken(X, method))  # with AOL another matrix's
    cosine = (U * exact).sum() / U.norm() / exact.norm()
    assert cosine > (0.97 if method in ("quintic", "cubic5") else 0.995)


@pytest.mark.parametrize("method", COEFFICIENTS)
def test_coefficients_have_the_slope_and_the_range_they_are_published_with(method: str) -> None:
    facts = polar_methods.facts(method)
    slope, low, high = FACTS[method]
    assert facts["slope"] == pytest.approx(slope, rel=1e-3)
    assert (facts["low"], facts["high"]) == pytest.approx((low, high), abs=1e-3)
    assert facts["keeps_sign"] == "yes"


def test_a_set_that_turns_the_sign_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is in use for Turbo-Muon elsewhere."""
    flipped = [
        (4.0098, -7.0585, 2.4635),
        (3.4585, -5.5479, 2.5959),
        (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    ]
    monkeypatch.setitem(COEFFICIENTS, "aol", flipped)
    assert polar_methods.facts("aol")["keeps_sign"] == "NO"


@pytest.mark.parametrize("method", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("in_float64")
def test_polar_applies_its_polynomials_to_the_singular_values(method: str, shape: tuple[int, int]) -> None:
    """An independent route to the same matrix: SVD, the scalar polynomials on S, back together."""
    X = gaussian(*shape).double()
    W, S, Vh = torch.linalg.svd(as_taken(X, method), full_matrices=False)
    for a, b, c in COEFFICIENTS[method]:
        S = a * S + b * S**3 + c * S**5
    expected = (W * S) @ Vh
    torch.testing.assert_close(polar(X, method, dtype=torch.float32), expected, rtol=0, atol=1e-9)


def test_svd_method_is_the_exact_polar_factor() -> None:
    X = gaussian(40, 24, 3)
    torch.testing.assert_close(polar(X, "svd"), exact_polar(X))


@pytest.mark.parametrize("method", [*COEFFICIENTS, "svd"])
@pytest.mark.usefixtures("in_float64")
def test_batch_equals_one_by_one_and_views_do_not_matter(method: str) -> None:
    X = gaussian(12, 20, 2, 3).double()
    batched = polar(X, method, dtype=torch.float32)
    for i in range(2):
        for j in range(3):
            alone = polar(X[i, j].clone(), method, dtype=torch.float32)
            torch.testing.assert_close(batched[i, j], alone, rtol=0, atol=1e-9)
    torch.testing.assert_close(polar(X.mT, method, dtype=torch.float32), batched.mT, rtol=0, atol=1e-9)


def test_bfloat16_is_close_to_float32() -> None:
    X = gaussian(256, 96)
    half, full = polar(X), polar(X, dtype=torch.float32)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() / full.norm() < 0.03


@pytest.mark.parametrize("method", [*COEFFICIENTS, "svd"])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_of_the_input_does_not_matter(method: str, scale: float) -> None:
    X = gaussian(24, 16)
    expected = polar(X, method, dtype=torch.float32)
    torch.testing.assert_close(polar(X * scale, method, dtype=torch.float32), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [*COEFFICIENTS, "svd"])
def test_zero_and_rank_deficient_matrices_stay_finite(method: str) -> None:
    X = torch.stack([torch.zeros(8, 6), torch.ones(8, 6)])
    zero, rank_one = polar(X, method, dtype=torch.float32)
    assert (zero == 0).all()
    assert rank_one.isfinite().all()
    torch.testing.assert_close(rank_one, rank_one[0, 0].expand(8, 6), rtol=1e-4, atol=1e-5)
    assert 0.6 < rank_one.norm() < 1.2


# AOL


HOSTILE = {
    "gaussian": gaussian(40, 24),
    "rank one": torch.ones(40, 24),
    "one dominant": gaussian(40, 1) @ gaussian(1, 24) + 1e-3 * gaussian(40, 24),
    "columns of 1 to 1e-12": gaussian(40, 24) * torch.logspace(0, -12, 24),
    "zero columns": gaussian(40, 24) * (torch.arange(24) > 5),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.float16, 1e-3)], ids=str)
def test_the_spectral_norm_after_aol_is_at_most_one(name: str, dtype: torch.dtype, rounding: float) -> None:
    X = HOSTILE[name]
    scaled = scale_columns(backend("torch", X.device), X[None], dtype)
    norm = torch.linalg.svdvals(scaled.double()).max()
    assert 0.3 < norm < 1 + rounding


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_aol_with_hostile_columns(name: str, dtype: torch.dtype) -> None:
    X, is_zero = HOSTILE[name], ~HOSTILE[name].any(dim=0)
    U = polar(X, "aol", dtype=dtype).double()
    Y = as_taken(X[:, ~is_zero].double(), "aol")
    W, S, Vh = torch.linalg.svd(Y, full_matrices=False)
    expected = (W * polar_quality.composed("aol", S)) @ Vh
    assert (U[:, ~is_zero] - expected).norm() < ROUNDING[dtype] * expected.norm()
    assert (U[:, is_zero] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_row_scaled_aol_is_that_of_the_scaled_matrix(dtype: torch.dtype) -> None:
    M, d = gaussian(40, 24, 2), torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
    polar_of, norm = row_scaled_polar(M, "aol", None, dtype, "torch", "auto")
    U, row_square = polar_of(d, "both")
    expected = polar(d.unsqueeze(-1) * M / norm.unsqueeze(-1), "aol", dtype=torch.float32)
    rounding = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(U.float(), expected, rtol=0, atol=rounding)
    torch.testing.assert_close(row_square, expected.square().sum(dim=-1), rtol=0, atol=rounding)


# Forms, formats and kernels


# A single singular value near 1 shows rounding most: Polar Express's first polynomial is 16 times as steep there. Of
# 2,000 such matrices (9 x 1) the worst was off by 0.059 in the Gram form and by 0.065 in the direct one.
ROUNDING = {torch.float32: 1e-3, torch.float16: 0.07}
FORMATS = [
    pytest.param(torch.float32, "direct", id="float32-direct"),
    pytest.param(torch.float32, "gram", id="float32-gram"),
    pytest.param(torch.float16, "direct", id="float16-direct"),
    pytest.param(torch.float16, "gram", id="float16-gram"),
]


@pytest.mark.parametrize(("dtype", "form"), FORMATS)
@pytest.mark.parametrize("method", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form_applies_the_same_polynomials(
    shape: tuple[int, int], method: str, dtype: torch.dtype, form: str
) -> None:
    X = gaussian(*shape)
    expected = polar(X.double(), method, dtype=torch.float32, form="direct")
    result = polar(X, method, dtype=dtype, form=form)
    assert result.dtype == dtype
    assert result.shape == X.shape
    assert (result.float() - expected).norm() <= ROUNDING[dtype] * expected.norm()


@pytest.mark.parametrize("method", COEFFICIENTS)
@pytest.mark.parametrize("spectrum", polar_quality.SPECTRA)
@pytest.mark.parametrize("shape", [(160, 160), (257, 101), (96, 250)], ids=str)
def test_no_form_is_worse_than_the_dense_one_in_bfloat16(shape: tuple[int, int], spectrum: str, method: str) -> None:
    """By orthogonality and direction, with the triangle mirrored as the Triton kernels do."""
    problem = polar_quality.make_problem(*shape, spectrum, method)
    results = polar_quality.measure(problem, polar_quality.Args(method=method, device="cpu"))
    of_unit_rows = results.pop("float16 gram, unit rows", None)  # rounded twice: nearer to the method in any case
    assert (of_unit_rows is None) == (method in ("aol", "deepseek_v4"))
    assert of_unit_rows is None or of_unit_rows.distance < results["bfloat16 dense direct"].distance
    for name in ("float16 direct", "float16 gram", "float32 direct", "float32 gram"):
        assert polar_quality.is_no_worse(results[name], results["bfloat16 dense direct"], results["unrounded"]), name
    assert results["float32 gram"].distance < (
        0.02 if method == "deepseek_v4" else 5e-3
    )  # it raises rounding 79,263 times


@pytest.mark.parametrize("spectrum", polar_quality.SPECTRA)
def test_the_triton_kernels_themselves_are_no_worse(spectrum: str) -> None:
    """The float16 Gram form through the kernels, several tiles wide."""
    pytest.importorskip("triton")
    problem = polar_quality.make_problem(150, 90, spectrum, "polar_express")
    dense = polar_quality.quality(dense_polar(problem.X, torch.bfloat16), problem)
    unrounded = polar_quality.quality(problem.unrounded, problem)
    result = polar_quality.quality(polar(problem.X, dtype=torch.float16, kernels="triton", form="gram"), problem)
    assert polar_quality.is_no_worse(result, dense, unrounded)


def test_the_quality_measure_has_teeth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without restarts float16 loses the weak directions, and the measure says so."""
    monkeypatch.setitem(LONGEST_SEGMENT[torch.float16], "polar_express", 5)
    problem = polar_quality.make_problem(257, 101, "log-uniform to 1e-6", "polar_express")
    results = polar_quality.measure(problem, polar_quality.Args(device="cpu"))
    result, dense, unrounded = (results[name] for name in ("float16 gram", "bfloat16 dense direct", "unrounded"))
    assert not polar_quality.is_no_worse(result, dense, unrounded)


@pytest.mark.parametrize("method", ["polar_express", "quintic", "simple_quintic", "cubic5"])
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_one_direction_above_noise_through_the_kernels(method: str, noise: float) -> None:
    """Rounding, which the steps raise, costs the Gram form a third at most of what it costs bfloat16."""
    pytest.importorskip("triton")
    X = gaussian(64, 1, 3) @ gaussian(1, 24, 3) + noise * gaussian(64, 24, 3)
    expected = polar(X, method, dtype=torch.float32, kernels="torch", form="direct")
    errors = [
        (U.float() - expected).norm() / expected.norm()
        for U in (
            polar(X, method, dtype=torch.float16, kernels="triton", form="gram"),
            polar(X, method, dtype=torch.bfloat16, kernels="torch", form="direct"),
        )
    ]
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize("method", ["polar_express", "aol"])
def test_rows_of_very_different_norms_survive_float16(method: str) -> None:
    """Half the rows are 1e-6 of the others, far below float16 beside them, and alone in their directions."""
    X = torch.zeros(1, 40, 16)
    X[:, :20, :8] = gaussian(20, 8)
    X[:, 20:, 8:] = gaussian(20, 8) * 1e-2
    reference = polar(X, method, dtype=torch.float32)
    assert (polar(X, method, dtype=torch.float16).float() - reference).norm() < 0.02 * reference.norm()
    X[:, 20:] *= 1e-4
    small = polar(X, method, dtype=torch.float32)[:, 20:]
    assert (polar(X, method, dtype=torch.float16)[:, 20:].float() - small).norm() < 0.02 * small.norm()


@pytest.mark.parametrize(("dtype", "form"), FORMATS)
@pytest.mark.parametrize("shape", [(37, 19), (19, 37), (20, 20), (1, 9)], ids=str)
def test_triton_kernels_give_what_the_plain_ones_give(shape: tuple[int, int], dtype: torch.dtype, form: str) -> None:
    pytest.importorskip("triton")
    X = gaussian(*shape, 2)
    expected = polar(X, dtype=torch.float32, kernels="torch", form="direct")
    result = polar(X, dtype=dtype, kernels="triton", form=form)
    assert (result.float() - expected).norm() <= ROUNDING[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_triton_kernels_take_aol_s_scales(dtype: torch.dtype) -> None:
    """With columns far apart; more than one matrix of a batch."""
    pytest.importorskip("triton")
    X = gaussian(24, 16, 2) * torch.logspace(0, -9, 16)
    expected = polar(X, "aol", dtype=torch.float32, kernels="torch", form="direct")
    result = polar(X, "aol", dtype=dtype, kernels="triton", form="direct")
    assert (result.float() - expected).norm() <= ROUNDING[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_triton_kernels_keep_hostile_matrices_finite(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    base = gaussian(24, 16)
    hostile = [
        torch.zeros(24, 16),
        torch.ones(24, 16),
        base * 1e-30,
        base * 1e30,
        base * (torch.arange(24) == 3)[:, None],
    ]
    results = polar(torch.stack([base, *hostile]), dtype=dtype, kernels="triton").float()
    assert results.isfinite().all()
    assert (results[1] == 0).all()
    for scaled in results[3:5]:
        torch.testing.assert_close(scaled, results[0], rtol=1e-3, atol=1e-3)
    assert 0.6 < results[5].norm() < 1.3
    assert (results[5][torch.arange(24) != 3] == 0).all()


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("polar_express", 11),
        ("quintic", 10),
        ("simple_quintic", 18),
        ("deepseek_v4", 9),
        ("deepseek_v4", 10),
        ("cans", 8),
    ],
)
def test_many_steps_do_not_leave_float16_s_range(method: str, steps: int) -> None:
    """Rows that are weak and alone in their directions grow at every step."""
    X = torch.zeros(40, 16)
    X[:20, :8], X[20:, 8:] = gaussian(20, 8), gaussian(20, 8) * 1e-6
    result, expected = (polar(X, method, steps, dtype).float() for dtype in (torch.float16, torch.float32))
    assert result.isfinite().all()
    assert (result - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("spectrum", polar_quality.SPECTRA)
@pytest.mark.parametrize("shape", [(96, 40), (64, 64)], ids=str)
@pytest.mark.parametrize(("method", "steps"), [("deepseek_v4", 10), ("simple_quintic", 18), ("polar_express", 11)])
def test_float16_stands_in_for_bfloat16_at_any_number_of_steps(
    method: str, steps: int, shape: tuple[int, int], spectrum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: finite, and no further from float32."""
    X = polar_quality.make_problem(*shape, spectrum, method).X
    X = torch.cat([X, X * torch.logspace(0, -7, shape[0])[:, None]])
    expected = polar(X, method, steps, torch.float32)
    in_bfloat16 = polar(X, method, steps, kernels="torch")
    monkeypatch.setattr("optim.polar.storage_dtype", lambda *_: torch.float16)
    polar_of, norm = row_scaled_polar(X, method, steps, torch.bfloat16, "torch", "auto")
    assert polar_of(None, "matrix")[0].isfinite().all()
    for in_float16 in (polar(X, method, steps), polar_of(norm, "matrix")[0]):
        assert in_float16.dtype == torch.bfloat16
        for ours, theirs, whole in zip(in_float16, in_bfloat16, expected, strict=True):
            assert (ours - whole).norm() <= 1.1 * (theirs - whole).norm() + 4e-3 * whole.norm()


def test_the_polar_factor_is_detached_and_takes_float64() -> None:
    X = gaussian(6, 4).requires_grad_()
    assert not polar(X).requires_grad
    torch.testing.assert_close(polar(X.detach().double(), dtype=torch.float16), polar(X, dtype=torch.float16))


def test_segments_are_as_long_as_the_format_allows_where_that_is_cheaper() -> None:
    def lengths(m: int, n: int, dtype: torch.dtype, form: str = "auto", method: str = "polar_express") -> list[int]:
        return [len(s) for s in plan_segments(method, None, dtype, m, n, symmetric=False, form=form)]

    assert lengths(2048, 768, torch.float32) == [5]
    assert lengths(2048, 768, torch.float16) == [2, 2, 1]
    assert lengths(2048, 768, torch.bfloat16) == [1] * 5
    assert lengths(768, 768, torch.float32) == [1] * 5
    assert lengths(768, 768, torch.float32, "gram") == [5]
    assert lengths(2048, 768, torch.float32, "direct") == [1] * 5
    assert lengths(2048, 768, torch.float16, method="simple_quintic") == [5, 5, 2]


def test_flops_are_those_of_the_published_counts() -> None:
    """The 124 M bank, 36 of 2048x768 and 48 of 768x768: 1.69 TFLOP dense, 1.17 with symmetric products."""

    def bank(symmetric: bool, form: str, dtype: torch.dtype = torch.float32) -> float:
        plans = {m: plan_segments("polar_express", None, dtype, m, 768, symmetric, form) for m in (2048, 768)}
        return sum(count * flops(plans[m], m, 768, symmetric) for m, count in ((2048, 36), (768, 48))) / 1e12

    assert bank(False, "direct") == pytest.approx(1.69, abs=0.01)
    assert bank(True, "direct") == pytest.approx(1.17, abs=0.01)
    assert bank(True, "auto") < bank(True, "gram", torch.float16) < bank(True, "direct")


def test_a_cubic_step_saves_a_product() -> None:
    assert polar_methods.executed_flops("cubic5", 768, 768) == 10 * 2 * 768**3
    for form in ("direct", "gram"):
        plan = plan_segments("cubic5", None, torch.float32, 768, 768, False, form)
        with_c = [[(a, b, 0.1) for a, b, _ in segment] for segment in plan]
        assert flops(with_c, 768, 768, False) - flops(plan, 768, 768, False) == 5 * 2 * 768**3


@pytest.mark.usefixtures("in_float64")
def test_more_steps_than_the_method_has_repeat_the_last() -> None:
    X = gaussian(40, 16).double()
    six, by_hand = polar(X, "polar_express", 6, torch.float32), polar(X, "polar_express", 5, torch.float32)
    R, (a, b, c) = by_hand.mT @ by_hand, COEFFICIENTS["polar_express"][-1]
    expected = by_hand @ (a * torch.eye(16, dtype=torch.float64) + b * R + c * R @ R)
    torch.testing.assert_close(six, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(X=torch.ones(3, 3), method="newton"), ["polar_method", "'newton'", "polar_express"]),
        (dict(X=torch.ones(3)), ["shape (3,)", "matrix"]),
        (dict(X=torch.ones(0, 3)), ["shape (0, 3)", "rows and columns"]),
        (dict(X=torch.ones(3, 3, dtype=torch.int64)), ["torch.int64", "torch.float32"]),
        (dict(X=torch.ones(3, 3), steps=0), ["polar_steps = 0", "at least 1"]),
        (dict(X=torch.ones(3, 3), dtype=torch.float64), ["dtype = torch.float64", "torch.bfloat16"]),
        (dict(X=torch.ones(3, 3), form="fast"), ["form = 'fast'", "auto, direct, gram"]),
        (dict(X=torch.ones(3, 3), kernels="cuda"), ["kernels = 'cuda'", "auto, triton, torch"]),
    ],
    ids=["method", "vector", "empty", "integer", "steps", "dtype", "form", "kernels"],
)
def test_refusals_say_what_and_what_works(arguments: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        polar(**arguments)
    for word in words:
        assert word in str(refusal.value)


def test_the_table_of_methods_tells_aol_s_rounding_from_its_scaling() -> None:
    args = polar_methods.Args(shapes=("40x24",), device="cpu")
    rows = {row["arithmetic"]: row for row in polar_methods.errors("aol", "one dominant", args)}
    assert rows["float16"]["direction"] == pytest.approx(rows["exact"]["direction"], rel=0.05)
    assert rows["input's factor"]["orthogonality"] < 1e-9
    assert 1e-5 < rows["input's factor"]["direction"] < rows["exact"]["direction"]
