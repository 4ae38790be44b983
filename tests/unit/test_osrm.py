"""The analytic down of OSRM against dense float64 references."""

from statistics import median

import pytest
import torch
from helpers import F64, LAYER, SKETCH, decaying, moments_of, randn, rel, rng

from ssr_core import IncompatibleError, Target
from ssr_core.input_hooks import InputLayer
from ssr_core.moments import MomentOptions
from ssr_core.osrm import analytic_down, osrm_init, pooled, top_directions
from ssr_core.osrm_report import init_markdown

EYE = torch.eye


def orthonormal(rows):
    return rel(rows @ rows.T, EYE(len(rows), dtype=F64)) < 1e-12


def test_down_is_the_dense_svds_smallest_right_singular_vectors():
    x = randn(1, 1, 200, 20) * torch.linspace(1, 3, 20, dtype=F64)
    down = analytic_down(moments_of(x), 4, rng(0))
    _, _, vh = torch.linalg.svd(x[0], full_matrices=True)
    smallest = vh[-4:]
    assert orthonormal(down)
    assert rel(down.T @ down, smallest.T @ smallest) < 1e-9
    assert float((down @ vh[:16].T).abs().max()) < 1e-9  # orthogonal to all the others


def test_down_avoids_every_direction_of_few_inputs():
    x = randn(2, 1, 6, 20)
    down = analytic_down(moments_of(x), 4, rng(0))
    _, _, vh = torch.linalg.svd(x[0], full_matrices=False)
    assert orthonormal(down) and float((down @ vh.T).abs().max()) < 1e-12
    again, other = analytic_down(moments_of(x), 4, rng(0)), analytic_down(moments_of(x), 4, rng(1))
    assert torch.equal(down, again) and rel(other, down) > 0.1  # any basis of the rest will do, the seed chooses


def test_energy_says_which_directions_count_as_the_others():
    x = decaying(3, 500, 30, 0.7)
    moments = moments_of(x)
    _, s, vh = torch.linalg.svd(x[0], full_matrices=False)
    count = int(((s**2).cumsum(0) / (s**2).sum() < 0.9).sum()) + 1
    top = top_directions(moments, 0.9)
    assert top.shape[1] == count and 0 < count < 20
    assert rel(top @ top.T, vh[:count].T @ vh[:count]) < 1e-9
    down = analytic_down(moments, 5, rng(0), energy=0.9)
    assert orthonormal(down) and float((down @ vh[:count].T).abs().max()) < 1e-9


@pytest.mark.parametrize("rate", [1.0, 0.95, 0.6])
def test_down_of_a_sketch_is_within_its_bound_of_the_exact_one(rate):
    x = decaying(4, 300, 60, rate)
    exact, sketch = moments_of(x), moments_of(x, SKETCH)
    best, down = analytic_down(exact, 4, rng(0)), analytic_down(sketch, 4, rng(0))
    seen, least = float(exact.gram_of(down).trace()), float(exact.gram_of(best).trace())
    assert orthonormal(down)
    assert least * (1 - 1e-9) <= seen <= least + sketch.spectrum.rest
    expected = 4 / (60 - len(sketch.spectrum.values)) * sketch.spectrum.rest  # of a random basis of the complement
    assert seen < 3 * expected + 1e-9 * exact.trace


def test_pooled_tasks_count_alike_however_long_they_are():
    long, short = randn(5, 1, 400, 8), randn(6, 1, 10, 8)
    expected = long[0].T @ long[0] / 400 + short[0].T @ short[0] / 10
    assert rel(pooled([moments_of(long), moments_of(short)]).total, expected) < 1e-12


def test_init_writes_zero_updates_of_orthonormal_rows_and_reports_what_they_see():
    layers = [InputLayer(Target("a"), 20, 7), InputLayer(Target("b"), 3, 7), InputLayer(Target("c"), 20, 7)]
    x = randn(7, 1, 300, 20) * torch.linspace(1, 3, 20, dtype=F64)
    result = osrm_init(layers, [{Target("a"): moments_of(x), Target("b"): moments_of(randn(8, 1, 9, 3))}], 4, dtype=F64)
    assert set(result.layers) == {Target("a")}
    assert "fewer inputs" in result.skipped[Target("b")] and "never ran" in result.skipped[Target("c")]
    one = result.layers[Target("a")]
    assert orthonormal(one.down) and not one.up.any() and one.up.shape == (7, 4)
    truth = float(((x[0] @ one.down.T) ** 2).sum() / (x[0] ** 2).sum() / (4 / 20))
    (report,) = result.reports
    assert report.seen == pytest.approx(truth, rel=1e-9) == report.bound == report.likely
    assert "1 layer is not in the file (they never ran)" in init_markdown(result, 4, ["x"])
    assert "Warning" not in init_markdown(result, 4, ["x"], "tokens") + init_markdown(result, 4, ["x"], "means")
    few = osrm_init(layers[:1], [{Target("a"): moments_of(x, MomentOptions("means"))}], 4)
    text = init_markdown(few, 4, ["x"], "means")
    assert "few samples, 1 in a:" in text and "set features to tokens" in text


def test_the_report_warns_where_the_others_leave_no_room():
    names = [Target("full"), Target("free")]
    moments = {names[0]: moments_of(randn(12, 1, 90, 6)), names[1]: moments_of(decaying(13, 90, 40, 0.5))}
    layers = [InputLayer(name, moments[name].width, 7) for name in names]
    result = osrm_init(layers, [moments], 6)
    full, free = sorted(result.reports, key=lambda one: -one.seen)
    assert full.seen == pytest.approx(1) and free.seen < 0.01  # six rows of six inputs avoid nothing
    text = init_markdown(result, 6, ["x"], "tokens")
    assert "Warning: in 1 layer the others' inputs leave little room for rank 6" in text and "most in full." in text
    assert "little room" not in init_markdown(osrm_init(layers[1:], [moments], 6), 6, ["x"], "tokens")


def test_starts_with_another_salt_are_other_bases():
    layer, moments = InputLayer(LAYER, 40, 7), {LAYER: moments_of(randn(9, 1, 5, 40))}
    one, two, again = (osrm_init([layer], [moments], 4, salt=salt).layers[LAYER].down for salt in ("x", "y", "x"))
    assert torch.equal(one, again) and float((one @ two.T).norm()) < 1.5  # 2 if they were the same space


def test_more_rows_than_inputs_are_refused():
    with pytest.raises(IncompatibleError, match="orthonormal"):
        analytic_down(moments_of(randn(0, 1, 9, 3)), 4, rng(0))


def test_the_report_bounds_what_a_sketched_layer_may_see():
    x, ratios = decaying(10, 300, 60, 0.95), []
    for seed in range(8):
        result = osrm_init([InputLayer(LAYER, 60, 7)], [{LAYER: moments_of(x, SKETCH)}], 4, seed=seed, dtype=F64)
        truth = float((x[0] @ result.layers[LAYER].down.T).square().sum() / x.square().sum()) * 60 / 4
        (report,) = result.reports
        assert report.seen < 1e-6 < truth <= report.bound and report.seen < report.likely < report.bound
        ratios.append(report.likely / truth)
    assert 0.7 < median(ratios) < 1.4 and report.bound > 5 * truth
    assert "an estimate, as wide layers are sketched" in init_markdown(result, 4, ["x"])


def test_tokens_that_are_not_finite_are_reported():
    names = [Target(name) for name in ("a", "b", "c")]
    x = decaying(11, 50, 20, 0.8)
    x[0, :3, 1] = torch.nan
    shared, bad = moments_of(x), moments_of(torch.full_like(x, torch.inf))
    result = osrm_init(
        [InputLayer(name, 20, 7) for name in names], [dict(zip(names, (shared, shared, bad), strict=True))], 4
    )
    assert set(result.layers) == set(names[:2]) and sum(result.nonfinite.values()) == 53
    assert result.skipped == {names[2]: "all their inputs were NaN or infinite"}
    assert "Warning: 53 tokens were NaN or infinite and were left out, most of them in c." in init_markdown(
        result, 4, ["x"]
    )
