"""Diagnostics from Grams equal the same numbers from explicit signals Z."""

import json
import math

import pytest
import torch
from helpers import (
    F64,
    LAYER,
    calibrated,
    conflicting_tasks,
    deltas_of,
    linear64,
    lora,
    output_error,
    randn,
    rel,
    task,
    task_tokens,
)

from ssr_core import GainsMerge, LoRALayer, SampleOptions, SSRMerge, Target, merge
from ssr_core.diagnostics import block_energies, crosstalk, routing_error, scaling_error, separability
from ssr_core.report import LayerReport, MergeReport
from ssr_core.router import anchor_router, block_slices, gains, guide, pooled
from ssr_core.triangles import per_token

RANKS = (2, 3, 1)
R = sum(RANKS)
Z = [randn(k, R, 30 + k) + k for k in range(3)]
GRAMS = torch.stack([z @ z.T for z in Z])
UPS = randn(9, 5, R)
ROUTER = randn(10, R, R)
SLICES = [slice(0, 2), slice(2, 5), slice(5, 6)]


def test_routing_error_against_explicit_signals():
    one = routing_error(ROUTER, GRAMS, RANKS, UPS.T @ UPS)
    for k, (z, rows) in enumerate(zip(Z, SLICES, strict=True)):
        alone = UPS[:, rows] @ z[rows]
        assert float(one.error[k]) == pytest.approx(float((UPS @ ROUTER @ z - alone).norm() ** 2), rel=1e-10)
        assert float(one.energy[k]) == pytest.approx(float(alone.norm() ** 2), rel=1e-10)


def test_crosstalk_against_explicit_signals():
    matrix = crosstalk(ROUTER, GRAMS, RANKS, UPS.T @ UPS)
    for i, z in enumerate(Z):
        routed = ROUTER @ z
        for j, rows in enumerate(SLICES):
            assert float(matrix[i, j]) == pytest.approx(float((UPS[:, rows] @ routed[rows]).norm() ** 2), rel=1e-10)


def test_the_perfect_router_of_separate_signals_has_no_error_and_no_crosstalk():
    z = [torch.zeros(R, 20, dtype=F64) for _ in RANKS]
    for k, rows in enumerate(SLICES):
        z[k][rows] = randn(k, RANKS[k], 20)
    grams = torch.stack([one @ one.T for one in z])
    eye = torch.eye(R, dtype=F64)
    one = routing_error(eye, grams, RANKS, UPS.T @ UPS)
    assert float(one.error.sum()) < 1e-12 * float(one.energy.sum())
    matrix = crosstalk(eye, grams, RANKS, UPS.T @ UPS)
    assert float((matrix - torch.diag(matrix.diagonal())).abs().max()) < 1e-12 and float(matrix.diagonal().min()) > 0.1


def test_separability():
    a, b = torch.diag(torch.tensor([1.0, 2.0, 0, 0])), torch.diag(torch.tensor([0, 0, 3.0, 1.0]))
    c = torch.diag(torch.tensor([1.0, 0, 0, 0]))
    matrix = separability(torch.stack([a, b, c, 5 * a]).double())
    assert torch.allclose(matrix.diagonal(), torch.zeros(4, dtype=F64), atol=1e-12)
    assert float(matrix[0, 1]) == 1.0 and float(matrix[0, 3]) == pytest.approx(0.0, abs=1e-12)
    assert float(matrix[0, 2]) == pytest.approx(1 - 1 / 5**0.5, rel=1e-12)
    assert torch.allclose(matrix, matrix.T)
    assert separability(torch.zeros(2, 3, 3, dtype=F64)).tolist() == [[1.0, 1.0]] * 2  # and no NaN


def test_pooling_by_hand():
    tokens = torch.tensor([2.0, 0.0, 8.0], dtype=F64)
    sums = torch.stack([torch.eye(2, dtype=F64) * v for v in (4.0, 0.0, 16.0)])
    grams = per_token(sums, tokens, torch.device("cpu"))
    assert float(sums[2, 0, 0]) == 16.0  # a copy
    assert pooled(grams, tokens, True).diagonal(dim1=1, dim2=2)[:, 0].tolist() == [2.0, 0.0, 2.0]
    assert pooled(grams, tokens, False).diagonal(dim1=1, dim2=2)[:, 0].tolist() == pytest.approx([0.4, 0.0, 1.6])


def test_guide_and_gains_by_hand():
    q = guide(GRAMS, RANKS)
    for k, rows in enumerate(SLICES):
        assert torch.equal(q[rows], Z[k][rows] @ Z[k].T) or rel(q[rows], Z[k][rows] @ Z[k].T) < 1e-12
    for k, rows in enumerate(SLICES):
        own, everywhere = Z[k][rows].norm() ** 2, sum(z[rows].norm() ** 2 for z in Z)
        assert float(gains(GRAMS, RANKS)[k]) == pytest.approx(float(own / everywhere), rel=1e-12)
    assert block_slices(RANKS) == SLICES
    unseen = torch.zeros_like(GRAMS)
    assert torch.equal(anchor_router("gains", unseen, RANKS), torch.eye(R, dtype=F64))


def test_routers_that_only_scale_the_loras_agree_with_the_general_formula():
    up_gram, wide = UPS.T @ UPS, torch.cat([GRAMS, randn(12, 3, R, 2)], dim=2)
    wide = torch.cat([wide, torch.cat([wide[:, :, R:].transpose(1, 2), torch.ones(3, 2, 2, dtype=F64)], 2)], dim=1)
    energies = block_energies(wide, RANKS, up_gram)
    assert rel(energies.diagonal(dim1=1, dim2=2), crosstalk(torch.eye(R, dtype=F64), GRAMS, RANKS, up_gram)) < 1e-12
    factors = torch.tensor([0.3, -1.2, 2.0], dtype=F64)
    full = routing_error(torch.diag(factors.repeat_interleave(torch.tensor(RANKS))), GRAMS, RANKS, up_gram)
    short = scaling_error(energies, factors)
    assert rel(short.error, full.error) < 1e-12 and rel(short.energy, full.energy) < 1e-12


TASKS = conflicting_tasks(3, 7, 10, 3, seed=2)
TOKENS = [task_tokens(k, 40 + 20 * k, 10) for k in range(3)]


def report_of(method):
    calibration = calibrated(linear64(10, 7), TASKS, [[x] for x in TOKENS])
    result = merge(TASKS, method, calibration)
    return result, result.report


@pytest.mark.parametrize("method", [SSRMerge(ridge=0.05), SSRMerge(ridge=1.0, anchor="zero"), GainsMerge()])
def test_reported_errors_are_those_of_the_real_outputs(method):
    result, report = report_of(method)
    deltas = deltas_of(TASKS)
    errors = report.layers[0].errors
    assert errors["result"] == pytest.approx(output_error(result.layers[LAYER].delta(), deltas, TOKENS), rel=1e-8)
    assert errors["sum"] == pytest.approx(output_error(sum(deltas), deltas, TOKENS), rel=1e-8)
    assert errors["average"] == pytest.approx(output_error(sum(deltas) / 3, deltas, TOKENS), rel=1e-8)
    gained = report_of(GainsMerge())[0].layers[LAYER].delta()
    assert errors["gains"] == pytest.approx(output_error(gained, deltas, TOKENS), rel=1e-8)
    assert report.reconstruction_error() == pytest.approx(errors["result"])


def test_reported_crosstalk_of_the_sum_is_the_energy_of_each_lora_on_each_prompt():
    matrix = torch.tensor(report_of(SSRMerge())[1].layers[0].crosstalk["sum"], dtype=F64)
    for i, x in enumerate(TOKENS):
        for j, delta in enumerate(deltas_of(TASKS)):
            assert float(matrix[i, j]) == pytest.approx(float((x @ delta.T).norm() ** 2) / len(x), rel=1e-8)


def test_crosstalk_over_layers_is_scaled_by_layer_and_normalised_by_row():
    def layer(name, tasks, matrix):
        return LayerReport(Target(name), "routed", tasks, 2, crosstalk={"sum": matrix, "result": matrix})

    layers = (
        layer("a", (0, 1), [[2.0, 1.0], [0.0, 2.0]]),
        layer("b", (0, 1), [[100.0, 0.0], [50.0, 300.0]]),
        layer("c", (0,), [[9.0]]),
    )
    report = MergeReport("m", ("x", "y"), layers, ())
    # a / 2 + b / 200, then each row over its largest value
    expected = [[1.5 / 1.5, 0.5 / 1.5], [0.25 / 2.5, 2.5 / 2.5]]
    assert torch.allclose(torch.tensor(report.crosstalk("sum")), torch.tensor(expected))


def test_reconstruction_error_is_the_root_mean_square_over_layers():
    layers = [LayerReport(Target(n), "routed", (0, 1), 2, errors={"result": e}) for n, e in (("a", 0.3), ("b", 0.4))]
    passed = LayerReport(Target("c"), "passed_through", (0,), 2)
    report = MergeReport("m", ("x", "y"), (*layers, passed), ())
    assert report.reconstruction_error() == pytest.approx((0.25 / 2) ** 0.5)


def test_a_lora_and_its_half_precision_copy_have_errors_that_are_numbers():
    """Where LoRAs are nearly the same their difference drowns in rounding, and must not come out as NaN."""
    for seed in range(6):
        one = lora(seed, 40, 48, 8, dtype=torch.float32)
        copy = LoRALayer(one.down.half().float(), one.up.half().float(), one.alpha, one.kernel)
        tasks = [task("one", one), task("copy", copy)]
        calibration = calibrated(
            torch.nn.Linear(48, 40, bias=False),
            tasks,
            [[randn(seed + k, 60, 48).float()] for k in range(2)],
            sample=SampleOptions(64),
        )
        found = merge(tasks, SSRMerge(), calibration).report
        assert all(math.isfinite(value) for value in found.layers[0].measures.values()), seed
        assert "NaN" not in json.dumps(found.to_json())
