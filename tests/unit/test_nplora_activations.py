"""Directions chosen by activations equal the dense Eckart-Young choice on the style's real inputs."""

import pytest
import torch
from helpers import (
    F64,
    LAYER,
    calibrated,
    deltas_of,
    linear64,
    lora,
    np_lora_delta,
    patches,
    protected_directions,
    randn,
    rel,
    task,
    task_tokens,
)
from torch import nn

from ssr_core import CalibrationError, NPLoRAMerge, SolveError, SSRMerge, Target, build_stacks, merge

OUT, IN, RANK = 12, 16, 5
BY_USE = {"hard": True, "directions": "activations"}


def problem(count=2, tokens=40):
    tasks = [task(f"task{k}", lora(30 + k, OUT, IN, RANK, alpha=2.0), strength=1 - 0.2 * k) for k in range(count)]
    inputs = [task_tokens(k, tokens, IN) for k in range(count)]
    return tasks, inputs, calibrated(linear64(IN, OUT), tasks, [[x] for x in inputs])


@pytest.mark.parametrize("options", [{"count": n} for n in (1, 2, 4)] + [{"energy": e} for e in (0.5, 0.9)], ids=str)
def test_equals_the_dense_choice(options):
    tasks, inputs, calibration = problem()
    content, style = deltas_of(tasks)
    v = protected_directions(style, x=inputs[1], **options)
    found = merge(tasks, NPLoRAMerge(**BY_USE, **options), calibration).layers[LAYER].delta()
    assert rel(found, np_lora_delta([content], [style], 1.0, v)) < 1e-9
    by_weights = np_lora_delta([content], [style], 1.0, protected_directions(style, **options))
    assert rel(by_weights, found) > 1e-2
    contents_prompt = np_lora_delta([content], [style], 1.0, protected_directions(style, x=inputs[0], **options))
    assert rel(contents_prompt, found) > 1e-2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_from_no_other_directions_can_the_styles_output_be_told_better(count):
    """Least squares of the style's output on `v^T x` leaves what Eckart and Young allow, and no other v so little."""
    tasks, inputs, _ = problem()
    _, style = deltas_of(tasks)
    out = inputs[1] @ style.T

    def lost(v):
        signals = inputs[1] @ v
        return float((out - signals @ torch.linalg.lstsq(signals, out).solution).norm())

    best = float(torch.linalg.svdvals(out)[count:].norm())
    assert lost(protected_directions(style, count=count, x=inputs[1])) == pytest.approx(best, rel=1e-8)
    rows = protected_directions(style)
    others = [torch.linalg.qr(rows @ randn(seed, RANK, count)).Q for seed in range(20)]
    assert min(lost(v) for v in [*others, protected_directions(style, count=count)]) > 1.01 * best


def test_all_directions_are_those_of_the_weights():
    tasks, _, calibration = problem()
    by_use = merge(tasks, NPLoRAMerge(**BY_USE), calibration).layers[LAYER].delta()
    assert rel(by_use, merge(tasks, NPLoRAMerge(hard=True)).layers[LAYER].delta()) < 1e-10


def test_directions_that_the_prompt_never_visited_are_free():
    tasks, inputs, calibration = problem(tokens=2)
    content, style = deltas_of(tasks)
    v = protected_directions(style, x=inputs[1])
    assert v.shape[1] == 2
    found = merge(tasks, NPLoRAMerge(**BY_USE), calibration).layers[LAYER].delta()
    assert rel(found, np_lora_delta([content], [style], 1.0, v)) < 1e-9


def test_several_protected_loras_each_by_its_own_prompt():
    tasks, inputs, calibration = problem(3)
    a, b, c = deltas_of(tasks)
    both = torch.cat([protected_directions(b, count=2, x=inputs[1]), protected_directions(c, count=2, x=inputs[2])], 1)
    v = torch.linalg.qr(both).Q
    method = NPLoRAMerge(**BY_USE, count=2, protected=(1, 2))
    assert rel(merge(tasks, method, calibration).layers[LAYER].delta(), np_lora_delta([a], [b, c], 1.0, v)) < 1e-9


def test_convolution():
    torch.manual_seed(0)
    module = nn.Conv2d(3, OUT, 3, padding=1).double().requires_grad_(False)
    tasks = [task(f"task{k}", lora(30 + k, OUT, 27, RANK, kernel=(3, 3))) for k in range(2)]
    inputs = [randn(50 + k, 2, 3, 5, 5) + randn(70 + k, 1, 3, 1, 1) for k in range(2)]
    calibration = calibrated(module, tasks, [[x] for x in inputs])
    content, style = deltas_of(tasks)
    v = protected_directions(style, count=2, x=patches(inputs[1], module))
    found = merge(tasks, NPLoRAMerge(**BY_USE, count=2), calibration).layers[LAYER].delta()
    assert rel(found, np_lora_delta([content], [style], 1.0, v)) < 1e-9


@pytest.mark.parametrize("split", ["style", "content"])
def test_slices(split):
    """Each range of rows takes the directions through which the style's output in these rows flows."""
    spans = [(0, 4), (4, 4), (8, 4)]
    parts = {Target("layer", span): lora(80 + at, 4, IN, 3) for at, span in enumerate(spans)}
    whole = {LAYER: lora(90, OUT, IN, 3)}
    content, style = (whole, parts) if split == "style" else (parts, whole)
    tasks = [task("content", content), task("style", style)]
    inputs = [task_tokens(k, 40, IN) for k in range(2)]
    calibration = calibrated(linear64(IN, OUT), tasks, [[x] for x in inputs])
    deltas = []
    for layers in (content, style):
        dense = torch.zeros(OUT, IN, dtype=F64)
        for target, layer in layers.items():
            start, length = target.out_slice or (0, OUT)
            dense[start : start + length] = layer.delta()
        deltas.append(dense)
    expected = torch.zeros(OUT, IN, dtype=F64)
    for start, length in spans:
        rows = slice(start, start + length)
        v = protected_directions(deltas[1][rows], count=2, x=inputs[1])
        expected[rows] = np_lora_delta([deltas[0][rows]], [deltas[1][rows]], 1.0, v)
    found = merge(tasks, NPLoRAMerge(**BY_USE, count=2), calibration).layers[LAYER].delta()
    assert rel(found, expected) < 1e-9


def test_without_a_calibration_it_says_so():
    tasks, _, _ = problem()
    with pytest.raises(CalibrationError, match="np_lora needs a calibration"):
        merge(tasks, NPLoRAMerge(directions="activations"))


def test_a_layer_that_calibration_did_not_see_goes_by_weights_and_is_reported():
    tasks, _, calibration = problem()
    unseen = type(calibration)(calibration.tasks, {}, calibration.stack_tasks)
    result = merge(tasks, NPLoRAMerge(**BY_USE, count=2), unseen)
    by_weights = merge(tasks, NPLoRAMerge(hard=True, count=2))
    assert torch.equal(result.layers[LAYER].delta(), by_weights.layers[LAYER].delta())
    assert result.report.layers[0].status == "anchored" and by_weights.report.layers[0].status == "merged"
    assert any("never ran" in warning for warning in result.report.warnings)
    with pytest.raises(CalibrationError, match="never ran"):
        merge(tasks, NPLoRAMerge(**BY_USE), unseen, unseen="refuse")


def test_the_report_measures_it_and_gives_no_advice_about_routers():
    tasks, inputs, _ = problem()
    same = [type(one)(one.adapter, one.strength_model, 1.0, ("the same",)) for one in tasks]
    equal = calibrated(linear64(IN, OUT), same, [[inputs[0]], [inputs[0]]])
    by_use = merge(same, NPLoRAMerge(**BY_USE), equal).report
    assert by_use.warnings == () and by_use.layers[0].status == "merged"
    assert set(by_use.layers[0].errors) == {"result", "sum", "average", "gains"}
    (warning,) = merge(same, SSRMerge(), equal).report.warnings
    assert "same prompt" in warning


def test_statistics_that_overflowed_are_an_error_that_names_the_layer():
    tasks, _, calibration = problem()
    stacks = build_stacks(tasks)
    stats = calibration.stats_for(stacks[0], range(2))
    stats.gram[1, -1, -1] = float("inf")
    with pytest.raises(SolveError) as caught:
        NPLoRAMerge(directions="activations").merge(stacks, [stats], torch.device("cpu"))
    assert caught.value.layer == "layer"
