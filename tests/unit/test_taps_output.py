"""A model with a tap attached computes what the model with the LoRA in its weights computes."""

import pytest
import torch
from helpers import F64, patched_copy, randn, task
from torch import nn

from ssr_core import LoRALayer, Target, build_stacks
from ssr_core.calibrator import Calibrator


class Strided(nn.Linear):
    """A linear layer whose output is not contiguous."""

    def forward(self, x):
        return super().forward(x).transpose(0, 1).contiguous().transpose(0, 1)


def layer_for(weight, seed, rank=3, alpha=1.5, rows=None):
    kernel = tuple(weight.shape[2:])
    out = weight.shape[0] if rows is None else rows
    down = randn(seed, rank, weight[0].numel()) / 4
    return LoRALayer(down, randn(seed + 1, out, rank), alpha, kernel)


def compare(make, x, slices=(None,), dtype=F64, tolerance=1e-12):
    """Both tasks through hooks and through weights. `slices` are the rows that the tasks' layers act on."""
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype).requires_grad_(False)
    weight = model[0].weight
    tasks = []
    for k in range(2):
        layers = {}
        for j, rows in enumerate(slices):
            length = None if rows is None else rows[1]
            layers[Target("0", rows)] = layer_for(weight, 10 * k + 2 * j, rows=length)
        tasks.append(task(f"t{k}", layers, strength=(1.0, -0.7)[k]))
    calibrator = Calibrator(build_stacks(tasks))
    for k, one in enumerate(tasks):
        delta = torch.zeros(weight.flatten(1).shape, dtype=F64)
        for target, layer in one.adapter.layers.items():
            start, length = target.out_slice or (0, len(weight))
            delta[start : start + length] += one.strength_model * layer.alpha / 3 * layer.up @ layer.down
        wide = nn.Sequential(make()).double().requires_grad_(False)
        expected = patched_copy(lambda wide=wide: wide, model.state_dict(), {"0": delta})(x.double())
        with calibrator.task(k) as tap, tap.attached(model):
            got = model(x.to(dtype))
        assert got.dtype == dtype and got.shape == expected.shape
        scale = expected.abs().max()
        assert (got.double() - expected).abs().max() < tolerance * scale
        assert (model(x.to(dtype)).double() - expected).abs().max() > 0.05 * scale  # the LoRA matters, and is gone


SHAPES = {1: (6,), 2: (5, 6), 3: (2, 5, 6), 4: (2, 3, 4, 6), 5: (2, 1, 3, 2, 6)}


CASES = [*((nn.Linear, d) for d in SHAPES), *((Strided, d) for d in SHAPES if d > 1)]


@pytest.mark.parametrize(("kind", "dims"), CASES)
def test_linear_with_any_leading_shape(kind, dims):
    compare(lambda: kind(6, 9), randn(3, *SHAPES[dims]))


@pytest.mark.parametrize("slices", [((0, 4), (4, 4), (8, 4)), ((4, 4),), ((8, 4), (0, 4)), (None,)])
@pytest.mark.parametrize("kind", [nn.Linear, Strided])
def test_slices_of_a_fused_layer(kind, slices):
    compare(lambda: kind(6, 12), randn(4, 2, 5, 6), slices)


def test_non_contiguous_input():
    compare(lambda: nn.Linear(6, 9), randn(3, 2, 6, 5).transpose(1, 2))


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(3, 6, 5, stride=2, padding=3, dilation=2), (2, 3, 17)),
    "1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 3, 5)),
    "2d": (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), (2, 3, 7, 8)),
    "2d uneven": (lambda: nn.Conv2d(3, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (2, 3, 8, 9)),
    "2d same": (lambda: nn.Conv2d(3, 6, 3, padding="same"), (2, 3, 5, 6)),
    "2d reflect": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 6)),
    "3d": (
        lambda: nn.Conv3d(2, 6, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 2), dilation=(1, 2, 1)),
        (2, 2, 4, 6, 3),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    make, shape = CONVOLUTIONS[name]
    compare(make, randn(5, *shape))


@pytest.mark.parametrize("name", ["1d", "2d", "3d"])
def test_slices_of_a_convolution(name):
    make, shape = CONVOLUTIONS[name]
    compare(make, randn(5, *shape), slices=((0, 2), (4, 2)))


# Storage precision of the layer's output bounds what can be asked: 2^-8 for bfloat16, 2^-11 for float16.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("name", ["linear", "slices", "2d"])
def test_narrow_activations(name, dtype, tolerance):
    if name == "2d":
        make, shape = CONVOLUTIONS[name]
        compare(make, randn(5, *shape).to(dtype).double(), dtype=dtype, tolerance=tolerance)
    else:
        slices = (None,) if name == "linear" else ((0, 4), (8, 4))
        compare(lambda: nn.Linear(6, 12), randn(4, 2, 5, 6).to(dtype).double(), slices, dtype, tolerance)


def test_a_module_that_runs_twice_in_one_pass_gets_its_lora_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6).double().requires_grad_(False)

        def forward(self, x):
            return self.inner(self.inner(x).tanh())

    model, x = Twice(), randn(1, 4, 6)
    layers = [layer_for(model.inner.weight, k) for k in range(2)]
    tasks = [task(f"t{k}", {Target("inner"): layer}) for k, layer in enumerate(layers)]
    delta = layers[0].alpha / 3 * layers[0].up @ layers[0].down
    expected = patched_copy(Twice, model.state_dict(), {"inner": delta})(x)
    calibrator = Calibrator(build_stacks(tasks))
    with calibrator.task(0) as tap, tap.attached(model):
        assert (model(x) - expected).abs().max() < 1e-12
    assert calibrator.result()[Target("inner")].tokens.tolist() == [8.0, 0.0]


def test_convolution_without_a_batch_dimension():
    compare(lambda: nn.Conv2d(3, 6, 3, padding=1), randn(5, 3, 7, 8))


def test_an_empty_input_passes_and_counts_nothing():
    model = nn.Sequential(nn.Linear(6, 9)).double().requires_grad_(False)
    tasks = [task(f"t{k}", {Target("0"): layer_for(model[0].weight, k)}) for k in range(2)]
    calibrator, x = Calibrator(build_stacks(tasks)), randn(1, 2, 3, 6)
    with calibrator.task(0) as tap, tap.attached(model):
        assert model(x[:, :0]).shape == (2, 0, 9)
        model(x)
    stats = calibrator.result()[Target("0")]
    z = x.reshape(-1, 6) @ build_stacks(tasks)[0].basis.T
    assert stats.tokens.tolist() == [6.0, 0.0] and torch.allclose(stats.gram[0], z.T @ z, rtol=1e-12)
