"""A model with a ForwardLoRA attached computes what dense float64 weights with the LoRA compute."""

import pytest
import torch
from helpers import F64, patched_copy, randn
from torch import nn

from ssr_core import ForwardLoRA, LoRALayer, Target

CPU = torch.device("cpu")


def layer(seed, weight, rank, rows=None, alpha=1.5):
    """A random layer for a weight (out, in, *kernel), or for some of its rows."""
    out = weight.shape[0] if rows is None else rows[1]
    down = randn(seed, rank, weight[0].numel()) / 4
    return LoRALayer(down, randn(seed + 1, out, rank), alpha, tuple(weight.shape[2:]))


def dense(layers, weight):
    """The change of the whole weight, (out, in * prod(kernel)), float64."""
    delta = torch.zeros(weight.flatten(1).shape, dtype=F64)
    for target, one in layers.items():
        start, length = target.out_slice or (0, len(weight))
        scale = 1.0 if one.alpha is None else one.alpha / one.down.shape[0]
        delta[start : start + length] += scale * one.up.double() @ one.down.double()
    return delta


def compare(make, x, slices=(None,), dtype=F64, tolerance=1e-12, alpha=1.5):
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype).requires_grad_(False)
    weight = model[0].weight
    layers = {
        Target("0", rows): layer(2 * i, weight, rank=2 + i, rows=rows, alpha=alpha) for i, rows in enumerate(slices)
    }
    wide = nn.Sequential(make()).double().requires_grad_(False)
    expected = patched_copy(lambda: wide, model.state_dict(), {"0": dense(layers, weight)})(x.double())
    x = x.to(dtype)
    plain, given = model(x), x.clone()
    with ForwardLoRA(layers).attached(model, CPU, dtype) as modules:
        got = model(x)
        assert modules == [model[0]]
    assert got.dtype == dtype and got.shape == expected.shape
    scale = expected.abs().max()
    assert (got.double() - expected).abs().max() < tolerance * scale
    assert (plain.double() - expected).abs().max() > 0.05 * scale  # the LoRA matters
    assert torch.equal(model(x), plain) and torch.equal(x, given)  # and is gone, and the input is as it was


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 3, 4, 6), (2, 0, 6)])
def test_linear_with_any_leading_shape(shape):
    if 0 in shape:
        model = nn.Linear(6, 9).double().requires_grad_(False)
        layers = {Target("layer"): layer(0, model.weight, 2)}
        with ForwardLoRA(layers).attached(nn.ModuleDict({"layer": model}), CPU, F64):
            assert model(randn(3, *shape)).shape == (2, 0, 9)
        return
    compare(lambda: nn.Linear(6, 9), randn(3, *shape))


@pytest.mark.parametrize("alpha", [None, 1.5, -4.0])
def test_the_scale_counts_once(alpha):
    compare(lambda: nn.Linear(6, 9), randn(3, 5, 6), alpha=alpha)


SLICES = {
    "q, k, v": ((0, 4), (4, 4), (8, 4)),
    "one": ((4, 4),),
    "overlapping": ((0, 8), (4, 8)),
    "whole and part": (None, (2, 3)),
}


@pytest.mark.parametrize("name", SLICES)
def test_rows_of_a_fused_layer(name):
    compare(lambda: nn.Linear(6, 12), randn(4, 2, 5, 6), SLICES[name])


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(3, 6, 5, stride=2, padding=3, dilation=2), (2, 3, 17)),
    "2d": (lambda: nn.Conv2d(3, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (2, 3, 8, 9)),
    "2d reflect": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 6)),
    "2d without batch": (lambda: nn.Conv2d(3, 6, 3, padding=1), (3, 7, 8)),
    "3d": (
        lambda: nn.Conv3d(2, 6, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 2), dilation=(1, 2, 1)),
        (2, 2, 4, 6, 3),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("slices", [(None,), ((0, 2), (1, 4))])
def test_convolutions(name, slices):
    make, shape = CONVOLUTIONS[name]
    compare(make, randn(5, *shape), slices)


# What the output's own precision bounds: 2^-8 for bfloat16, 2^-11 for float16.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_narrow_activations(kind, dtype, tolerance):
    if kind == "linear":
        compare(lambda: nn.Linear(6, 12), randn(4, 2, 5, 6).to(dtype).double(), ((0, 4), (8, 4)), dtype, tolerance)
    else:
        make, shape = CONVOLUTIONS["2d"]
        compare(make, randn(5, *shape).to(dtype).double(), dtype=dtype, tolerance=tolerance)


def test_float16_activations_whose_projection_exceeds_float16():
    """z is 4 * 30000 * 2 = 240000 here, the output 2.4."""
    model = nn.ModuleDict({"layer": nn.Linear(4, 3, bias=False).half().requires_grad_(False)})
    model["layer"].weight.zero_()
    layers = {Target("layer"): LoRALayer(torch.full((1, 4), 2.0), torch.full((3, 1), 1e-5))}
    with ForwardLoRA(layers).attached(model, CPU, torch.float16):
        out = model["layer"](torch.full((2, 4), 30000.0, dtype=torch.float16))
    assert (out.double() - 2.4).abs().max() < 2.4 * 2**-10


def test_an_input_that_the_layer_clamps_in_place_is_read_before():
    class Clamping(nn.Linear):
        def forward(self, x):
            return super().forward(x.clamp_(-1, 1))

    module = Clamping(6, 9).double().requires_grad_(False)
    layers = {Target("layer"): layer(0, module.weight, 2)}
    x = 5 * randn(1, 4, 6)
    expected = nn.functional.linear(x.clamp(-1, 1), module.weight, module.bias) + x @ dense(layers, module.weight).T
    with ForwardLoRA(layers).attached(nn.ModuleDict({"layer": module}), CPU, F64):
        assert (module(x.clone()) - expected).abs().max() < 1e-12


def test_two_in_a_chain_add_up_and_come_off_one_by_one():
    model = nn.Sequential(nn.Linear(6, 9)).double().requires_grad_(False)
    first, second = ({Target("0"): layer(seed, model[0].weight, 2)} for seed in (1, 7))
    x = randn(3, 4, 6)
    plain = model(x)
    one, two = (x @ dense(layers, model[0].weight).T for layers in (first, second))
    with ForwardLoRA(first).attached(model, CPU, F64):
        with ForwardLoRA(second).attached(model, CPU, F64):
            assert (model(x) - plain - one - two).abs().max() < 1e-12
        assert (model(x) - plain - one).abs().max() < 1e-12
    assert torch.equal(model(x), plain)


def test_attached_twice_is_applied_once():
    model = nn.Sequential(nn.Linear(6, 9)).double().requires_grad_(False)
    lora, x = ForwardLoRA({Target("0"): layer(1, model[0].weight, 2)}), randn(3, 4, 6)
    with lora.attached(model, CPU, F64):
        once = model(x)
        with lora.attached(model, CPU, F64) as again:
            assert again == [] and torch.equal(model(x), once)
        assert lora.is_attached(model) and torch.equal(model(x), once)
    assert not lora.is_attached(model)


def test_two_models_at_once():
    """Copies on two devices, as with several GPUs; here in two dtypes."""
    model = nn.Sequential(nn.Linear(6, 9)).double().requires_grad_(False)
    layers = {Target("0"): layer(1, model[0].weight, 2)}
    copy = nn.Sequential(nn.Linear(6, 9)).double().requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    copy.float()
    lora, x = ForwardLoRA(layers), randn(3, 4, 6)
    expected = model(x) + x @ dense(layers, model[0].weight).T
    with lora.attached(model, CPU, F64), lora.attached(copy, CPU, torch.float32):
        assert (model(x) - expected).abs().max() < 1e-12
        assert (copy(x.float()).double() - expected).abs().max() < 1e-5


def test_gradients_flow_through():
    model = nn.Sequential(nn.Linear(6, 9)).double()
    layers = {Target("0"): layer(1, model[0].weight, 2)}
    x = randn(3, 4, 6).requires_grad_(True)
    with ForwardLoRA(layers).attached(model, CPU, F64):
        model(x).sum().backward()
    expected = (model[0].weight + dense(layers, model[0].weight)).sum(0).expand(4, 6)
    assert (x.grad - expected).abs().max() < 1e-12
    assert (model[0].weight.grad - x.detach().sum(0).expand(9, 6)).abs().max() < 1e-12


def test_memory_is_that_of_the_factors():
    layers = {Target("0"): LoRALayer(torch.zeros(2, 6), torch.zeros(9, 2))}
    lora = ForwardLoRA(layers)
    sizes = {torch.bfloat16: 2, torch.float16: 4, torch.float32: 4, F64: 8}
    assert {dtype: lora.nbytes(dtype) for dtype in sizes} == {dtype: 30 * n for dtype, n in sizes.items()}
