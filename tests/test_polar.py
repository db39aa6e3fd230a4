"""polar against float64 SVD: quality, shapes, hostile scales, refusals."""

import pytest
import torch

from optim.polar import COEFFICIENTS, polar

# Largest distance of a singular value from 1 after the method's own number of steps, for Gaussian matrices of the
# shapes below, from the coefficients: the quintic oscillates within [0.68, 1.14], Polar Express ends close to 1.
WORST_SINGULAR_VALUE = {"polar_express": 0.15, "quintic": 0.35, "simple_quintic": 1e-4}
SHAPES = [(64, 64), (96, 32), (32, 96), (61, 17), (1, 9), (9, 1), (1, 1)]


def exact_polar(X: torch.Tensor) -> torch.Tensor:
    W, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    return W @ Vh


def gaussian(m: int, n: int, *batch: int) -> torch.Tensor:
    return torch.randn(*batch, m, n, generator=torch.Generator().manual_seed(m * 1000 + n))


@pytest.mark.parametrize("method", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (61, 17)], ids=str)
def test_polar_is_near_orthogonal_and_points_where_the_svd_does(method: str, shape: tuple[int, int]) -> None:
    X = gaussian(*shape)
    U = polar(X, method, dtype=torch.float32).double()
    singular_values = torch.linalg.svdvals(U)
    assert (singular_values - 1).abs().max() < WORST_SINGULAR_VALUE[method]
    exact = exact_polar(X)
    cosine = (U * exact).sum() / U.norm() / exact.norm()
    assert cosine > (0.97 if method == "quintic" else 0.995)


@pytest.mark.parametrize("method", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_polar_applies_its_polynomials_to_the_singular_values(method: str, shape: tuple[int, int]) -> None:
    """An independent route to the same matrix: SVD in float64, the scalar polynomials on S, back together."""
    X = gaussian(*shape)
    W, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    S = S / (S.norm() * (1.02 if method == "polar_express" else 1.0))
    for a, b, c in COEFFICIENTS[method]:
        S = a * S + b * S**3 + c * S**5
    expected = (W * S) @ Vh
    torch.testing.assert_close(polar(X, method, dtype=torch.float32).double(), expected, rtol=0, atol=1e-4)


def test_svd_method_is_the_exact_polar_factor() -> None:
    X = gaussian(40, 24, 3)
    torch.testing.assert_close(polar(X, "svd"), exact_polar(X))


@pytest.mark.parametrize("method", [*COEFFICIENTS, "svd"])
def test_batch_equals_one_by_one_and_views_do_not_matter(method: str) -> None:
    X = gaussian(12, 20, 2, 3)
    batched = polar(X, method, dtype=torch.float32)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(batched[i, j], polar(X[i, j].clone(), method, dtype=torch.float32))
    torch.testing.assert_close(polar(X.mT, method, dtype=torch.float32), batched.mT, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(X=torch.ones(3, 3), method="newton"), ["polar_method", "'newton'", "polar_express"]),
        (dict(X=torch.ones(3)), ["shape (3,)", "matrix"]),
        (dict(X=torch.ones(3, 3), steps=0), ["polar_steps = 0", "at least 1"]),
    ],
    ids=["method", "vector", "steps"],
)
def test_refusals_say_what_and_what_works(arguments: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        polar(**arguments)
    for word in words:
        assert word in str(refusal.value)
