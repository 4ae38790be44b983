"""Tokens with NaN or infinity are left out, counted, and change nothing else."""

import math

import pytest
import torch
from helpers import LAYER, calibrated, conflicting_tasks, linear64, randn, rel, task_tokens
from torch import nn

from ssr_core import GramStats, SolveError, SSRMerge, build_stacks, merge
from ssr_core.finite import all_finite

IN, OUT = 10, 7
TASKS = conflicting_tasks(2, OUT, IN, 3, seed=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_equals_calibration_without_those_tokens(bad):
    tokens = [task_tokens(k, 40, IN) for k in range(2)]
    spoiled = [x.clone() for x in tokens]
    spoiled[0][3, 2] = bad
    spoiled[0][17] = bad
    keep = torch.ones(40, dtype=torch.bool)
    keep[[3, 17]] = False
    dirty = calibrated(linear64(IN, OUT), TASKS, [[x] for x in spoiled])
    clean = calibrated(linear64(IN, OUT), TASKS, [[tokens[0][keep]], [tokens[1]]])
    assert dirty.stats[LAYER].nonfinite.tolist() == [2, 0]
    assert dirty.stats[LAYER].tokens.tolist() == clean.stats[LAYER].tokens.tolist() == [38.0, 40.0]
    assert rel(dirty.stats[LAYER].gram, clean.stats[LAYER].gram) < 1e-14
    a, b = merge(TASKS, SSRMerge(), dirty), merge(TASKS, SSRMerge(), clean)
    assert rel(a.layers[LAYER].delta(), b.layers[LAYER].delta()) < 1e-12
    assert a.report.layers[0].nonfinite == 2 and b.report.layers[0].nonfinite == 0


def test_counted_over_several_passes_and_named_in_a_warning():
    tokens = [task_tokens(k, 40, IN) for k in range(2)]
    tokens[1][::10] = math.nan
    calibration = calibrated(linear64(IN, OUT), TASKS, [x.split(7) for x in tokens])
    assert calibration.stats[LAYER].nonfinite.tolist() == [0, 4]
    warnings = merge(TASKS, SSRMerge(), calibration).report.warnings
    assert any(w.startswith("4 tokens were NaN or infinite") and "layer" in w for w in warnings)


def test_convolution_leaves_out_the_positions_that_read_a_bad_pixel():
    conv = nn.Conv2d(2, OUT, 3, padding=1).double().requires_grad_(False)
    tasks = conflicting_tasks(2, OUT, 18, 3, seed=2, kernel=(3, 3))
    x = randn(3, 1, 2, 6, 6)
    x[0, 1, 2, 2] = math.nan
    calibration = calibrated(conv, tasks, [[x], [randn(4, 1, 2, 6, 6)]])
    assert calibration.stats[LAYER].nonfinite.tolist() == [9, 0]
    assert calibration.stats[LAYER].tokens.tolist() == [27.0, 36.0]


def test_all_tokens_bad_leaves_the_anchor():
    bad = torch.full((5, IN), math.nan, dtype=torch.float64)
    calibration = calibrated(linear64(IN, OUT), TASKS, [[bad], [bad]])
    result = merge(TASKS, SSRMerge(), calibration)
    total = sum(t.adapter.layers[LAYER].delta() for t in TASKS)
    assert rel(result.layers[LAYER].delta(), total) < 1e-12
    assert result.report.layers[0].status == "anchored" and result.report.layers[0].nonfinite == 10


def test_float32_activations_that_overflow_in_the_gram_are_an_error_that_names_the_layer():
    tasks = conflicting_tasks(2, OUT, IN, 3, seed=1, dtype=torch.float32)
    tokens = [(task_tokens(k, 40, IN) * 1e20).float() for k in range(2)]
    calibration = calibrated(nn.Linear(IN, OUT).requires_grad_(False), tasks, [[x] for x in tokens])
    with pytest.raises(SolveError, match="layer"):
        merge(tasks, SSRMerge(), calibration)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_statistics_that_are_not_finite_are_an_error_that_names_the_layer(bad):
    stack = build_stacks(TASKS)[0]
    gram = torch.eye(6, dtype=torch.float64).repeat(2, 1, 1)
    gram[1, 2, 3] = gram[1, 3, 2] = bad
    stats = GramStats(gram, torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), (3, 3))
    with pytest.raises(SolveError) as caught:
        SSRMerge().merge([stack], [stats], torch.device("cpu"))
    assert caught.value.layer == "layer"


def test_too_few_tokens_without_ridge_name_the_layer_and_the_knob():
    calibration = calibrated(linear64(IN, OUT), TASKS, [[task_tokens(k, 1, IN)] for k in range(2)])
    with pytest.raises(SolveError, match=r"ridge.*2 tokens for rank 6") as caught:
        merge(TASKS, SSRMerge(ridge=0.0), calibration)
    assert caught.value.layer == "layer" and "ridge" in caught.value.remedy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_anywhere_is_found(dtype, bad):
    largest = torch.finfo(dtype).max
    for place in (0, 17, 34):
        values = torch.linspace(-1, 1, 35).to(dtype)
        values[1], values[2] = largest, -largest
        assert all_finite(values.view(5, 7)) and all_finite(values.view(5, 7).T)
        values[place] = bad
        assert not all_finite(values.view(5, 7)) and not all_finite(values.view(5, 7).T)
    assert all_finite(torch.zeros(0, 4, dtype=dtype))
