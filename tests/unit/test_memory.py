"""The memory forecast against what a tap really allocates."""

import gc
import weakref

import pytest
import torch
from helpers import LAYER, lora, task
from torch import nn

from ssr_core import (
    MOMENTS_REMEDY,
    InputCollector,
    InputLayer,
    MemoryBudgetError,
    MomentOptions,
    Tap,
    Target,
    build_stacks,
    check_memory,
    memory_need,
    moments_need,
)
from ssr_core.calibrator import Calibrator

ALONE, SLICE = Target("alone"), Target("qkv", (4, 4))


def tasks_of(dtype=torch.float32):
    return [
        task("a", {LAYER: lora(1, 9, 16, 3, dtype=dtype), SLICE: lora(2, 4, 16, 2, dtype=dtype)}),
        task("b", {LAYER: lora(3, 9, 16, 5, dtype=dtype), SLICE: lora(4, 4, 16, 7, dtype=dtype)}),
        task("c", {LAYER: lora(5, 9, 16, 20, dtype=dtype), ALONE: lora(6, 9, 16, 4, dtype=dtype)}),
    ]


def live():
    gc.collect()
    return {id(t): t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}


def allocated_by(tap, dtype):
    """Bytes of all tensors that `prepare` makes and keeps."""
    before = live()
    tap.prepare(torch.device("cpu"), dtype)
    made = [t for key, t in live().items() if key not in before]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made}
    return sum(storages.values())


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)])
def test_forecast_for_the_device_covers_the_largest_tap_and_no_more(dtype, itemsize):
    stacks = build_stacks(tasks_of())
    for stack in stacks:
        assert stack.basis.dtype == torch.float32  # made once, before anything is counted
    used = [allocated_by(Tap(stacks, (k,), "balance"), dtype) for k in range(3)]
    slack = 64 * len(stacks)  # counters
    need = memory_need(stacks, dtype).device
    assert max(used) <= need + slack
    assert need < 2.5 * max(used)


def test_accumulators_by_hand():
    stacks = build_stacks(tasks_of())
    tap = Tap(stacks, (0,), "balance")
    tap.prepare(torch.device("cpu"), torch.bfloat16)
    sizes = {str(target): acc.gram.nbytes for target, acc in tap.accumulators()}
    # R' = 3 + 5 + min(20, 16) on the layer, 2 + 7 on the slice; float32 whatever the model's dtype
    assert sizes == {"layer": 4 * 24**2, "qkv[4:8]": 4 * 9**2}


def test_forecast_for_main_memory_is_one_gram_a_task_and_layer():
    stacks = build_stacks(tasks_of())
    root = nn.ModuleDict({"layer": nn.Linear(16, 9), "qkv": nn.Linear(16, 12), "alone": nn.Linear(16, 9)})
    calibrator = Calibrator(stacks)
    for k in range(3):
        with calibrator.task(k) as tap, tap.attached(root), torch.no_grad():
            for module in root.values():
                module(torch.ones(2, 16))
    held = sum(stats.gram.nbytes + stats.held.packed.nbytes for stats in calibrator.result().values())
    coordinates = 4 * sum(sum(stack.rank_bounds) * stack.in_features for stack in stacks)
    # one token in eight is held out, as a triangle
    assert held == 4 * (3 * (24**2 + 24 * 25 // 2) + 2 * (9**2 + 9 * 10 // 2))
    assert memory_need(stacks, torch.float32).host == held + coordinates


def test_forecast_by_hand():
    stacks = build_stacks(tasks_of())
    # alone: 4 x 16 down, 9 x 4 up; layer: 24 x 16, 9 x 16; slice: 9 x 16, 4 x 7; Grams in float32
    factors = (4 * 16 + 9 * 4) + (24 * 16 + 9 * 16) + (9 * 16 + 4 * 7)
    assert memory_need(stacks, torch.bfloat16).device == 2 * factors + 2 * 4 * (24**2 + 9**2)
    assert memory_need(stacks, torch.bfloat16, held_out=0).device == 2 * factors + 4 * (24**2 + 9**2)


def test_a_budget_that_suffices_passes_in_silence():
    need = memory_need(build_stacks(tasks_of()), torch.float32)
    assert check_memory(need, need.device, need.host) is None


@pytest.mark.parametrize(("device", "host", "where"), [(-1, 0, "the compute device"), (0, -1, "main memory")])
def test_refusal_says_how_much_where_and_what_to_change(device, host, where):
    need = type(memory_need([], torch.float32))(3 * 2**30, 5 * 2**30)
    with pytest.raises(MemoryBudgetError) as caught:
        check_memory(need, need.device + device, need.host + host)
    amount = "3 GiB" if device else "5 GiB"
    assert f"needs {amount} on {where}" in str(caught.value)
    assert "fewer LoRAs" in caught.value.remedy and "memory_budget_gb" in caught.value.remedy


def test_a_task_leaves_nothing_on_the_device():
    """Tensors of one task must be gone when the next one starts, without the garbage collector's help."""
    stacks = build_stacks(tasks_of())
    root = nn.ModuleDict({"layer": nn.Linear(16, 9), "qkv": nn.Linear(16, 12), "alone": nn.Linear(16, 9)})
    calibrator, gone = Calibrator(stacks), []
    gc.disable()
    try:
        for k in range(3):
            with calibrator.task(k) as tap, tap.attached(root), torch.no_grad():
                for module in root.values():
                    module(torch.ones(2, 16))
            gone.append(weakref.ref(tap))
            del tap
            assert [ref() for ref in gone] == [None] * (k + 1)
    finally:
        gc.enable()


def test_input_moments_are_predicted_to_the_byte():
    options = MomentOptions("tokens", exact_limit=16, sketch=5)
    layers = [InputLayer(Target("a"), 8, 4), InputLayer(Target("b"), 40, 4), InputLayer(Target("c"), 40, 4)]
    root = nn.ModuleDict({layer.target.module_path: nn.Linear(layer.in_features, 4) for layer in layers})
    collector, kept, held = InputCollector(layers, options), 0, {}
    for index in range(2):
        with collector.task(index) as tap, tap.attached(root), torch.no_grad():
            for layer in layers:
                root[layer.target.module_path](torch.ones(3, layer.in_features))
        found = collector.moments(index).values()
        kept += sum(one.total.nbytes for one in found)
        held = collector._matrices._ready
    need = moments_need(layers, options, tasks=2)
    assert need.host == kept
    assert need.device == kept // 2 + sum(matrix.nbytes for matrix in held.values())
    with pytest.raises(MemoryBudgetError, match="exact_limit"):
        check_memory(need, need.device, need.host - 1, MOMENTS_REMEDY)
