"""Second moments of layer inputs against dense float64 references, without any hook."""

import pytest
import torch
from helpers import F64, SKETCH, TOKENS, decaying, moments_of, randn, rel

from ssr_core import CalibrationError
from ssr_core.moments import MomentOptions


def test_exact_moments_are_the_dense_product():
    x = randn(0, 2, 30, 7)
    found = moments_of(x)
    rows = x.flatten(0, 1)
    assert rel(found.total, rows.T @ rows) < 1e-12
    assert found.trace == pytest.approx(float((rows**2).sum())) and found.tokens == 60
    probe = randn(5, 3, 7)
    assert rel(found.gram_of(probe), (probe @ rows.T) @ (probe @ rows.T).T) < 1e-12


def test_means_are_taken_over_the_weighted_tokens_of_each_sample():
    x, weight = randn(1, 3, 20, 5), torch.rand(3, 20, generator=torch.Generator().manual_seed(1), dtype=F64)
    weight[2] = 0.0  # a sample with no token that counts
    found = moments_of(x, MomentOptions("means"), weight)
    means = (x * weight[..., None]).sum(1)[:2] / weight.sum(1)[:2, None]
    assert rel(found.total, means.T @ means) < 1e-12 and found.tokens == 2


@pytest.mark.parametrize("options", [TOKENS, SKETCH, MomentOptions("means")], ids=["exact", "sketch", "means"])
def test_moments_are_additive(options):
    first, second = randn(2, 4, 16, 40), randn(3, 3, 16, 40)
    whole = moments_of(torch.cat([first, second]), options)
    parts = moments_of(first, options) + moments_of(second, options)
    assert rel(parts.total, whole.total) < 1e-12
    assert parts.trace == pytest.approx(whole.trace, rel=1e-12) and parts.tokens == whole.tokens


def test_moments_of_different_size_do_not_add_up():
    with pytest.raises(CalibrationError, match="do not add up"):
        moments_of(randn(0, 1, 9, 40)) + moments_of(randn(0, 1, 9, 40), SKETCH)


@pytest.mark.parametrize("rate", [1.0, 0.95, 0.6])
def test_the_sketch_stays_below_the_truth_by_no_more_than_its_bound(rate):
    x = decaying(7, 300, 60, rate)
    exact, sketch = moments_of(x), moments_of(x, SKETCH)
    values, vectors, rest = sketch.spectrum
    known = (vectors * values) @ vectors.T
    gap = exact.total - known
    scale = float(exact.total.trace())
    assert float(torch.linalg.eigvalsh(gap).min()) > -1e-9 * scale  # C' <= C
    assert float(gap.trace()) == pytest.approx(rest, rel=1e-6, abs=1e-9 * scale)
    outside = torch.linalg.qr(torch.eye(60, dtype=F64) - vectors @ vectors.T)[0][:, : 60 - len(values)]
    assert float((outside.T @ exact.total @ outside).trace()) <= rest * (1 + 1e-9)


def test_the_sketch_is_exact_where_its_rank_suffices():
    x = randn(8, 1, 100, 10) @ randn(9, 10, 60)
    exact, sketch = moments_of(x), moments_of(x, SKETCH)
    values, vectors, rest = sketch.spectrum
    assert len(values) == 10 and rest < 1e-9 * exact.trace
    assert rel((vectors * values) @ vectors.T, exact.total) < 1e-9
    probe = randn(10, 4, 60)
    assert rel(sketch.gram_of(probe), exact.gram_of(probe)) < 1e-9


def test_float32_sketch_of_few_samples_finds_their_range():
    x = (randn(11, 1, 9, 3000) * 30).float()
    found = moments_of(x, MomentOptions("tokens", exact_limit=1024, sketch=64))
    _, vectors, rest = found.spectrum
    rows = x[0].double()
    left = rows - (rows @ vectors) @ vectors.T
    assert vectors.shape[1] == 9 and rest < 1e-4 * found.trace
    assert float(left.norm() / rows.norm()) < 1e-3


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_narrowest_layers_have_a_sketch_of_one_column(width):
    options = MomentOptions("tokens", exact_limit=0)
    assert options.columns(width) == 1
    x = randn(12, 1, 9, width)
    found = moments_of(x, options)
    values, vectors, rest = found.spectrum
    assert float(values.sum()) + rest == pytest.approx(float(x.square().sum())) and vectors.shape == (width, 1)
    assert width > 1 or found.exact
