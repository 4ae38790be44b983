"""What every registered merge method must do; a new method is tested by being registered."""

import dataclasses

import pytest
import torch
from helpers import (
    LAYER,
    calibrated,
    conflicting_tasks,
    deltas_of,
    linear64,
    np_lora_delta,
    protected_directions,
    rel,
    task_tokens,
)

from ssr_core import METHODS, CalibrationError, SolveError, SSRMerge, Target, build_stacks, describe, merge
from ssr_core.diagnostics import routing_error

OUT, IN = 8, 11
COUNTS = (2, 4)


def problem(count=3, rank=3, **more):
    tasks = conflicting_tasks(count, OUT, IN, rank, seed=11, **more)
    return tasks, calibrated(linear64(IN, OUT), tasks, [[task_tokens(k, 40 + k, IN)] for k in range(count)])


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]()


def test_registered_under_its_own_name_as_a_frozen_dataclass_of_parameters(method):
    assert METHODS[method.name] is type(method)
    assert dataclasses.is_dataclass(method) and type(method).__dataclass_params__.frozen
    fields = dataclasses.fields(method)
    assert all(field.default is not dataclasses.MISSING for field in fields)
    assert {"name", "needs_calibration"}.isdisjoint(field.name for field in fields)
    assert describe(method).startswith(method.name)
    assert type(method)(**dataclasses.asdict(method)) == method


@pytest.mark.parametrize("count", COUNTS)
def test_finite_deltas_of_the_right_shape_that_reproduce_their_own_router(method, count):
    tasks, calibration = problem(count)
    stacks = build_stacks(tasks)
    stats = calibration.stats_for(stacks[0], range(count))
    (factors,) = method.merge(stacks, [stats], torch.device("cpu"))
    assert factors.down.shape[1] == IN and factors.up.shape[0] == OUT and factors.down.shape[0] == factors.up.shape[1]
    delta = factors.up @ factors.down
    assert bool(torch.isfinite(delta).all()) and delta.norm() > 0
    view = factors.view
    if view is None:
        return
    # The router that diagnostics see is the one that was applied: its error equals that on real tokens.
    grams = view.grams
    one = routing_error(view.router, grams, view.ranks, view.ups.T @ view.ups)
    for k, own in enumerate(deltas_of(tasks)):
        x = task_tokens(k, 40 + k, IN)
        error = ((x @ (delta - own).T) ** 2).sum() / len(x)
        assert float(one.error[k]) == pytest.approx(float(error), rel=1e-8)


def test_deterministic(method):
    tasks, calibration = problem()
    a, b = merge(tasks, method, calibration), merge(tasks, method, calibration)
    assert torch.equal(a.layers[LAYER].down, b.layers[LAYER].down)
    assert torch.equal(a.layers[LAYER].up, b.layers[LAYER].up)


def test_needs_calibration_is_honoured(method):
    tasks, calibration = problem()
    if method.needs_calibration:
        with pytest.raises(CalibrationError, match=method.name):
            merge(tasks, method)
    else:
        with_statistics = merge(tasks, method, calibration).layers[LAYER].delta()
        assert rel(merge(tasks, method).layers[LAYER].delta(), with_statistics) < 1e-14


def test_layers_are_answered_in_order_and_independently(method):
    """Stacks of several ranks and sizes at once give what each gives alone."""
    tasks_a, calibration_a = problem(2, 3)
    tasks_b, calibration_b = problem(3, 2)
    tasks_c, calibration_c = problem(2, 3, alpha=0.1)
    stacks, stats = [], []
    for tasks, calibration in ((tasks_a, calibration_a), (tasks_b, calibration_b), (tasks_c, calibration_c)):
        stacks += build_stacks(tasks)
        stats.append(calibration.stats_for(stacks[-1], range(len(tasks))))
    together = method.merge(stacks, stats, torch.device("cpu"))
    for stack, one, answer in zip(stacks, stats, together, strict=True):
        (alone,) = method.merge([stack], [one], torch.device("cpu"))
        assert rel(answer.up @ answer.down, alone.up @ alone.down) < 1e-10


def test_a_layer_without_statistics_keeps_its_loras(method):
    tasks, _ = problem()
    (factors,) = method.merge(build_stacks(tasks), [None], torch.device("cpu"))
    *others, last = deltas_of(tasks)
    expected = {
        "average": sum(others, last) / 3,
        "np_lora": np_lora_delta(others, [last], 1 / 3, protected_directions(last)),
    }.get(method.name, sum(others, last))
    assert rel(factors.up @ factors.down, expected) < 1e-12


def test_strengths_reach_the_result(method):
    """All strengths doubled double the answer: every method is linear in the ups."""
    tasks, calibration = problem()
    doubled = [type(t)(t.adapter, 2.0, 1.0, t.prompts) for t in tasks]
    once, twice = merge(tasks, method, calibration), merge(doubled, method, calibration)
    assert rel(twice.layers[LAYER].delta(), 2 * once.layers[LAYER].delta()) < 1e-10


def test_sum_and_average_are_what_their_names_say():
    tasks, calibration = problem(alpha=0.7)
    total = sum(deltas_of(tasks))
    assert rel(merge(tasks, METHODS["sum"]()).layers[LAYER].delta(), total) < 1e-12
    assert rel(merge(tasks, METHODS["average"]()).layers[LAYER].delta(), total / 3) < 1e-12
    assert rel(merge(tasks, METHODS["sum"](), calibration).layers[LAYER].delta(), total) < 1e-12


def test_average_counts_only_the_loras_that_have_the_layer():
    a, b, c = conflicting_tasks(3, OUT, IN, 2, seed=4)
    elsewhere = type(c)(type(c.adapter)("c", "c", {Target("other"): c.adapter.layers[LAYER]}), 1.0, 1.0, ("c",))
    result = merge([a, b, elsewhere], METHODS["average"]())
    assert rel(result.layers[LAYER].delta(), sum(deltas_of([a, b])) / 2) < 1e-12
    assert torch.equal(result.layers[Target("other")].delta(), c.adapter.layers[LAYER].delta())


def test_gains_are_ratios_of_energies():
    tasks, calibration = problem()
    expected = torch.zeros(OUT, IN, dtype=torch.float64)
    tokens = [task_tokens(k, 40 + k, IN) for k in range(3)]
    for k, delta in enumerate(deltas_of(tasks)):
        vh = torch.linalg.svd(tasks[k].adapter.layers[LAYER].down, full_matrices=False).Vh
        energies = [float(((x @ vh.T) ** 2).sum()) / len(x) for x in tokens]
        expected += energies[k] / sum(energies) * delta
    assert rel(merge(tasks, METHODS["gains"](), calibration).layers[LAYER].delta(), expected) < 1e-10


def test_failures_of_one_layer_name_that_layer():
    good, calibration = problem(2, 3)
    names = [Target("first"), Target("second")]
    tasks = [
        type(t)(type(t.adapter)(t.name, t.name, dict.fromkeys(names, t.adapter.layers[LAYER])), 1.0, 1.0) for t in good
    ]
    stacks = build_stacks(tasks)
    fine = calibration.stats[LAYER]
    starved = type(fine)(torch.zeros_like(fine.gram), fine.tokens, fine.nonfinite, fine.ranks)
    starved.gram[0, 0, 0] = 1.0
    with pytest.raises(SolveError) as caught:
        SSRMerge(ridge=0.0).merge(stacks, [fine, starved], torch.device("cpu"))
    assert caught.value.layer == "second"
