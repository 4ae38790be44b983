"""The scout pass: readers from what it saw, the LoRA alone active, and a failed pass leaves nothing."""

import pytest
import torch
from helpers import F64, LAYER, conflicting_tasks, factors_of, linear64, lora, randn, rel, task, task_tokens
from torch import nn

from ssr_core import (
    CalibrationError,
    LoRALayer,
    Scout,
    ScoutOptions,
    SSRMerge,
    Target,
    build_stacks,
    calibrate,
    merge,
)
from ssr_core.readers import InputRegression, row_space
from ssr_core.sampling import InputSample

IN, OUT, RANK, K = 14, 9, 2, 3
CPU = torch.device("cpu")
TASKS = conflicting_tasks(K, OUT, IN, RANK, seed=3)
STACK = build_stacks(TASKS)[0]
TOKENS = [task_tokens(k, 60 + k, IN) for k in range(K)]


def projector(rows):
    span = row_space(rows, 1e-9)
    return span.T @ span


def scouted(root, tasks, run_pass, options=None):
    scout = Scout(build_stacks(tasks), options or ScoutOptions(tokens=10_000))
    for index in range(len(tasks)):
        with scout.task(index) as tap, tap.attached(root):
            run_pass(index, tap)
    return scout


def hooks_of(root):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in root.modules()]


def wide(tasks, tokens=TOKENS, **options):
    root = nn.ModuleDict({"layer": linear64(IN, OUT)})
    run = []

    def run_pass(index, tap):
        run.append((index, tap.scouting))
        base, out = root["layer"].weight, root["layer"](tokens[index])
        down, up = factors_of(tasks)[index]
        assert rel(out - root["layer"].bias, tokens[index] @ (base + up @ down).T) < 1e-12
        assert len(list(tap.samples())) + len(list(tap.accumulators())) == 1
        assert bool(list(tap.samples())) == tap.scouting

    calibration = calibrate(root, tasks, build_stacks(tasks), run_pass, scout=ScoutOptions(**options))
    return calibration, run


def test_the_callback_runs_all_tasks_twice_and_knows_which_time_it_is():
    calibration, run = wide(TASKS, tokens=TOKENS)
    assert run == [(k, True) for k in range(K)] + [(k, False) for k in range(K)]
    assert calibration.settings["scout"] == {"tokens": 256, "ridge": 0.1, "limit": None, "seed": 0}
    samples = [InputSample(x, torch.ones(len(x), dtype=F64)) for x in TOKENS]
    expected = InputRegression(samples, 0.1, CPU, "layer").readers(STACK.basis, STACK.basis_ranks)
    stats = calibration.stats[LAYER]
    assert rel(projector(stats.readers), projector(expected)) < 1e-9
    y = TOKENS[1] @ torch.cat([STACK.basis, stats.readers]).T
    assert rel(stats.gram[1], y.T @ y) < 1e-12


def test_no_scout_no_readers():
    root = nn.ModuleDict({"layer": linear64(IN, OUT)})
    run = []
    calibration = calibrate(
        root, TASKS, build_stacks(TASKS), lambda k, tap: run.append((k, tap.scouting)) or root["layer"](TOKENS[k])
    )
    assert run == [(k, False) for k in range(K)] and calibration.stats[LAYER].readers is None
    assert dict(calibration.settings) == {}


def test_the_result_does_not_depend_on_how_the_loras_are_factored():
    other = []
    for k, one in enumerate(TASKS):
        layer, mix = one.adapter.layers[LAYER], randn(90 + k, RANK, RANK) * 10.0 ** (2 * k - 2)
        other.append(task(one.name, LoRALayer(mix @ layer.down, layer.up @ torch.linalg.inv(mix), layer.alpha)))
    results = [merge(tasks, SSRMerge(), wide(tasks, limit=4)[0]).layers[LAYER].delta() for tasks in (TASKS, other)]
    assert rel(results[1], results[0]) < 1e-8


def test_readers_lower_the_error_on_the_tokens():
    plain = merge(TASKS, SSRMerge(ridge=0.0), wide(TASKS, limit=0)[0]).report.reconstruction_error()
    errors = [merge(TASKS, SSRMerge(ridge=0.0), wide(TASKS, limit=n)[0]).report.reconstruction_error() for n in (2, 6)]
    assert plain > errors[0] > errors[1] > 0


def test_stacks_of_one_module_share_a_sample():
    parts = [Target("qkv", (0, 4)), Target("qkv", (4, 5))]
    tasks = [
        task(f"t{k}", {one: lora(7 * k + i, one.out_slice[1], IN, RANK) for i, one in enumerate(parts)}) for k in (0, 1)
    ]
    root = nn.ModuleDict({"qkv": linear64(IN, 9)})
    scout = scouted(root, tasks, lambda index, tap: root["qkv"](TOKENS[index]))
    assert set(scout._done) == {("qkv", 0), ("qkv", 1)}
    samples = [InputSample(TOKENS[k], torch.ones(len(TOKENS[k]), dtype=F64)) for k in (0, 1)]
    readers = scout.readers()
    for stack in build_stacks(tasks):
        expected = InputRegression(samples, 0.1, CPU, "").readers(stack.basis, stack.basis_ranks)
        assert rel(projector(readers[stack.target]), projector(expected)) < 1e-9


def test_layers_of_one_lora_are_not_sampled_and_unseen_ones_have_no_readers():
    alone, unseen = Target("alone"), Target("unseen")
    layers = {LAYER: lora(1, OUT, IN, RANK), unseen: lora(2, OUT, IN, RANK)}
    tasks = [task("a", {**layers, alone: lora(3, OUT, IN, RANK)}), task("b", dict(layers))]
    root = nn.ModuleDict({name: linear64(IN, OUT) for name in ("layer", "alone", "unseen")})

    def run_pass(index, tap):
        root["layer"](TOKENS[index])
        root["alone"](TOKENS[index])
        if index == 0:
            root["unseen"](TOKENS[index])

    scout = scouted(root, tasks, run_pass)
    assert set(scout._done) == {("layer", 0), ("layer", 1), ("unseen", 0)}
    assert set(scout.readers()) == {LAYER} and scout._done == {}


class CancelError(BaseException):
    """Like ComfyUI's Cancel: not an Exception."""


@pytest.mark.parametrize("failure", [ValueError("broken"), KeyboardInterrupt(), CancelError()])
def test_a_failed_scout_pass_leaves_nothing(failure):
    root, calls = nn.ModuleDict({"layer": linear64(IN, OUT)}), []

    def run_pass(index, tap):
        calls.append((index, tap.scouting))
        root["layer"](TOKENS[index])
        assert hooks_of(root) == [0, 2]
        if index == 1:
            raise failure

    with pytest.raises(type(failure)):
        calibrate(root, TASKS, build_stacks(TASKS), run_pass, scout=ScoutOptions())
    assert hooks_of(root) == [0, 0] and calls == [(0, True), (1, True)]
    scout = Scout(build_stacks(TASKS), ScoutOptions())
    with pytest.raises(type(failure)), scout.task(1) as tap, tap.attached(root):
        run_pass(1, tap)
    assert scout._done == {} and hooks_of(root) == [0, 0]


def test_a_scout_that_reaches_no_layer_is_an_error():
    root = nn.ModuleDict({"layer": linear64(IN, OUT)})
    with pytest.raises(CalibrationError, match="none of the 1 layers of LoRA number 1"):
        calibrate(root, TASKS, build_stacks(TASKS), lambda index, tap: None, scout=ScoutOptions())
