"""Errors on held-out tokens equal those of the explicit outputs of a router that never saw them."""

from dataclasses import replace

import pytest
import scene_world
import torch
from helpers import (
    F64,
    LAYER,
    calibrated,
    conflicting_tasks,
    deltas_of,
    factors_of,
    linear64,
    lora,
    output_error,
    reference_delta,
    rel,
    task,
    task_tokens,
)

from ssr_core import (
    METHODS,
    AverageMerge,
    GainsMerge,
    NPLoRAMerge,
    PaperMerge,
    SampleOptions,
    SSRMerge,
    SumMerge,
    build_stacks,
    merge,
)
from ssr_core.overlap import subspace_overlap

OUT, IN, RANK = 7, 10, 3
TASKS = conflicting_tasks(3, OUT, IN, RANK, seed=2)
TOKENS = [task_tokens(k, 60 + 20 * k, IN) for k in range(3)]
HELD = [x[3::8] for x in TOKENS]
FIT = [x[torch.arange(len(x)) % 8 != 3] for x in TOKENS]


def layer_of(method, **more):
    return merge(TASKS, method, calibrated(linear64(IN, OUT), TASKS, [[x] for x in TOKENS]), **more).report.layers[0]


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_the_judged_router_is_fitted_on_the_other_tokens(ridge):
    layer = layer_of(SSRMerge(ridge=ridge))
    fitted = reference_delta(factors_of(TASKS), FIT, ridge=ridge)
    deltas = deltas_of(TASKS)
    assert layer.held_errors["result"] == pytest.approx(output_error(fitted, deltas, HELD), rel=1e-8)
    for k in range(3):
        alone = output_error(fitted, [deltas[k]], [HELD[k]])
        assert layer.held_task_errors["result"][k] == pytest.approx(alone, rel=1e-8)
    assert layer.held_tokens == tuple(float(len(x)) for x in HELD)


@pytest.mark.parametrize("method", [SumMerge(), AverageMerge(), NPLoRAMerge(), GainsMerge(), PaperMerge()])
def test_every_method_is_judged_by_what_it_makes_of_the_other_tokens(method):
    if isinstance(method, GainsMerge | PaperMerge):
        fit = merge(TASKS, method, calibrated(linear64(IN, OUT), TASKS, [[x] for x in FIT], held_out=0))
    else:
        fit = merge(TASKS, method)
    expected = output_error(fit.layers[LAYER].delta(), deltas_of(TASKS), HELD)
    assert layer_of(method).held_errors["result"] == pytest.approx(expected, rel=1e-8)


def test_what_every_report_compares_with_on_held_out_tokens():
    layer, deltas = layer_of(SSRMerge()), deltas_of(TASKS)
    energy = [[float((x @ d.T).square().sum()) / len(x) for d in deltas] for x in HELD]
    assert layer.held_errors["sum"] == pytest.approx(output_error(sum(deltas), deltas, HELD), rel=1e-8)
    assert layer.held_errors["average"] == pytest.approx(output_error(sum(deltas) / 3, deltas, HELD), rel=1e-8)
    for k, x in enumerate(HELD):
        alone = output_error(sum(deltas), [deltas[k]], [x])
        assert layer.held_task_errors["sum"][k] == pytest.approx(alone, rel=1e-8)
        assert energy[k][k] > 0
    gained = merge(TASKS, GainsMerge(), calibrated(linear64(IN, OUT), TASKS, [[x] for x in FIT], held_out=0))
    assert layer.held_errors["gains"] == pytest.approx(
        output_error(gained.layers[LAYER].delta(), deltas, HELD), rel=1e-8
    )


def test_errors_by_lora_on_the_calibration_tokens():
    calibration = calibrated(linear64(IN, OUT), TASKS, [[x] for x in TOKENS])
    result, deltas = merge(TASKS, SSRMerge(ridge=0.05), calibration), deltas_of(TASKS)
    layer = result.report.layers[0]
    for name, delta in (("result", result.layers[LAYER].delta()), ("sum", sum(deltas)), ("average", sum(deltas) / 3)):
        for k, x in enumerate(TOKENS):
            alone = output_error(delta, [deltas[k]], [x])
            assert layer.task_errors[name][k] == pytest.approx(alone, rel=1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_holding_out_changes_nothing_about_the_merge(name):
    """The merge itself uses all tokens."""
    results = []
    for held_out in (0, 8):
        calibration = calibrated(linear64(IN, OUT), TASKS, [[x] for x in TOKENS], held_out=held_out)
        results.append(merge(TASKS, METHODS[name](), calibration))
    assert torch.equal(results[0].layers[LAYER].delta(), results[1].layers[LAYER].delta())
    assert results[0].report.layers[0].held_errors == {} and results[1].report.layers[0].held_errors
    assert layer_of(METHODS[name](), judge=False).held_errors == {}


def test_corrections_from_samples_are_judged_on_sampled_tokens_that_they_were_not_fitted_on():
    """The second path: the fitted statistics handed to the method, its delta applied to the held-out sample."""
    calibration = calibrated(linear64(IN, OUT), TASKS, [[x] for x in TOKENS], sample=SampleOptions(40))
    (stack,) = build_stacks(TASKS)
    stats = calibration.stats[LAYER]
    (factors,) = SSRMerge().merge([stack], [stats.fitted()], torch.device("cpu"))
    unseen = [sample.rows[sample.held] for sample in stats.samples]
    assert all(0 < len(x) < 12 for x in unseen)
    layer, deltas = merge(TASKS, SSRMerge(), calibration).report.layers[0], deltas_of(TASKS)
    expected = output_error(factors.up @ factors.down, deltas, unseen)
    assert layer.held_errors["result"] == pytest.approx(expected, rel=1e-8)
    assert layer.held_errors["sum"] == pytest.approx(output_error(sum(deltas), deltas, unseen), rel=1e-8)
    plain = merge(TASKS, SSRMerge(refine=False), calibration).report.layers[0]
    fitted = reference_delta(factors_of(TASKS), FIT, ridge=0.01)
    assert plain.held_errors["result"] == pytest.approx(output_error(fitted, deltas, HELD), rel=1e-8)


def test_samples_that_do_not_know_what_was_held_out_leave_no_figure():
    """A file of a release before that: its correction cannot be judged, only what needs no samples can."""
    calibration = calibrated(linear64(IN, OUT), TASKS, [[x] for x in TOKENS], sample=SampleOptions(40))
    stats = calibration.stats[LAYER]
    old = replace(stats, samples=tuple(replace(sample, held=None) for sample in stats.samples))
    calibration = replace(calibration, stats={LAYER: old})
    assert merge(TASKS, SSRMerge(), calibration).report.layers[0].held_errors == {}
    assert merge(TASKS, SSRMerge(refine=False), calibration).report.layers[0].held_errors


def test_ups_that_act_on_fewer_directions():
    """Statistics are reduced to what the ups really read; the held-out ones with them."""
    flat = lora(1, OUT, IN, RANK)
    flat.up[:, 2] = flat.up[:, 0] * 2  # rank 2
    tasks = [task("flat", flat), TASKS[1]]
    layer = merge(tasks, SSRMerge(), calibrated(linear64(IN, OUT), tasks, [[x] for x in TOKENS[:2]])).report.layers[0]
    expected = reference_delta(factors_of(tasks), FIT[:2], ridge=0.01)
    assert layer.held_errors["result"] == pytest.approx(output_error(expected, deltas_of(tasks), HELD[:2]), rel=1e-7)


@pytest.mark.parametrize("sample", [None, SampleOptions(1000, most=10_000)], ids=["plain", "corrected"])
@pytest.mark.parametrize("flat", [False, True], ids=["full", "reduced"])
def test_scenes_samples_and_reduced_ups_take_part_in_the_judged_router(sample, flat):
    """The second path: the fitted statistics merged from nothing, the outputs written out."""
    tasks = list(scene_world.TASKS)
    if flat:
        one = lora(1, scene_world.OUT, scene_world.IN, 3)
        one.up[:, 2] = one.up[:, 0] * 2  # rank 2
        tasks[0] = task("flat", one)
    calibration = scene_world.calibrated(tasks=tasks, sample=sample)
    stats = calibration.stats[LAYER]
    (factors,) = SSRMerge().merge(build_stacks(tasks), [stats.fitted()], torch.device("cpu"))
    expected = output_error(factors.up @ factors.down, deltas_of(tasks), [x[3::8] for x in scene_world.TOKENS])
    layer = merge(tasks, SSRMerge(), calibration).report.layers[0]
    assert layer.held_errors["result"] == pytest.approx(expected, rel=1e-7)
    alone = merge(tasks, SSRMerge(joint_weight=0), calibration).report.layers[0]
    assert abs(alone.held_errors["result"] / expected - 1) > 1e-3  # scenes do count


def test_tokens_too_few_to_fit_without_the_held_out_ones_cost_the_figure_not_the_merge():
    x = [task_tokens(5, 4, IN), task_tokens(6, 4, IN)]
    tasks = conflicting_tasks(2, OUT, IN, 4, seed=3)
    calibration = calibrated(linear64(IN, OUT), tasks, [[one] for one in x])
    result = merge(tasks, SSRMerge(ridge=0.0), calibration)  # eight tokens, rank eight; six without the held-out ones
    assert result.report.layers[0].errors["result"] < 1e-4 and result.report.layers[0].held_errors == {}


def test_principal_angles_against_a_dense_decomposition():
    tasks = [task(f"t{k}", lora(40 + k, OUT, IN, rank)) for k, rank in enumerate((2, 3, 4))]
    (stack,) = build_stacks(tasks)
    found = subspace_overlap(stack.basis, stack.basis_ranks)
    projectors = [torch.linalg.pinv(d) @ d for d, _ in factors_of(tasks)]  # in x in
    for i in range(3):
        for j in range(3):
            product = projectors[i] @ projectors[j]
            cosines = torch.linalg.svdvals(product)
            small = min((2, 3, 4)[i], (2, 3, 4)[j])
            assert found.shared[i][j] == pytest.approx(float(cosines.square().sum()) / small, rel=1e-9)
            assert found.closest[i][j] == pytest.approx(float(cosines[0]), rel=1e-9)


def test_principal_angles_by_hand():
    eye = torch.eye(4, dtype=F64)
    turned = torch.stack([eye[0] * 0.6 + eye[2] * 0.8, eye[3]])
    found = subspace_overlap(torch.cat([eye[:2], turned]), (2, 2))
    assert found.closest[0][1] == pytest.approx(0.6) and found.shared[0][1] == pytest.approx(0.18)
    assert found.shared[0][0] == 1.0 and found.shared == [list(row) for row in zip(*found.shared, strict=True)]
    assert rel(torch.tensor(subspace_overlap(eye, (2, 2)).shared), torch.eye(2)) < 1e-12
