"""Routers that read more than the LoRAs' own coordinates equal dense solutions, keep the rank and never do worse."""

from itertools import pairwise

import pytest
import torch
from helpers import (
    F64,
    LAYER,
    conflicting_tasks,
    deltas_of,
    factors_of,
    linear64,
    output_error,
    patches,
    randn,
    rel,
    svd_coordinates,
    task,
    task_tokens,
    weighted_grams,
)
from torch import nn

from ssr_core import ANCHORS, METHODS, LoRALayer, SSRMerge, Task, build_stacks, merge
from ssr_core.calibration import Calibrator, assemble
from ssr_core.router import block_slices

IN, OUT, RANK, K = 14, 9, 2, 3
R = K * RANK
COUNTS = (60, 45, 80)
TASKS = conflicting_tasks(K, OUT, IN, RANK, seed=3, alpha=3.0)
TOKENS = [task_tokens(k, count, IN) for k, count in enumerate(COUNTS)]


def span(rows):
    """Orthonormal rows of a row space, by SVD."""
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    return right[sizes > 1e-9 * sizes[0]]


def outside(tasks, rows):
    """The rows' part outside the LoRAs' own rows, orthonormal."""
    own = span(torch.cat([down for down, _ in factors_of(tasks)]))
    return span(rows - rows @ own.T @ own)


def calibrated(readers, tasks=TASKS, tokens=TOKENS, module=None):
    module = module or linear64(tokens[0].shape[-1], OUT)
    root = nn.ModuleDict({"layer": module})
    calibrator = Calibrator(build_stacks(tasks), readers={} if readers is None else {LAYER: readers})
    for index, x in enumerate(tokens):
        with calibrator.task(index) as tap, tap.attached(root):
            module(x)
    return assemble(tasks, [calibrator])


def dense(tasks, tokens, rows):
    """up M rows, where M predicts every block's own signal (0 on other tasks) from rows x; by lstsq."""
    down, up = torch.cat([d for d, _ in factors_of(tasks)]), torch.cat([u for _, u in factors_of(tasks)], dim=1)
    features, targets = [], []
    for own, x in zip(block_slices([len(d) for d, _ in factors_of(tasks)]), tokens, strict=True):
        wanted = torch.zeros(len(x), len(down), dtype=F64)
        wanted[:, own] = x @ down[own].T
        features.append(x @ rows.T / len(x) ** 0.5)
        targets.append(wanted / len(x) ** 0.5)
    router = torch.linalg.lstsq(torch.cat(features), torch.cat(targets), driver="gelsd").solution.T
    return up @ router @ rows


READERS = outside(TASKS, randn(40, 4, IN))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_without_ridge_equals_lstsq_over_the_wider_rows(count):
    result = merge(TASKS, SSRMerge(ridge=0.0), calibrated(READERS[:count]))
    down = torch.cat([d for d, _ in factors_of(TASKS)])
    assert rel(result.layers[LAYER].delta(), dense(TASKS, TOKENS, torch.cat([down, READERS[:count]]))) < 1e-8
    assert rel(result.layers[LAYER].delta(), dense(TASKS, TOKENS, down)) > 1e-3


def test_readers_that_complete_the_space_give_least_squares_over_all_inputs():
    readers = outside(TASKS, torch.eye(IN, dtype=F64))
    assert readers.shape == (IN - R, IN)
    result = merge(TASKS, SSRMerge(ridge=0.0), calibrated(readers))
    assert rel(result.layers[LAYER].delta(), dense(TASKS, TOKENS, torch.eye(IN, dtype=F64))) < 1e-8


def test_convolutions_read_through_their_patches():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, OUT, 3, padding=1).double().requires_grad_(False)
    tasks = conflicting_tasks(2, OUT, 18, 3, seed=5, kernel=(3, 3))
    inputs = [randn(k, 4, 2, 5, 6) + 2 * randn(9 + k, 1, 2, 1, 1) for k in range(2)]
    readers = outside(tasks, randn(41, 5, 18))
    tokens = [patches(x, conv) for x in inputs]
    result = merge(tasks, SSRMerge(ridge=0.0), calibrated(readers, tasks, inputs, conv))
    rows = torch.cat([*(d for d, _ in factors_of(tasks)), readers])
    assert rel(result.layers[LAYER].delta(), dense(tasks, tokens, rows)) < 1e-8


def reference(tasks, tokens, readers, ridge, anchor):
    """(Q + mu [R0 0]) (G + mu I)^-1 with an explicit inverse; mu from the blocks' own coordinates."""
    bases, ups = zip(*(svd_coordinates(*pair) for pair in factors_of(tasks)), strict=True)
    rows, up = torch.cat([*bases, readers]), torch.cat(ups, dim=1)
    grams = weighted_grams([x @ rows.T for x in tokens], balance=True)
    g, size = sum(grams), up.shape[1]
    q, r0 = torch.zeros(size, len(rows), dtype=F64), torch.zeros(size, len(rows), dtype=F64)
    for gram, own in zip(grams, block_slices([len(b) for b in bases]), strict=True):
        q[own] = gram[own]
        share = {"sum": 1, "average": 1 / len(bases), "zero": 0}.get(
            anchor, gram[own, own].trace() / g[own, own].trace()
        )
        r0[own, own] = share * torch.eye(len(q[own]), dtype=F64)
    mu = ridge * g.diagonal()[:size].mean()
    return up @ (q + mu * r0) @ torch.linalg.inv(g + mu * torch.eye(len(g), dtype=F64)) @ rows


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_ridge_and_anchor_equal_the_closed_form(anchor, ridge):
    result = merge(TASKS, SSRMerge(ridge=ridge, anchor=anchor), calibrated(READERS))
    assert rel(result.layers[LAYER].delta(), reference(TASKS, TOKENS, READERS, ridge, anchor)) < 1e-9


def test_directions_that_an_up_ignores_leave_the_readers_alone():
    """A LoRA whose up has a zero column loses that coordinate before the solve."""
    tasks = []
    for one in TASKS:
        layer = one.adapter.layers[LAYER]
        down = torch.cat([layer.down, randn(77, 1, IN)])
        up = torch.cat([layer.up, torch.zeros(OUT, 1, dtype=F64)], dim=1)
        tasks.append(task(one.name, LoRALayer(down, up, layer.alpha * 3 / 2)))
    readers = outside(tasks, randn(42, 3, IN))
    result = merge(tasks, SSRMerge(ridge=0.02), calibrated(readers, tasks))
    assert rel(result.layers[LAYER].delta(), reference(tasks, TOKENS, readers, 0.02, "sum")) < 1e-8


def test_a_layer_without_data_keeps_its_loras_and_reads_nothing():
    calibration = calibrated(READERS)
    stats = calibration.stats[LAYER]
    starved = type(stats)(0 * stats.gram, 0 * stats.tokens, stats.nonfinite, stats.ranks, stats.readers)
    (factors,) = SSRMerge().merge(build_stacks(TASKS), [starved], torch.device("cpu"))
    assert rel(factors.up @ factors.down, sum(deltas_of(TASKS))) < 1e-12


@pytest.mark.parametrize(("mix", "ridge"), [("rotated", 0.05), ("mixed and rescaled", 0.0)])
def test_the_readers_span_is_all_that_matters(mix, ridge):
    change = torch.linalg.qr(randn(50, 4, 4))[0]
    if mix != "rotated":
        change = torch.diag(torch.tensor([1e-3, 1.0, 7.0, 50.0], dtype=F64)) @ randn(51, 4, 4)
    one, other = (merge(TASKS, SSRMerge(ridge=ridge), calibrated(rows)) for rows in (READERS, change @ READERS))
    assert rel(other.layers[LAYER].delta(), one.layers[LAYER].delta()) < 1e-7


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_more_readers_never_raise_what_is_minimised(seed, ridge):
    """Without ridge that is the error on the calibration tokens."""
    tasks = conflicting_tasks(K, OUT, IN, RANK, seed=60 + seed)
    tokens = [task_tokens(70 + 10 * seed + k, 50 + k, IN) for k in range(K)]
    readers = outside(tasks, torch.eye(IN, dtype=F64))
    values, stacks = [], build_stacks(tasks)
    for count in range(len(readers) + 1):
        calibration = calibrated(readers[:count] if count else None, tasks, tokens)
        stats = calibration.stats_for(stacks[0], range(K))
        (factors,) = SSRMerge(ridge=ridge).merge(stacks, [stats], torch.device("cpu"))
        delta = factors.up @ factors.down
        error = sum(
            ((x @ (delta - own).T) ** 2).sum() / len(x) for own, x in zip(deltas_of(tasks), tokens, strict=True)
        )
        mean = sum((x @ stacks[0].basis.T).square().sum() / len(x) for x in tokens) / R
        move = factors.view.router - torch.eye(R, R + count, dtype=F64)
        values.append(float(error + ridge * mean * (factors.view.ups @ move).square().sum()))
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(values))
    assert values[-1] < 0.9 * values[0]


def test_the_rank_stays_and_the_factors_are_balanced():
    layer = merge(TASKS, SSRMerge(), calibrated(READERS)).layers[LAYER]
    assert layer.down.shape == (R, IN) and int(torch.linalg.matrix_rank(layer.delta())) == R
    assert torch.allclose(layer.down.norm(dim=1), layer.up.norm(dim=0), rtol=1e-9)


def test_the_report_equals_the_numbers_from_the_tokens():
    result = merge(TASKS, SSRMerge(ridge=0.05), calibrated(READERS))
    report, delta = result.report.layers[0], result.layers[LAYER].delta()
    deltas = deltas_of(TASKS)
    assert report.errors["result"] == pytest.approx(output_error(delta, deltas, TOKENS), rel=1e-9)
    assert report.errors["sum"] == pytest.approx(output_error(sum(deltas), deltas, TOKENS), rel=1e-9)
    assert report.errors["average"] == pytest.approx(output_error(sum(deltas) / K, deltas, TOKENS), rel=1e-9)
    plain = merge(TASKS, SSRMerge(ridge=0.05), calibrated(None)).report.layers[0]
    assert report.errors["gains"] == pytest.approx(plain.errors["gains"], rel=1e-9)
    assert report.measures == {"input directions read beside the LoRAs' own": 4.0} and plain.measures == {}
    (factors,) = SSRMerge(ridge=0.05).merge(
        build_stacks(TASKS), [calibrated(READERS).stats[LAYER]], torch.device("cpu")
    )
    for i, x in enumerate(TOKENS):
        for j, own in enumerate(block_slices([RANK] * K)):
            energy = (factors.up[:, own] @ factors.down[own] @ x.T).square().sum() / len(x)
            assert report.crosstalk["result"][i][j] == pytest.approx(float(energy), rel=1e-9)
            energy = (deltas[j] @ x.T).square().sum() / len(x)
            assert report.crosstalk["sum"][i][j] == pytest.approx(float(energy), rel=1e-9)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"ssr"}))
def test_other_methods_ignore_readers(name):
    with_readers, without = (merge(TASKS, METHODS[name](), calibrated(rows)) for rows in (READERS, None))
    assert rel(with_readers.layers[LAYER].delta(), without.layers[LAYER].delta()) < 1e-12
    got, expected = with_readers.report.layers[0], without.report.layers[0]
    assert got.errors == pytest.approx(expected.errors, rel=1e-9) and got.measures == expected.measures


def test_dropping_a_task_gives_what_calibrating_the_others_gives():
    kept = [TASKS[0], TASKS[2]]
    whole = merge(kept, SSRMerge(ridge=0.03), calibrated(READERS))
    alone = merge(kept, SSRMerge(ridge=0.03), calibrated(READERS, kept, [TOKENS[0], TOKENS[2]]))
    assert rel(whole.layers[LAYER].delta(), alone.layers[LAYER].delta()) < 1e-11


def test_layers_with_and_without_readers_solve_together_as_alone():
    stacks = build_stacks(TASKS) * 3
    stats = [calibrated(rows).stats[LAYER] for rows in (READERS, None, READERS[:1])]
    together = SSRMerge().merge(stacks, stats, torch.device("cpu"))
    for one, answer in zip(stats, together, strict=True):
        (alone,) = SSRMerge().merge(stacks[:1], [one], torch.device("cpu"))
        assert torch.equal(alone.up @ alone.down, answer.up @ answer.down)


def test_strengths_may_change_after_calibration():
    """Signals do not depend on strengths: only the ups do."""
    strong = [Task(one.adapter, s, 1.0, one.prompts) for one, s in zip(TASKS, (0.5, -1.0, 2.0), strict=True)]
    result = merge(strong, SSRMerge(ridge=0.05), calibrated(READERS))
    assert rel(result.layers[LAYER].delta(), reference(strong, TOKENS, READERS, 0.05, "sum")) < 1e-9


def test_tasks_that_only_readers_tell_apart():
    """The same signals in the LoRAs' own rows, another mean outside of them: only what reads it can separate them."""
    tasks = conflicting_tasks(2, OUT, IN, RANK, seed=8)
    down = torch.cat([d for d, _ in factors_of(tasks)])
    own = span(down)
    side = outside(tasks, randn(52, 1, IN))
    common = (randn(53, 80, IN) + 2 * randn(54, 1, IN)) @ own.T @ own
    tokens = [common + 3 * side, common - 3 * side]
    blind, seeing = (merge(tasks, SSRMerge(ridge=1e-6), calibrated(rows, tasks, tokens)) for rows in (None, side))
    assert any("look the same" in sentence for sentence in blind.report.warnings)
    assert not any("look the same" in sentence for sentence in seeing.report.warnings)
    assert seeing.report.reconstruction_error() < 0.8 * blind.report.reconstruction_error()
    deaf = merge(tasks, METHODS["gains"](), calibrated(side, tasks, tokens))
    assert any("look the same" in sentence for sentence in deaf.report.warnings)
