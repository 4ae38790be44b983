"""Cases with a known answer: one LoRA, disjoint LoRAs, identical tasks, one token a task."""

import pytest
import torch
from helpers import LAYER, calibrated, conflicting_tasks, deltas_of, linear64, lora, randn, rel, task, task_tokens

from ssr_core import METHODS, AverageMerge, Calibration, LoRALayer, SSRMerge, SumMerge, Target, merge

IN, OUT, RANK = 14, 9, 3


@pytest.mark.parametrize("method", [SSRMerge(), SumMerge(), AverageMerge()])
@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_lora_comes_back_bit_for_bit(method, strength, dtype):
    layer = lora(1, OUT, IN, 4, alpha=2.0, dtype=dtype)
    result = merge([task("a", layer, strength=strength)], method)
    merged = result.layers[LAYER]
    assert torch.equal(merged.down, layer.down) and torch.equal(merged.up, layer.up)
    assert torch.equal(merged.delta(), layer.delta() * strength)
    assert result.report.layers[0].status == "passed_through"


@pytest.mark.parametrize("method", METHODS)
def test_disjoint_loras_come_back_bit_for_bit_without_calibration(method):
    a, b = lora(1, OUT, IN, 4, alpha=8.0, dtype=torch.float16), lora(2, OUT, IN, 2, dtype=torch.float16)
    tasks = [task("a", {Target("x"): a}, strength=0.25), task("b", {Target("y"): b}, strength=-1.5)]
    result = merge(tasks, METHODS[method]())
    assert torch.equal(result.layers[Target("x")].delta(), a.delta() * 0.25)
    assert torch.equal(result.layers[Target("y")].delta(), b.delta() * -1.5)


def test_a_layer_without_alpha_and_odd_strength_keeps_its_delta():
    layer = lora(1, OUT, IN, 3)
    merged = merge([task("a", layer, strength=0.7)], SumMerge()).layers[LAYER]
    assert torch.equal(merged.down, layer.down) and torch.equal(merged.up, layer.up)
    assert rel(merged.delta(), 0.7 * layer.delta()) < 1e-15


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("ridge", "anchor"), [(0.0, "sum"), (0.5, "average")])
def test_the_same_inputs_for_all_tasks_give_the_average(count, ridge, anchor):
    tasks = conflicting_tasks(count, OUT, IN, RANK, seed=4)
    x = task_tokens(1, 60, IN)
    calibration = calibrated(linear64(IN, OUT), tasks, [[x]] * count)
    result = merge(tasks, SSRMerge(ridge=ridge, anchor=anchor), calibration)
    assert rel(result.layers[LAYER].delta(), sum(deltas_of(tasks)) / count) < 1e-9


def test_the_same_lora_under_two_prompts_acts_once():
    layer = lora(1, OUT, IN, RANK, alpha=2.0)
    tasks = [task("a", layer), task("b", layer)]
    tokens = [task_tokens(k, 50, IN) for k in range(2)]
    result = merge(tasks, SSRMerge(ridge=1e-10), calibrated(linear64(IN, OUT), tasks, [[x] for x in tokens]))
    assert rel(result.layers[LAYER].delta(), layer.delta()) < 1e-6


@pytest.mark.parametrize("anchor", ["sum", "average", "gains", "zero"])
def test_loras_that_no_other_task_excites_are_simply_added(anchor):
    basis = torch.linalg.qr(randn(3, IN, IN)).Q
    halves = basis[: IN // 2], basis[IN // 2 :]
    tokens = [task_tokens(k, 60, IN // 2) @ half for k, half in enumerate(halves)]
    tasks = [
        task(f"t{k}", LoRALayer(randn(80 + k, RANK, IN // 2) @ half, randn(90 + k, OUT, RANK)))
        for k, half in enumerate(halves)
    ]
    calibration = calibrated(linear64(IN, OUT), tasks, [[x] for x in tokens])
    result = merge(tasks, SSRMerge(ridge=1e-12, anchor=anchor), calibration)
    assert rel(result.layers[LAYER].delta(), sum(deltas_of(tasks))) < 1e-9


def one_token_each():
    tasks = conflicting_tasks(2, OUT, IN, RANK, seed=6)
    tokens = [task_tokens(k, 1, IN) for k in range(2)]
    return tasks, tokens, calibrated(linear64(IN, OUT), tasks, [[x] for x in tokens])


def unseen_input(tasks, tokens):
    """An input whose stacked coordinates are orthogonal to those of all tokens."""
    basis = torch.cat([torch.linalg.svd(t.adapter.layers[LAYER].down, full_matrices=False).Vh for t in tasks])
    z = torch.cat(tokens) @ basis.T
    free = torch.linalg.svd(z).Vh[len(z) :]
    return torch.linalg.pinv(basis) @ free[0]


@pytest.mark.parametrize("ridge", [1e-6, 1e-3])
@pytest.mark.parametrize(("anchor", "kept"), [("sum", 1.0), ("average", 0.5), ("zero", 0.0)])
def test_one_token_a_task_leaves_unseen_directions_to_the_anchor(anchor, kept, ridge):
    tasks, tokens, calibration = one_token_each()
    merged = merge(tasks, SSRMerge(ridge=ridge, anchor=anchor), calibration).layers[LAYER].delta()
    x = unseen_input(tasks, tokens)
    total = sum(deltas_of(tasks)) @ x
    assert (merged @ x - kept * total).norm() < 1e-6 * total.norm()


@pytest.mark.parametrize("anchor", ["sum", "average", "gains", "zero"])
def test_one_token_a_task_is_still_routed(anchor):
    tasks, tokens, calibration = one_token_each()
    merged = merge(tasks, SSRMerge(ridge=1e-8, anchor=anchor), calibration).layers[LAYER].delta()
    for own, x in zip(deltas_of(tasks), tokens, strict=True):
        assert rel(x @ merged.T, x @ own.T) < 1e-5


@pytest.mark.parametrize("anchor", ["sum", "average", "gains", "zero"])
def test_a_layer_that_never_ran_is_never_deleted(anchor):
    tasks, _, calibration = one_token_each()
    blind = Calibration(calibration.tasks, {}, {})
    result = merge(tasks, SSRMerge(anchor=anchor), blind)
    expected = sum(deltas_of(tasks)) * (0.5 if anchor == "average" else 1.0)
    assert rel(result.layers[LAYER].delta(), expected) < 1e-12
    assert result.report.layers[0].status == "anchored"
