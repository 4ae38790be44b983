"""Hooks never stay, weights never change, and a pass that fails leaves nothing behind."""

import pytest
import torch
from helpers import LAYER, calibrated, conflicting_tasks, linear64, lora, randn, task
from torch import nn

from ssr_core import CalibrationError, IncompatibleError, Target, build_stacks, calibrate
from ssr_core.calibrator import Calibrator

IN, OUT = 8, 6


class CancelError(BaseException):
    """Like ComfyUI's Cancel: not an Exception."""


def world():
    torch.manual_seed(0)
    root = nn.ModuleDict({"layer": linear64(IN, OUT)})
    return root, conflicting_tasks(2, OUT, IN, 3, seed=1)


def hooks_of(root):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in root.modules()]


@pytest.mark.parametrize("failure", [None, ValueError("broken"), KeyboardInterrupt(), CancelError()])
def test_hooks_are_gone_and_weights_untouched(failure):
    root, tasks = world()
    before = {name: value.clone() for name, value in root.state_dict().items()}
    x = randn(1, 5, IN)
    clean = root["layer"](x)
    attributes = set(vars(root["layer"]))

    def run_pass(index, tap):
        root["layer"](x)
        assert hooks_of(root) == [0, 2]
        if failure is not None:
            raise failure

    if failure is None:
        calibrate(root, tasks, build_stacks(tasks), run_pass)
    else:
        with pytest.raises(type(failure)):
            calibrate(root, tasks, build_stacks(tasks), run_pass)
    assert hooks_of(root) == [0, 0]
    assert set(vars(root["layer"])) == attributes
    assert all(torch.equal(value, before[name]) for name, value in root.state_dict().items())
    assert torch.equal(root["layer"](x), clean)


def test_a_failure_inside_the_layer_does_not_disturb_the_next_pass():
    class Moody(nn.Linear):
        broken = True

        def forward(self, x):
            if self.broken:
                raise RuntimeError("out of memory")
            return super().forward(x)

    module = Moody(IN, OUT).double().requires_grad_(False)
    root, tasks, x = nn.ModuleDict({"layer": module}), conflicting_tasks(2, OUT, IN, 3, seed=1), randn(1, 5, IN)
    calibrator = Calibrator(build_stacks(tasks))
    with pytest.raises(RuntimeError, match="out of memory"), calibrator.task(0) as tap, tap.attached(root):
        module(x)
    module.broken = False
    layer = tasks[0].adapter.layers[LAYER]
    with calibrator.task(0) as tap, tap.attached(root):
        out = module(x)
    assert (out - module(x) - x @ (layer.up @ layer.down).T).abs().max() < 1e-12
    assert calibrator.result()[LAYER].tokens.tolist() == [5.0, 0.0]


@pytest.mark.parametrize("failure", [ValueError("broken"), CancelError()])
def test_a_failed_task_commits_nothing(failure):
    root, tasks = world()
    calibrator, alone = Calibrator(build_stacks(tasks)), Calibrator(build_stacks(tasks))
    x = randn(1, 50, IN)
    for one in (calibrator, alone):
        with one.task(0) as tap, tap.attached(root):
            root["layer"](x)
    with pytest.raises(type(failure)), calibrator.task(1) as tap, tap.attached(root):
        root["layer"](2 * x)
        raise failure
    got, expected = calibrator.result()[LAYER], alone.result()[LAYER]
    assert torch.equal(got.gram, expected.gram) and torch.equal(got.tokens, expected.tokens)
    assert got.tokens.tolist() == [50.0, 0.0] and not got.gram[1].any()


def test_a_task_that_is_repeated_after_a_failure_counts_once():
    root, tasks = world()
    calibrator = Calibrator(build_stacks(tasks))
    x = randn(1, 20, IN)
    with pytest.raises(ValueError, match="broken"), calibrator.task(0) as tap, tap.attached(root):
        root["layer"](x)
        raise ValueError("broken")
    with calibrator.task(0) as tap, tap.attached(root):
        root["layer"](x)
    z = x @ build_stacks(tasks)[0].basis.T
    assert torch.allclose(calibrator.result()[LAYER].gram[0], z.T @ z, rtol=1e-12)


def test_missing_module_is_named_and_no_hook_stays():
    root = nn.ModuleDict({"layer": linear64(IN, OUT)})
    layers = {LAYER: lora(1, OUT, IN, 2), Target("zz.absent"): lora(2, OUT, IN, 2)}
    tasks = [task("a", layers), task("b", layers)]
    with pytest.raises(CalibrationError, match=r"zz\.absent") as caught:
        calibrate(root, tasks, build_stacks(tasks), lambda index, tap: None)
    assert caught.value.layer == "zz.absent" and hooks_of(root) == [0, 0]


def failing(module, tasks, call, kind=IncompatibleError):
    root = nn.ModuleDict({"layer": module})
    with pytest.raises(kind) as caught:
        calibrate(root, tasks, build_stacks(tasks), lambda index, tap: call(module))
    assert caught.value.layer == "layer" and "layer" in str(caught.value)
    assert hooks_of(root) == [0, 0]
    return str(caught.value)


def test_wrong_width_names_the_layer():
    message = failing(linear64(5, OUT), conflicting_tasks(2, OUT, IN, 2), lambda m: m(randn(1, 3, 5)))
    assert "5" in message and "8" in message


def test_wrong_width_of_a_convolution_names_the_layer():
    conv = nn.Conv2d(4, OUT, 3).double().requires_grad_(False)
    tasks = conflicting_tasks(2, OUT, 3 * 9, 2, kernel=(3, 3))
    failing(conv, tasks, lambda m: m(randn(1, 1, 4, 5, 5)))


def test_grouped_convolution_names_the_layer():
    conv = nn.Conv2d(4, OUT, 3, groups=2).double().requires_grad_(False)
    tasks = conflicting_tasks(2, OUT, 2 * 9, 2, kernel=(3, 3))
    assert "grouped" in failing(conv, tasks, lambda m: m(randn(1, 1, 4, 5, 5)))


def test_a_convolution_that_pads_in_its_own_way_names_the_layer():
    class Causal(nn.Conv1d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (self.kernel_size[0] - 1, 0)))

    conv = Causal(3, OUT, 3).double().requires_grad_(False)
    tasks = conflicting_tasks(2, OUT, 9, 2, kernel=(3,))
    assert "pads" in failing(conv, tasks, lambda m: m(randn(1, 2, 3, 7)))


def test_a_call_without_positional_tensor_names_the_layer():
    tasks = conflicting_tasks(2, OUT, IN, 2)
    failing(linear64(IN, OUT), tasks, lambda m: m(input=randn(1, 3, IN)), CalibrationError)


def test_a_pass_that_calls_no_layer_is_an_error():
    root, tasks = world()
    with pytest.raises(CalibrationError, match="none of the 1 layers of LoRA number 2"):
        calibrate(
            root, tasks, build_stacks(tasks), lambda index, tap: root["layer"](randn(1, 3, IN)) if not index else None
        )


def test_a_task_without_layers_needs_no_call():
    root, tasks = world()
    absent = type(tasks[1])(tasks[1].adapter, 0.0, 1.0, tasks[1].prompts)
    run = calibrated(root["layer"], [tasks[0], absent], [[randn(1, 3, IN)], []])
    assert run.stats == {} and run.tasks[1].strength_model == 0.0
