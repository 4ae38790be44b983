"""SSR through real hooks equals the offline solutions on concatenated features."""

import pytest
import torch
from helpers import (
    LAYER,
    calibrated,
    conflicting_tasks,
    factors_of,
    least_squares_delta,
    patches,
    randn,
    reference_delta,
    rel,
    task_tokens,
)
from torch import nn

from ssr_core import ANCHORS, SSRMerge, build_stacks, merge

MODULES = {
    "linear": lambda: nn.Linear(12, 10),
    "conv1d": lambda: nn.Conv1d(3, 6, 5, padding=2, stride=2),
    "conv2d": lambda: nn.Conv2d(3, 7, 3, padding=1, dilation=1),
    "conv3d": lambda: nn.Conv3d(2, 5, (1, 3, 3), padding=(0, 1, 1)),
}
SPACE = {"linear": (6,), "conv1d": (9,), "conv2d": (4, 5), "conv3d": (2, 3, 4)}
BATCHES = (10, 7, 12)  # unequal on purpose: balance must matter


def problem(kind):
    """Module, tasks, inputs of each task (B, ...) and the same as tokens (N, in)."""
    torch.manual_seed(0)
    module = MODULES[kind]().double().requires_grad_(False)
    kernel = getattr(module, "kernel_size", ())
    rows, columns = module.weight.shape[0], module.weight[0].numel()
    tasks = conflicting_tasks(3, rows, columns, 3, seed=2, kernel=kernel, alpha=2.0)
    inputs, tokens = [], []
    for k, batch in enumerate(BATCHES):
        if kind == "linear":
            x = task_tokens(k, batch * 6, 12).reshape(batch, 6, 12)
            tokens.append(x.reshape(-1, 12))
        else:
            channels = module.weight.shape[1]
            offset = randn(70 + k, 1, channels, *(1 for _ in kernel))
            x = randn(50 + k, batch, channels, *SPACE[kind]) + 2 * offset
            tokens.append(patches(x, module))
        inputs.append(x)
    return module, tasks, inputs, tokens


SPLITS = {
    "one pass": lambda x: [x],
    "one sample a pass": lambda x: list(x.split(1)),
    "uneven": lambda x: [x[:1], x[1:6], x[6:]],
    "reversed": lambda x: list(reversed(x.split(3))),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", MODULES)
def test_without_ridge_equals_lstsq_for_any_split(kind, split):
    module, tasks, inputs, tokens = problem(kind)
    calibration = calibrated(module, tasks, [SPLITS[split](x) for x in inputs])
    result = merge(tasks, SSRMerge(ridge=0.0), calibration)
    expected = least_squares_delta(factors_of(tasks), tokens, balance=True)
    assert rel(result.layers[LAYER].delta(), expected) < 1e-6
    assert result.report.layers[0].tokens == tuple(float(len(x)) for x in tokens)


@pytest.mark.parametrize("kind", MODULES)
def test_without_balance_every_token_weighs_the_same(kind):
    module, tasks, inputs, tokens = problem(kind)
    calibration = calibrated(module, tasks, [[x] for x in inputs])
    result = merge(tasks, SSRMerge(ridge=0.0, balance=False), calibration)
    delta = result.layers[LAYER].delta()
    assert rel(delta, least_squares_delta(factors_of(tasks), tokens, balance=False)) < 1e-6
    assert rel(delta, least_squares_delta(factors_of(tasks), tokens, balance=True)) > 1e-4


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("ridge", [1e-3, 0.3])
@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_ridge_and_anchor_equal_the_closed_form(kind, anchor, ridge, balance):
    module, tasks, inputs, tokens = problem(kind)
    calibration = calibrated(module, tasks, [[x] for x in inputs])
    result = merge(tasks, SSRMerge(ridge=ridge, anchor=anchor, balance=balance), calibration)
    expected = reference_delta(factors_of(tasks), tokens, ridge=ridge, anchor=anchor, balance=balance)
    assert rel(result.layers[LAYER].delta(), expected) < 1e-9


@pytest.mark.parametrize("strengths", [(0.5, 1.5, -1.0), (1.0, 1.0, 3.0)])
def test_strengths_scale_what_each_task_must_reproduce(strengths):
    module, tasks, inputs, tokens = problem("linear")
    tasks = [type(t)(t.adapter, s, 1.0, t.prompts) for t, s in zip(tasks, strengths, strict=True)]
    result = merge(tasks, SSRMerge(ridge=0.01), calibrated(module, tasks, [[x] for x in inputs]))
    expected = reference_delta(factors_of(tasks), tokens, ridge=0.01)
    assert rel(result.layers[LAYER].delta(), expected) < 1e-9


@pytest.mark.parametrize("anchor", ANCHORS)
def test_large_ridge_gives_the_anchor(anchor):
    module, tasks, inputs, tokens = problem("linear")
    result = merge(tasks, SSRMerge(ridge=1e9, anchor=anchor), calibrated(module, tasks, [[x] for x in inputs]))
    expected = reference_delta(factors_of(tasks), tokens, ridge=1e9, anchor=anchor)
    total = sum(up @ down for down, up in factors_of(tasks))
    assert (result.layers[LAYER].delta() - expected).norm() < 1e-9 * total.norm()
    limits = {"sum": total, "average": total / 3, "zero": torch.zeros_like(total)}
    if anchor in limits:
        assert (result.layers[LAYER].delta() - limits[anchor]).norm() < 1e-6 * total.norm()


def test_condition_number_is_the_bound_from_the_cholesky_diagonal():
    module, tasks, inputs, tokens = problem("linear")
    report = merge(tasks, SSRMerge(ridge=1e-2), calibrated(module, tasks, [[x] for x in inputs])).report
    z = [x @ build_stacks(tasks)[0].basis.T for x in tokens]
    g = sum(one.T @ one / len(one) for one in z)
    g = g + 1e-2 * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype)
    diagonal = torch.linalg.cholesky(g).diagonal()
    assert report.layers[0].condition == pytest.approx(float((diagonal.max() / diagonal.min()) ** 2), rel=1e-8)
    assert 1 < report.layers[0].condition <= float(torch.linalg.cond(g))
