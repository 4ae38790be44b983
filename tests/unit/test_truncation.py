"""Dense -> factors: errors that are true, ranks that are the smallest, the same bits each time."""

import pytest
import torch
from helpers import F64, randn, rel

from ssr_core.truncation import OVERSAMPLING, truncate

SMALL = [(6, 8), (40, 9), (9, 40), (1, 7), (7, 1), (1, 1), (64, 64)]
LARGE = [(160, 150), (150, 400), (500, 150)]
"""Shapes that the randomised path takes at rank 20 and below."""

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Many small matrices: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spectrum(kind, size):
    index = torch.arange(1, size + 1, dtype=F64)
    return {
        "flat": torch.ones(size, dtype=F64),
        "slow": index**-0.5,
        "fast": index**-2.0,
        "geometric": 0.7**index,
        "step": torch.where(index <= 5, 1.0, 1e-4).to(F64),
    }[kind]


def matrix_of(values, shape, seed=1, dtype=F64):
    """A matrix with these singular values."""
    u = torch.linalg.qr(randn(seed, shape[0], len(values))).Q
    v = torch.linalg.qr(randn(seed + 1, shape[1], len(values))).Q
    return ((u * values) @ v.T).to(dtype)


def best_error(matrix, rank):
    """Eckart and Young: what the best matrix of this rank leaves, relative."""
    values = torch.linalg.svdvals(matrix.double())
    return float(values[rank:].norm() / values.norm())


def true_error(matrix, found):
    return rel(found.up.double() @ found.down.double(), matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["flat", "slow", "fast", "geometric"])
@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("cap", [1, 3, 1000])
def test_small_matrices_take_the_best_approximation(shape, kind, cap, dtype):
    matrix = matrix_of(spectrum(kind, min(shape)), shape, dtype=dtype)
    found = truncate(matrix, cap, 1e-9)
    assert found.rank <= min(cap, *shape) and found.down.dtype == found.up.dtype == dtype
    assert found.up.shape == (shape[0], found.rank) and found.down.shape == (found.rank, shape[1])
    assert abs(found.error - best_error(matrix, found.rank)) < ROUNDING[dtype]
    assert abs(true_error(matrix, found) - found.error) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "slack"), [("flat", 1.01), ("slow", 1.01), ("fast", 1.0001), ("geometric", 1.0001)])
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("cap", [1, 20])
def test_large_matrices_come_close_and_say_by_how_much(shape, kind, slack, cap, dtype):
    assert cap + OVERSAMPLING < min(shape) // 4
    matrix = matrix_of(spectrum(kind, min(shape)), shape, dtype=dtype)
    found = truncate(matrix, cap, 1e-7)
    assert found.rank == cap
    assert abs(true_error(matrix, found) - found.error) < ROUNDING[dtype]
    assert true_error(matrix, found) <= slack * best_error(matrix, cap) + ROUNDING[dtype]


def test_matrices_of_many_rows_are_measured_in_pieces():
    matrix = matrix_of(spectrum("geometric", 72), (4200, 72))
    found = truncate(matrix, 1, 1e-3)
    assert 1 + OVERSAMPLING < 72 // 4 and abs(true_error(matrix, found) - found.error) < 1e-12
    assert found.error == pytest.approx(best_error(matrix, 1), rel=1e-6)


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("shape", [(60, 50), (50, 60), LARGE[0]])
def test_the_smallest_rank_that_keeps_the_tolerance(shape, tolerance):
    matrix = matrix_of(spectrum("geometric", min(shape)), shape)
    found = truncate(matrix, 30, tolerance)
    assert found.error <= tolerance < best_error(matrix, found.rank - 1)


@pytest.mark.parametrize("shape", [(60, 50), LARGE[0], LARGE[2]])
def test_the_cap_wins_over_the_tolerance_and_the_error_says_so(shape):
    matrix = matrix_of(spectrum("step", min(shape)), shape)
    found = truncate(matrix, 3, 1e-3)
    assert found.rank == 3 and found.error == pytest.approx(best_error(matrix, 3), rel=1e-6)
    whole = truncate(matrix, 20, 1e-2)
    assert whole.rank == 5 and whole.error == pytest.approx(best_error(matrix, 5), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 8), LARGE[0]])
@pytest.mark.parametrize("rank", [1, 4])
def test_tolerance_zero_keeps_what_is_above_rounding(shape, rank, dtype):
    matrix = matrix_of(torch.ones(rank, dtype=F64), shape).to(dtype)
    assert true_error(matrix, truncate(matrix, 20, 0.0)) < ROUNDING[dtype]
    assert truncate(matrix, 20, 2 * ROUNDING[dtype]).rank == rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 8), LARGE[0]])
def test_zeros_give_rank_one_and_no_error(shape, dtype):
    found = truncate(torch.zeros(shape, dtype=dtype), 20, 1e-3)
    assert found.rank == 1 and found.error == 0.0 and found.down.dtype == dtype
    assert not bool(found.up.any()) and not bool(found.down.any())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("shape", [(6, 8), LARGE[0]])
def test_the_size_of_the_numbers_does_not_matter(shape, scale):
    matrix = matrix_of(spectrum("geometric", min(shape)), shape)
    small, scaled = truncate(matrix, 12, 1e-3), truncate((matrix * scale).float(), 12, 1e-3)
    assert scaled.rank == small.rank and scaled.error == pytest.approx(small.error, rel=1e-3)
    assert rel(scaled.up.double() @ scaled.down.double() / scale, small.up @ small.down) < 1e-5


@pytest.mark.parametrize("shape", [(6, 8), LARGE[0]])
def test_values_close_to_the_largest_float_stay_finite(shape):
    matrix = (3e38 * matrix_of(spectrum("geometric", min(shape)), shape)).float()
    matrix = matrix / matrix.abs().max() * 3e38
    found = truncate(matrix, 12, 1e-3)
    assert abs(true_error(matrix, found) - found.error) < 1e-5
    assert bool(torch.isfinite(found.up).all()) and bool(torch.isfinite(found.down).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 30), LARGE[0]])
def test_the_same_bits_each_time_and_the_input_as_it_was(shape, dtype):
    matrix = randn(3, *shape).to(dtype)
    before, state = matrix.clone(), torch.get_rng_state()
    first = truncate(matrix, 8, 1e-3)
    torch.manual_seed(99)
    second = truncate(matrix, 8, 1e-3)
    torch.set_rng_state(state)
    third = truncate(matrix.T.contiguous().T, 8, 1e-3)
    assert torch.equal(first.down, second.down) and torch.equal(first.up, second.up) and first.error == second.error
    assert torch.equal(matrix, before)
    assert rel(third.down, first.down) < 1e-4 and rel(third.up, first.up) < 1e-4


@pytest.mark.parametrize("shape", [(40, 30), LARGE[0]])
def test_sign_order_and_balance_of_the_factors(shape):
    """Descending terms, each row's largest entry positive, both factors of equal norm."""
    found = truncate(matrix_of(spectrum("geometric", min(shape)), shape), 8, 0.0)
    largest = found.down.gather(1, found.down.abs().argmax(dim=1, keepdim=True))
    assert bool((largest > 0).all())
    rows, columns = found.down.norm(dim=1), found.up.norm(dim=0)
    assert torch.allclose(rows, columns, rtol=1e-6) and bool((rows[:-1] >= rows[1:]).all())
    negated = truncate(-matrix_of(spectrum("geometric", min(shape)), shape), 8, 0.0)
    assert rel(negated.down, found.down) < 1e-6 and rel(-negated.up, found.up) < 1e-6
