"""Nothing of a ForwardLoRA stays behind, whatever ends the pass; graphs of torch.compile are not mixed up."""

import contextlib

import pytest
import torch
from helpers import F64, linear64, randn
from torch import nn

from ssr_core import ForwardLoRA, IncompatibleError, LoRALayer, Target

CPU = torch.device("cpu")
LAYER = Target("layer")


class CancelError(BaseException):
    """Like ComfyUI's Cancel: not an Exception."""


def change(seed, rank=2, out=6, inp=8):
    return LoRALayer(randn(seed, rank, inp), randn(seed + 1, out, rank))


def state(root):
    """Everything about the modules that an attachment could leave behind."""
    parts = [(type(m), set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in root.modules()]
    return parts, {name: value.clone() for name, value in root.state_dict().items()}


def assert_same(root, before):
    parts, values = state(root)
    assert parts == before[0]
    assert all(torch.equal(values[name], value) for name, value in before[1].items())


@pytest.mark.parametrize("failure", [None, ValueError("broken"), KeyboardInterrupt(), CancelError()])
def test_the_module_is_as_it_was(failure):
    root = nn.ModuleDict({"layer": linear64(8, 6)})
    before, lora = state(root), ForwardLoRA({LAYER: change(1)})
    with pytest.raises(type(failure)) if failure else contextlib.nullcontext(), lora.attached(root, CPU, F64):
        root["layer"](randn(1, 3, 8))
        assert len(root["layer"]._forward_hooks) == len(root["layer"]._forward_pre_hooks) == 1
        if failure:
            raise failure
    assert_same(root, before)
    assert not lora.is_attached(root)


def test_a_layer_that_failed_once_is_right_the_next_time():
    class Moody(nn.Linear):
        broken = True

        def forward(self, x):
            if self.broken:
                raise RuntimeError("out of memory")
            return super().forward(x)

    root = nn.ModuleDict({"layer": Moody(8, 6).double().requires_grad_(False)})
    one, x = change(1), randn(1, 3, 8)
    lora = ForwardLoRA({LAYER: one})
    with pytest.raises(RuntimeError, match="out of memory"), lora.attached(root, CPU, F64):
        root["layer"](x)
    root["layer"].broken = False
    with lora.attached(root, CPU, F64):
        got = root["layer"](x)
    assert (got - root["layer"](x) - x @ (one.up @ one.down).T).abs().max() < 1e-12


def test_a_missing_module_is_named_and_nothing_stays():
    root = nn.ModuleDict({"layer": linear64(8, 6)})
    before, lora = state(root), ForwardLoRA({LAYER: change(1), Target("absent.one"): change(2)})
    with pytest.raises(IncompatibleError, match=r"absent\.one"), lora.attached(root, CPU, F64):
        raise AssertionError("the block must not begin")
    assert_same(root, before)
    assert not lora.is_attached(root)


def test_a_layer_of_another_width_is_named():
    root = nn.ModuleDict({"layer": linear64(5, 6)})
    lora = ForwardLoRA({LAYER: change(1)})
    with pytest.raises(IncompatibleError, match="reads 5 inputs") as caught, lora.attached(root, CPU, F64):
        root["layer"](randn(1, 3, 5))
    assert caught.value.layer == "layer"


def test_factors_are_let_go():
    root = nn.ModuleDict({"layer": linear64(8, 6)})
    kept = []
    with ForwardLoRA({LAYER: change(1)}).attached(root, CPU, F64) as (module,):
        hook = next(iter(module._forward_hooks.values())).__self__
        kept.append(hook)
        assert hook.down is not None and hook.ups
    assert kept[0].down is None and not kept[0].ups and not kept[0].pending


# "eager" compiles nothing but traces and guards exactly as inductor does.
def test_compiled_graphs_with_and_without_are_not_mixed_up():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear64(8, 8)

        def forward(self, x):
            return self.layer(x) * 2

    model, x = Model(), randn(1, 3, 8)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager")
    first, second, wider = change(1, 2, 8), change(5, 2, 8), change(9, 3, 8)
    plain = model(x)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.allclose(compiled(x), plain, atol=1e-12)
            for one in (first, second, wider):
                with ForwardLoRA({LAYER: one}).attached(model, CPU, F64):
                    assert torch.allclose(compiled(x), plain + 2 * x @ (one.up @ one.down).T, atol=1e-12)
            outer, inner = (ForwardLoRA({LAYER: one}).attached(model, CPU, F64) for one in (first, second))
            with outer, inner:
                both = first.up @ first.down + second.up @ second.down
                assert torch.allclose(compiled(x), plain + 2 * x @ both.T, atol=1e-12)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 4  # none, two of one structure, the wider, the chain; never one for each attachment
    torch._dynamo.reset()
