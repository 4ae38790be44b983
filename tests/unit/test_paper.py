"""`paper` mode is the published formula in the file's own coordinates."""

import pytest
import torch
from helpers import F64, LAYER, calibrated, conflicting_tasks, factors_of, linear64, rel, task_tokens

from ssr_core import PaperMerge, merge


def published(factors, tokens, ridge):
    """R = (Q/N)(G/N + lambda I)^-1, z = down x, every token counted once."""
    down, up = torch.cat([d for d, _ in factors]), torch.cat([u for _, u in factors], dim=1)
    count = sum(len(x) for x in tokens)
    g = torch.zeros(len(down), len(down), dtype=F64)
    q = torch.zeros_like(g)
    at = 0
    for (own, _), x in zip(factors, tokens, strict=True):
        z = x @ down.T
        g += z.T @ z
        q[at : at + len(own)] += (x @ own.T).T @ z
        at += len(own)
    return up @ (q / count) @ torch.linalg.inv(g / count + ridge * torch.eye(len(g), dtype=F64)) @ down


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("counts", [(40, 40), (15, 60, 33)])
def test_equals_the_published_formula(counts, ridge):
    tasks = conflicting_tasks(len(counts), 9, 14, 4, seed=5, alpha=3.0)
    tokens = [task_tokens(k, count, 14) for k, count in enumerate(counts)]
    result = merge(tasks, PaperMerge(ridge=ridge), calibrated(linear64(14, 9), tasks, [[x] for x in tokens]))
    assert rel(result.layers[LAYER].delta(), published(factors_of(tasks), tokens, ridge)) < 1e-9


def test_rank_above_the_number_of_tokens():
    tasks = conflicting_tasks(2, 6, 10, 4, seed=6)
    tokens = [task_tokens(k, 2, 10) for k in range(2)]
    result = merge(tasks, PaperMerge(ridge=1e-3), calibrated(linear64(10, 6), tasks, [[x] for x in tokens]))
    assert rel(result.layers[LAYER].delta(), published(factors_of(tasks), tokens, 1e-3)) < 1e-8


def test_ranks_above_the_number_of_inputs_use_the_file_s_coordinates():
    tasks = conflicting_tasks(2, 6, 4, 7, seed=7)
    tokens = [task_tokens(k, 30, 4) for k in range(2)]
    result = merge(tasks, PaperMerge(ridge=1e-2), calibrated(linear64(4, 6), tasks, [[x] for x in tokens]))
    assert rel(result.layers[LAYER].delta(), published(factors_of(tasks), tokens, 1e-2)) < 1e-8


def test_a_layer_that_never_ran_is_the_plain_sum():
    tasks = conflicting_tasks(2, 6, 8, 3, seed=8)
    calibration = calibrated(linear64(8, 6), tasks, [[task_tokens(k, 20, 8)] for k in range(2)])
    blind = type(calibration)(calibration.tasks, {}, {})
    result = merge(tasks, PaperMerge(), blind)
    assert rel(result.layers[LAYER].delta(), sum(up @ down for down, up in factors_of(tasks))) < 1e-12
    assert result.report.layers[0].status == "anchored"
