"""Readers from sampled inputs: the dual ridge regression equals the primal one, and its scale does not matter."""

import math

import pytest
import torch
from helpers import F64, conflicting_tasks, randn, rel, task_tokens

from ssr_core import CalibrationError, ScoutOptions, SolveError, build_stacks
from ssr_core.readers import InputRegression, row_space
from ssr_core.sampling import InputSample

IN, OUT, RANK, K = 14, 9, 2, 3
CPU = torch.device("cpu")
TASKS = conflicting_tasks(K, OUT, IN, RANK, seed=3)
STACK = build_stacks(TASKS)[0]
SAMPLES = [InputSample(task_tokens(k, 9 + k, IN), 0.5 + randn(k, 9 + k).abs()) for k in range(K)]


def weighted(samples):
    return torch.cat([s.rows * (s.weights / s.weights.sum()).sqrt()[:, None] for s in samples])


def primal(basis, samples, ridge):
    """T^T X (X^T X + mu I)^-1: the other form of the same regression."""
    x = weighted(samples)
    wanted, token, row = torch.zeros(len(x), len(basis), dtype=F64), 0, 0
    for sample in samples:
        size = len(sample.rows)
        wanted[token : token + size, row : row + RANK] = x[token : token + size] @ basis[row : row + RANK].T
        token, row = token + size, row + RANK
    mu = ridge * x.square().sum() / len(x)
    return wanted.T @ x @ torch.linalg.inv(x.T @ x + mu * torch.eye(x.shape[1], dtype=F64))


def projector(rows):
    span = row_space(rows, 1e-9)
    return span.T @ span


@pytest.mark.parametrize("ridge", [1e-4, 0.1, 3.0])
def test_the_predictor_equals_the_primal_solution(ridge):
    regression = InputRegression(SAMPLES, ridge, CPU, "layer")
    assert rel(regression.predictor(STACK.basis, STACK.basis_ranks), primal(STACK.basis, SAMPLES, ridge)) < 1e-9


def test_readers_and_own_rows_span_what_predictor_and_own_rows_span():
    readers = InputRegression(SAMPLES, 0.1, CPU, "layer").readers(STACK.basis, STACK.basis_ranks)
    eye = torch.eye(len(readers), dtype=F64)
    assert rel(readers @ readers.T, eye) < 1e-12 and float((readers @ STACK.basis.T).abs().max()) < 1e-12
    expected = projector(torch.cat([STACK.basis, primal(STACK.basis, SAMPLES, 0.1)]))
    assert rel(projector(torch.cat([STACK.basis, readers])), expected) < 1e-8


@pytest.mark.parametrize("limit", [1, 3])
def test_a_limit_keeps_the_readers_through_which_most_of_the_prediction_flows(limit):
    """No rows of this number can carry more (Eckart and Young)."""
    readers = InputRegression(SAMPLES, 0.1, CPU, "layer").readers(STACK.basis, STACK.basis_ranks, limit)
    x, predictor = weighted(SAMPLES), primal(STACK.basis, SAMPLES, 0.1)
    outside = predictor @ (torch.eye(IN, dtype=F64) - projector(STACK.basis))
    flow = x @ outside.T
    assert len(readers) == limit
    seen = torch.linalg.qr(x @ readers.T)[0]
    left = (flow - seen @ (seen.T @ flow)).norm() ** 2
    assert float(left) == pytest.approx(float(torch.linalg.svdvals(flow)[limit:].square().sum()), rel=1e-7)


def test_nothing_outside_gives_no_readers():
    own = projector(STACK.basis)
    inside = [InputSample(s.rows @ own, s.weights) for s in SAMPLES]
    assert InputRegression(inside, 0.1, CPU, "layer").readers(STACK.basis, STACK.basis_ranks) is None
    blank = [InputSample(0 * s.rows, s.weights) for s in SAMPLES]
    assert InputRegression(blank, 0.1, CPU, "layer").readers(STACK.basis, STACK.basis_ranks) is None
    assert InputRegression(SAMPLES, 0.1, CPU, "layer").readers(STACK.basis, STACK.basis_ranks, 0) is None


def test_the_scale_of_the_inputs_does_not_matter():
    large = [InputSample(1e4 * s.rows, 3 * s.weights) for s in SAMPLES]
    one, other = (
        InputRegression(s, 0.1, CPU, "layer").readers(STACK.basis, STACK.basis_ranks) for s in (SAMPLES, large)
    )
    assert rel(projector(other), projector(one)) < 1e-9


def test_a_ridge_lost_in_rounding_names_the_layer():
    few = [InputSample(randn(1, 1, IN).repeat(9, 1), torch.ones(9, dtype=F64)) for _ in range(K)]
    with pytest.raises(SolveError) as caught:
        InputRegression(few, 1e-300, CPU, "blocks.0.qkv")
    assert caught.value.layer == "blocks.0.qkv" and "ridge" in caught.value.remedy


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"ridge": 0.0}, {"ridge": math.nan}, {"limit": -1}])
def test_options_that_leave_nothing_to_solve(bad):
    with pytest.raises(CalibrationError, match="no readers"):
        ScoutOptions(**bad)
