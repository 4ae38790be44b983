"""Corrections from sampled inputs equal dense regressions, keep the rank, and choose their ridge by left-out tokens."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    F64,
    LAYER,
    conflicting_tasks,
    factors_of,
    linear64,
    lora,
    randn,
    rel,
    svd_coordinates,
    task,
    task_tokens,
)
from torch import nn

from ssr_core import (
    METHODS,
    IncompatibleError,
    LoRALayer,
    SampleOptions,
    SSRMerge,
    Target,
    build_stacks,
    calibrate,
    merge,
)
from ssr_core.refinement import LEAST_RIDGE, _by_inputs, _by_tokens, refine, ridges
from ssr_core.router import block_slices
from ssr_core.sampling import InputSample

IN, OUT, RANK, K = 14, 9, 2, 3
R = K * RANK
COUNTS = (60, 45, 80)
TASKS = conflicting_tasks(K, OUT, IN, RANK, seed=3, alpha=3.0)
TOKENS = [task_tokens(k, count, IN) for k, count in enumerate(COUNTS)]
ALIKE = [torch.cat([x[:2], x[:2] + 0.1 * randn(k, 2, IN)]) for k, x in enumerate(TOKENS)]
"""Fewer tokens than inputs, each with one that is nearly the same: what predicts one predicts the other."""
ALL = SampleOptions(tokens=1000, most=9999)


def calibrated(tasks=TASKS, tokens=TOKENS, sample=ALL):
    root = nn.ModuleDict({"layer": linear64(tokens[0].shape[-1], OUT)})
    return calibrate(root, tasks, build_stacks(tasks), lambda index, tap: root["layer"](tokens[index]), sample=sample)


def coordinates(tasks):
    bases, ups = zip(*(svd_coordinates(*pair) for pair in factors_of(tasks)), strict=True)
    return torch.cat(bases), torch.cat(ups, dim=1), [len(base) for base in bases]


def features_and_targets(tasks, tokens):
    """Tokens (N, in), weighted so that every task counts 1, and what a router should give for them (N, R)."""
    basis, _, ranks = coordinates(tasks)
    features, targets = [], []
    for own, x in zip(block_slices(ranks), tokens, strict=True):
        wanted = torch.zeros(len(x), len(basis), dtype=F64)
        wanted[:, own] = x @ basis[own].T
        features.append(x / len(x) ** 0.5)
        targets.append(wanted / len(x) ** 0.5)
    return torch.cat(features), torch.cat(targets)


def primal(x, rest, mu):
    """E^T X (X^T X + mu I)^-1: the other form of the same regression."""
    return rest.T @ x @ torch.linalg.inv(x.T @ x + mu * torch.eye(x.shape[1], dtype=F64))


def samples_of(tokens):
    return [InputSample(x, torch.ones(len(x), dtype=F64)) for x in tokens]


def up_space(tasks):
    """More outputs than R, so that the router can be read off the merged layer."""
    return conflicting_tasks(len(tasks), 2 * R, IN, RANK, seed=3, alpha=3.0)


@pytest.mark.parametrize("least", [LEAST_RIDGE, 1.0, 1e-3])
@pytest.mark.parametrize("tokens", [TOKENS, ALIKE], ids=["more than inputs", "fewer"])
def test_the_merge_equals_the_dense_regression_with_the_ridge_of_the_least_left_out_error(tokens, least):
    tasks = up_space(TASKS)
    root = nn.ModuleDict({"layer": linear64(IN, 2 * R)})
    calibration = calibrate(
        root, tasks, build_stacks(tasks), lambda index, tap: root["layer"](tokens[index]), sample=ALL
    )
    basis, up, ranks = coordinates(tasks)
    x, wanted = features_and_targets(tasks, tokens)
    plain = merge(tasks, SSRMerge(refine=False), calibration).layers[LAYER].delta()
    router = torch.linalg.pinv(up) @ plain @ torch.linalg.pinv(basis)
    assert rel(up @ router @ basis, plain) < 1e-9
    rest = wanted - x @ basis.T @ router.T
    mean = x.square().sum(1).mean()
    losses = {math.inf: float((rest @ up.T).square().sum())}
    for share in ridges(least):
        losses[share] = sum(
            float((up @ (rest[i] - primal(x[keep], rest[keep], share * mean) @ x[i])).square().sum())
            for i in range(len(x))
            for keep in [torch.arange(len(x)) != i]
        )
    best = min(losses, key=losses.__getitem__)
    found = refine(samples_of(tokens), basis, ranks, router, up.T @ up, (), least)
    energy = float((wanted @ up.T).square().sum())
    assert found.ridge == best < math.inf
    assert found.left_out == pytest.approx((losses[best] / energy) ** 0.5, rel=1e-9)
    assert found.uncorrected == pytest.approx((losses[math.inf] / energy) ** 0.5, rel=1e-9)
    result = merge(tasks, SSRMerge(refine_ridge=least), calibration)
    wide = up @ (router @ basis + primal(x, rest, best * mean))
    assert rel(result.layers[LAYER].delta(), wide) < 1e-8 < rel(plain, wide)


@pytest.mark.parametrize("count", [9, 20, 55])
@pytest.mark.parametrize("share", [1.0, 0.1, 0.01])
def test_equations_in_tokens_and_in_inputs_are_the_same(count, share):
    """And both equal the fits to all tokens but one, written out."""
    x, rest = randn(1, count, 20), randn(2, count, 6)
    mu = share * x.square().sum(1).mean()
    tokens, inputs = _by_tokens(x, x @ x.T, mu, rest), _by_inputs(x, x.T @ x, mu, rest)
    assert rel(tokens.down(), primal(x, rest, mu)) < 1e-10 and rel(inputs.down(), primal(x, rest, mu)) < 1e-10
    left_out = [rest[i] - primal(x[keep], rest[keep], mu) @ x[i] for i, keep in enumerate(~torch.eye(count).bool())]
    assert rel(tokens.errors, torch.stack(left_out)) < 1e-10 and rel(inputs.errors, torch.stack(left_out)) < 1e-10


def test_the_least_ridge_bounds_the_choice():
    assert ridges(0.1) == (1.0, 0.1) and ridges(1.0) == (1.0,) and ridges(3.0) == (3.0,)
    assert ridges(0.01) == pytest.approx((1.0, 0.1, 0.01)) and ridges(0.03) == (1.0, 0.1, 0.03)
    tasks = up_space(TASKS)
    basis, up, ranks = coordinates(tasks)
    router = 0.3 * torch.eye(R, dtype=F64)  # leaves much over
    chosen = [refine(samples_of(TOKENS), basis, ranks, router, up.T @ up, (), least).ridge for least in (3.0, 1e-3)]
    assert chosen[0] == 3.0 and chosen[1] < 1.0


@pytest.mark.parametrize("value", [0.0, 1e-7, -1.0, math.inf, math.nan])
def test_ridges_that_are_none_are_refused(value):
    with pytest.raises(IncompatibleError, match="refine_ridge"):
        SSRMerge(refine_ridge=value)


def test_a_correction_that_predicts_nothing_is_not_made():
    """Tokens whose rest is noise: every fit does worse on tokens left out than none."""
    tasks = conflicting_tasks(2, OUT, 60, 1, seed=8)
    tokens = [randn(70 + k, 20, 60) for k in range(2)]
    calibration = calibrated(tasks, tokens)
    basis, up, ranks = coordinates(tasks)
    x = torch.cat(tokens)
    assert len(x) < 60
    found = refine(samples_of(tokens), basis, ranks, torch.eye(2, dtype=F64) * 0.5, up.T @ up)
    assert math.isinf(found.ridge) and not found.down.any()
    assert found.left_out == found.uncorrected
    noise = merge(tasks, SSRMerge(), calibration).report.layers[0].measures
    assert (
        noise["error on sampled tokens left out of the fit"]
        <= noise["the same without the correction from sampled tokens"]
    )


def test_nothing_to_fit_gives_no_correction():
    basis, up, ranks = coordinates(TASKS)
    zeros = samples_of([torch.zeros(5, IN, dtype=F64)] * K)
    assert refine(zeros, basis, ranks, torch.eye(R, dtype=F64), up.T @ up) is None
    assert refine(samples_of(TOKENS), basis, ranks, torch.eye(R, dtype=F64), torch.zeros(R, R, dtype=F64)) is None


def test_a_task_weighs_the_same_however_many_tokens_it_has():
    basis, up, ranks = coordinates(TASKS)
    twice = [TOKENS[0], torch.cat([TOKENS[1], TOKENS[1]]), TOKENS[2]]
    heavy = samples_of(TOKENS)
    heavy[1] = InputSample(TOKENS[1], torch.full((len(TOKENS[1]),), 7.0, dtype=F64))
    router = 0.5 * torch.eye(R, dtype=F64)
    one, other = (refine(s, basis, ranks, router, up.T @ up) for s in (samples_of(TOKENS), heavy))
    assert rel(other.down, one.down) < 1e-12
    # doubled tokens leave the regression as it is, but for the mean token that the ridge is a share of
    doubled = refine(samples_of(twice), basis, ranks, router, up.T @ up)
    x, wanted = features_and_targets(TASKS, TOKENS)
    mean = float(x.square().sum()) / sum(map(len, twice))
    assert doubled.uncorrected == pytest.approx(one.uncorrected, rel=1e-12)
    assert rel(doubled.down, primal(x, wanted - x @ basis.T @ router.T, doubled.ridge * mean)) < 1e-9


def test_the_scale_of_the_inputs_does_not_matter():
    basis, up, ranks = coordinates(TASKS)
    router = 0.5 * torch.eye(R, dtype=F64)
    one = refine(samples_of(TOKENS), basis, ranks, router, up.T @ up)
    other = refine(samples_of([1e3 * x for x in TOKENS]), basis, ranks, router, 5 * up.T @ up)
    assert one.ridge == other.ridge and rel(other.down, one.down) < 1e-9
    assert other.left_out == pytest.approx(one.left_out)


def test_the_result_does_not_depend_on_how_the_loras_are_factored():
    other = []
    for k, one in enumerate(TASKS):
        layer, mix = one.adapter.layers[LAYER], randn(90 + k, RANK, RANK) * 10.0 ** (2 * k - 2)
        other.append(task(one.name, LoRALayer(mix @ layer.down, layer.up @ torch.linalg.inv(mix), layer.alpha)))
    results = [merge(tasks, SSRMerge(), calibrated(tasks)).layers[LAYER].delta() for tasks in (TASKS, other)]
    assert rel(results[1], results[0]) < 1e-8


def test_tasks_that_look_alike_to_the_loras_are_told_apart():
    """The same signals in the LoRAs' own rows, another mean outside of them."""
    basis, _, _ = coordinates(TASKS)
    outside = torch.linalg.svd(basis).Vh[R:]
    same = randn(60, 200, R) @ basis
    tokens = [same + 3 * outside[k] + 0.05 * randn(61 + k, 200, IN - R) @ outside for k in range(K)]
    shifted = [x + 5 * basis.sum(0) for x in tokens]
    plain, refined = (
        merge(TASKS, SSRMerge(refine=flag), calibrated(TASKS, shifted)).report.reconstruction_error()
        for flag in (False, True)
    )
    assert refined < 0.7 * plain


def test_the_report_equals_the_numbers_from_the_tokens():
    result = merge(TASKS, SSRMerge(), calibrated())
    delta = result.layers[LAYER].delta()
    error = energy = 0.0
    for k, (x, (down, up)) in enumerate(zip(TOKENS, factors_of(TASKS), strict=True)):
        own = x @ (up @ down).T
        error += float((x @ delta.T - own).square().sum()) / COUNTS[k]
        energy += float(own.square().sum()) / COUNTS[k]
    assert result.report.layers[0].errors["result"] == pytest.approx((error / energy) ** 0.5, rel=1e-9)


def test_rank_stays_and_refinement_can_be_switched_off():
    plain = merge(TASKS, SSRMerge(), calibrated(sample=None)).layers[LAYER]
    off = merge(TASKS, SSRMerge(refine=False), calibrated()).layers[LAYER]
    refined = merge(TASKS, SSRMerge(), calibrated()).layers[LAYER]
    assert rel(off.delta(), plain.delta()) < 1e-12 < rel(refined.delta(), plain.delta())
    assert refined.down.shape == (R, IN) and refined.up.shape == (OUT, R)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"ssr", "np_lora"}))
def test_other_methods_ignore_samples(name):
    one, other = (merge(TASKS, METHODS[name](), calibrated(sample=s)).layers[LAYER].delta() for s in (None, ALL))
    assert rel(one, other) < 1e-12


def test_dropping_a_task_gives_what_calibrating_the_others_gives():
    kept = [TASKS[2], TASKS[0]]
    direct = calibrated(kept, [TOKENS[2], TOKENS[0]])
    assert (
        rel(
            merge(kept, SSRMerge(), calibrated()).layers[LAYER].delta(),
            merge(kept, SSRMerge(), direct).layers[LAYER].delta(),
        )
        < 1e-9
    )


def test_strengths_may_change_after_calibration():
    """Signals do not depend on strengths; only how much each error weighs in the choice of the ridge does."""
    half = [replace(one, strength_model=0.5) for one in TASKS]
    full, weak = merge(TASKS, SSRMerge(), calibrated()), merge(half, SSRMerge(), calibrated(TASKS))
    assert rel(weak.layers[LAYER].delta(), 0.5 * full.layers[LAYER].delta()) < 1e-9


def test_stacks_of_one_module_share_a_sample():
    parts = [Target("qkv", (0, 4)), Target("qkv", (4, 5))]
    tasks = [
        task(f"t{k}", {one: lora(7 * k + i, one.out_slice[1], IN, RANK) for i, one in enumerate(parts)}) for k in (0, 1)
    ]
    root = nn.ModuleDict({"qkv": linear64(IN, 9)})
    calibration = calibrate(root, tasks, build_stacks(tasks), lambda index, tap: root["qkv"](TOKENS[index]), sample=ALL)
    first, second = (calibration.stats[part].samples for part in parts)
    assert all(a.rows is b.rows for a, b in zip(first, second, strict=True))


def test_layers_of_one_lora_are_not_sampled_and_unseen_ones_are_not_corrected():
    alone, unseen = Target("alone"), Target("unseen")
    layers = {LAYER: lora(1, OUT, IN, RANK), unseen: lora(2, OUT, IN, RANK)}
    tasks = [task("a", {**layers, alone: lora(3, OUT, IN, RANK)}), task("b", dict(layers))]
    root = nn.ModuleDict({name: linear64(IN, OUT) for name in ("layer", "alone", "unseen")})

    def run_pass(index, tap):
        root["layer"](TOKENS[index])
        root["alone"](TOKENS[index])
        if index == 0:
            root["unseen"](TOKENS[index])

    calibration = calibrate(root, tasks, build_stacks(tasks), run_pass, sample=ALL)
    assert set(calibration.stats) == {LAYER, unseen}
    assert calibration.stats[unseen].samples is None and calibration.stats[LAYER].samples is not None
