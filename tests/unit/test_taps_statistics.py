"""The statistics that hooks gather are `z z^T` with z computed apart."""

import pytest
import torch
from helpers import F64, LAYER, calibrated, conflicting_tasks, linear64, patches, randn, rel, task, task_tokens
from torch import nn

from ssr_core import Target, build_stacks, calibrate
from ssr_core.calibrator import Calibrator
from ssr_core.gram import GramAccumulator


def gram_of(stack, x):
    z = x.double() @ stack.basis.double().T
    return z.T @ z


def test_basis_rows_are_orthonormal_and_span_the_downs():
    tasks = conflicting_tasks(3, 8, 12, 4, seed=1)
    (stack,) = build_stacks(tasks)
    at = 0
    for one, rank in zip(tasks, stack.basis_ranks, strict=True):
        rows, down = stack.basis[at : at + rank], one.adapter.layers[LAYER].down
        assert (rows @ rows.T - torch.eye(rank, dtype=F64)).abs().max() < 1e-12
        assert rel(down @ rows.T @ rows, down) < 1e-12
        at += rank


@pytest.mark.parametrize("splits", [1, 4])
def test_linear_grams(splits):
    tasks = conflicting_tasks(2, 8, 12, 4, seed=1)
    tokens = [task_tokens(k, 24 + 8 * k, 12) for k in range(2)]
    calibration = calibrated(linear64(12, 8), tasks, [x.chunk(splits) for x in tokens])
    (stack,) = build_stacks(tasks)
    for k, x in enumerate(tokens):
        assert rel(calibration.stats[LAYER].gram[k], gram_of(stack, x)) < 1e-12
    assert calibration.stats[LAYER].tokens.tolist() == [24.0, 32.0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_narrow_activations_are_accumulated_in_float32(dtype, tolerance):
    tasks = conflicting_tasks(2, 8, 12, 4, seed=1)
    tokens = [task_tokens(k, 400, 12).to(dtype) for k in range(2)]
    module = nn.Linear(12, 8).to(dtype).requires_grad_(False)
    calibration = calibrated(module, tasks, [x.split(40) for x in tokens])
    (stack,) = build_stacks(tasks)
    assert calibration.stats[LAYER].gram.dtype == torch.float32
    for k, x in enumerate(tokens):
        assert rel(calibration.stats[LAYER].gram[k], gram_of(stack, x)) < tolerance


def test_large_float16_activations_do_not_overflow_the_projection():
    tasks = conflicting_tasks(2, 4, 64, 3, seed=2)
    tokens = [(task_tokens(k, 50, 64).abs() * 4000).clamp_max(60000).half() for k in range(2)]
    module = nn.Linear(64, 4).half().requires_grad_(False)
    calibration = calibrated(module, tasks, [[x] for x in tokens])
    (stack,) = build_stacks(tasks)
    assert calibration.stats[LAYER].nonfinite.tolist() == [0, 0]
    for k, x in enumerate(tokens):
        assert rel(calibration.stats[LAYER].gram[k], gram_of(stack, x)) < 1e-4


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (lambda: nn.Conv1d(3, 6, 3, stride=2, padding=1), (5, 3, 9)),
        (lambda: nn.Conv2d(3, 6, (3, 2), dilation=(2, 1), padding=(1, 0)), (3, 3, 6, 5)),
        (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), (3, 3, 6, 5)),
        (lambda: nn.Conv3d(2, 6, (1, 3, 2), stride=(1, 2, 1)), (3, 2, 3, 5, 4)),
    ],
)
def test_convolution_grams(module, shape):
    conv = module().double().requires_grad_(False)
    width = conv.weight[0].numel()
    tasks = conflicting_tasks(2, 6, width, 3, seed=3, kernel=conv.kernel_size)
    x = randn(4, *shape) + 1
    calibration = calibrated(conv, tasks, [[x], [x * 2]])
    (stack,) = build_stacks(tasks)
    for k, factor in enumerate((1, 4)):
        assert rel(calibration.stats[LAYER].gram[k], factor * gram_of(stack, patches(x, conv))) < 1e-12
    assert calibration.stats[LAYER].tokens.tolist() == [float(len(patches(x, conv)))] * 2


def test_later_layers_see_the_active_lora_upstream():
    model = nn.Sequential(linear64(6, 6), nn.Tanh(), linear64(6, 5))
    tasks = [
        task(f"t{k}", {Target("0"): a.adapter.layers[LAYER], Target("2"): b.adapter.layers[LAYER]})
        for k, (a, b) in enumerate(
            zip(conflicting_tasks(2, 6, 6, 2, seed=7), conflicting_tasks(2, 5, 6, 2, seed=8), strict=True)
        )
    ]
    x = randn(9, 30, 6)
    stacks = build_stacks(tasks)
    calibration = calibrate(model, tasks, stacks, lambda index, tap: model(x))
    stack = next(one for one in stacks if one.target == Target("2"))
    for k, one in enumerate(tasks):
        layer = one.adapter.layers[Target("0")]
        hidden = torch.tanh(x @ (model[0].weight + layer.up @ layer.down).T + model[0].bias)
        assert rel(calibration.stats[Target("2")].gram[k], gram_of(stack, hidden)) < 1e-12


def test_a_layer_of_one_lora_gets_no_statistics():
    model = nn.Sequential(linear64(6, 6), linear64(6, 6))
    a, b = conflicting_tasks(2, 6, 6, 2, seed=7)
    tasks = [
        task("a", {Target("0"): a.adapter.layers[LAYER], Target("1"): b.adapter.layers[LAYER]}),
        task("b", {Target("0"): b.adapter.layers[LAYER]}),
    ]
    calibration = calibrate(model, tasks, build_stacks(tasks), lambda index, tap: model(randn(1, 5, 6)))
    assert set(calibration.stats) == {Target("0")} == set(calibration.stack_tasks)


def test_calls_are_counted_by_module():
    tasks = conflicting_tasks(2, 6, 6, 2, seed=7)
    calibrator, model = Calibrator(build_stacks(tasks)), nn.ModuleDict({"layer": linear64(6, 6)})
    with calibrator.task(0) as tap, tap.attached(model):
        for _ in range(3):
            model["layer"](randn(1, 5, 6))
    assert dict(tap.calls) == {"layer": 3} and tap.paths == ["layer"]


def test_weighted_accumulation_by_hand():
    accumulator = GramAccumulator(2, torch.device("cpu"), F64)
    z = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 4.0]], dtype=F64)
    accumulator.add(z, torch.tensor([1.0, 0.5, 0.0]))
    accumulator.add(z[:1])
    assert torch.allclose(accumulator.gram, torch.tensor([[6.5, 2.5], [2.5, 8.5]], dtype=F64), atol=1e-15)
    assert float(accumulator.tokens) == 2.5


@pytest.mark.parametrize("rank", [256, 257, 600])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_gram_of_several_panels_is_that_of_the_finite_tokens(rank, weighted):
    z, weight = randn(rank, 40, rank), randn(1, 40).abs() if weighted else None
    z[3, rank - 1], z[7, 0], z[9, 5] = float("nan"), float("inf"), -float("inf")
    accumulator = GramAccumulator(rank, torch.device("cpu"), F64)
    accumulator.add(z[:20], None if weight is None else weight[:20])
    accumulator.add(z[20:], None if weight is None else weight[20:])
    accumulator.to_host()
    kept = [i for i in range(40) if i not in (3, 7, 9)]
    scale = torch.ones(40, dtype=F64) if weight is None else weight
    expected = torch.einsum("na,n,nb->ab", z[kept], scale[kept], z[kept])
    assert rel(accumulator.gram, expected) < 1e-13
    assert abs(float(accumulator.tokens) - float(scale[kept].sum())) < 1e-12 and int(accumulator.nonfinite) == 3
