"""On tokens that calibration has not seen, SSR is never worse than the better of sum and average."""

import copy

import pytest
import torch
from helpers import LAYER, calibrated, conflicting_tasks, deltas_of, linear64, output_error, randn

from demo.loras import SIGMA, layer_inputs, noise, plant_loras, write_lora
from demo.model import StubTransformer, key_map
from ssr_core import (
    AverageMerge,
    SampleOptions,
    SSRMerge,
    SumMerge,
    Task,
    build_stacks,
    calibrate,
    merge,
    read_adapter,
    read_safetensors,
)

PROMPTS = ("photo of a zwx dog", "painting of my qrt teapot on grass", "the bvn robot at night")
DIALECTS = ("kohya", "diffusers", "kohya")


def planted(folder, seed):
    model = StubTransformer(d=48, depth=2, seed=seed)
    names = key_map(model)
    tasks = []
    for k, lora in enumerate(plant_loras(model, PROMPTS, rank=4, seed=seed + 1)):
        path = folder / f"{k}.safetensors"
        write_lora(model, lora, path, DIALECTS[k])
        tensors, _ = read_safetensors(path)
        adapter = read_adapter(tensors, names, name=f"lora{k}", fingerprint=str(k))
        tasks.append(Task(adapter, prompts=(PROMPTS[k],)))
    return model, tasks


def dense(model, layers):
    changes = {}
    for target, layer in layers.items():
        whole = changes.setdefault(
            target.module_path, torch.zeros(model.get_submodule(target.module_path).weight.flatten(1).shape)
        )
        start = 0 if target.out_slice is None else target.out_slice[0]
        whole[start : start + layer.up.shape[0]] += layer.delta(torch.float32)
    return changes


def inputs_alone(model, task, seed):
    """Layer inputs while the LoRA alone is patched into the weights, on noise of this seed."""
    patched = copy.deepcopy(model)
    for path, delta in dense(model, task.adapter.layers).items():
        weight = patched.get_parameter(path + ".weight")
        weight += delta.reshape(weight.shape)
    with layer_inputs(patched) as seen:
        patched(noise(seed), SIGMA, list(task.prompts))
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_demo_world(tmp_path, seed):
    model, tasks = planted(tmp_path, seed)

    def run_pass(index, tap):
        for one in (10, 11):
            model(noise(one), SIGMA, list(tasks[index].prompts))

    calibration = calibrate(model, tasks, build_stacks(tasks), run_pass)
    alone = [dense(model, task.adapter.layers) for task in tasks]
    tokens = [inputs_alone(model, task, seed=99) for task in tasks]
    errors = {}
    for method in (SSRMerge(), SumMerge(), AverageMerge()):
        merged = dense(model, merge(tasks, method, calibration).layers)
        by_layer = [
            output_error(merged[path], [one[path] for one in alone], [x[path] for x in tokens]) for path in merged
        ]
        errors[method.name] = (sum(e**2 for e in by_layer) / len(by_layer)) ** 0.5
    assert errors["ssr"] < 0.85 * min(errors["sum"], errors["average"]), errors


@pytest.mark.parametrize("seed", range(4))
def test_sampled_inputs_help_on_noise_that_calibration_did_not_see(tmp_path, seed):
    model, tasks = planted(tmp_path, seed)

    def run_pass(index, tap):
        for one in (10, 11):
            model(noise(one), SIGMA, list(tasks[index].prompts))

    alone = [dense(model, task.adapter.layers) for task in tasks]
    tokens = [inputs_alone(model, task, seed=99) for task in tasks]
    errors = []
    for sample in (None, SampleOptions(tokens=64)):
        calibration = calibrate(model, tasks, build_stacks(tasks), run_pass, sample=sample)
        merged = dense(model, merge(tasks, SSRMerge(), calibration).layers)
        by_layer = [
            output_error(merged[path], [one[path] for one in alone], [x[path] for x in tokens]) for path in merged
        ]
        errors.append((sum(e**2 for e in by_layer) / len(by_layer)) ** 0.5)
    assert errors[1] < 0.95 * errors[0], errors


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [2, 4])
def test_synthetic(count, seed):
    inp, out, rank = 24, 12, 3
    tasks = conflicting_tasks(count, out, inp, rank, seed=20 + seed)
    shared = randn(900 + seed, 8, inp)

    def draw(k, again):
        """A common signal, the task's own few directions and white noise; `again` picks the sample."""
        own = randn(1000 * seed + k, 4, inp)
        at = 5000 + 100 * seed + 10 * k + again
        return randn(at, 160, 8) @ shared + 2 * randn(at + 5, 160, 4) @ own + 0.3 * randn(at + 7, 160, inp)

    calibration = calibrated(linear64(inp, out), tasks, [[draw(k, 0)] for k in range(count)])
    held_out = [draw(k, 1) for k in range(count)]
    errors = {
        method.name: output_error(merge(tasks, method, calibration).layers[LAYER].delta(), deltas_of(tasks), held_out)
        for method in (SSRMerge(), SumMerge(), AverageMerge())
    }
    assert errors["ssr"] < min(errors["sum"], errors["average"]), errors
