"""How much memory a calibration will need, from shapes alone, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import MemoryBudgetError
from .input_hooks import InputLayer
from .moments import MomentOptions
from .stacks import LayerStack


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that calibration will hold.

    Attributes:
        device: On the compute device: stacked downs, one set of Grams, the active ups.
        host: In main memory: one Gram for each LoRA and layer, and the orthonormal coordinates.
    """

    device: int
    host: int


def memory_need(stacks: Sequence[LayerStack], dtype: torch.dtype) -> MemoryNeed:
    """Predict calibration's memory from shapes alone.

    Args:
        stacks: All stacks of one part.
        dtype: Of the activations; float16 ones are projected in float32.
    """
    itemsize = 4 if dtype == torch.float16 else dtype.itemsize
    device = host = 0
    for stack in (stack for stack in stacks if stack.tapped):
        ranks = stack.rank_bounds
        routed = len(ranks) > 1
        rank = sum(ranks) if routed else 0
        device += itemsize * (sum(ranks) * stack.in_features + max(ranks) * stack.out_features) + 4 * rank * rank
        host += 4 * len(ranks) * rank * rank + 4 * sum(ranks) * stack.in_features
    return MemoryNeed(device, host)


def moments_need(layers: Sequence[InputLayer], options: MomentOptions, tasks: int) -> MemoryNeed:
    """Predict the memory of input moments; less is used where layers turn out to read the same tensor.

    Args:
        layers: Whose inputs are gathered.
        options: What is kept of them.
        tasks: For how many tasks.
    """
    widths = {layer.in_features for layer in layers}
    kept = sum(4 * layer.in_features * options.columns(layer.in_features) for layer in layers)
    sketches = sum(4 * width * options.columns(width) for width in widths if options.columns(width) < width)
    return MemoryNeed(kept + sketches, kept * tasks)


MERGE_REMEDY = "merge fewer LoRAs at once, use LoRAs of lower rank, or raise memory_budget_gb."
MOMENTS_REMEDY = "lower exact_limit or sketch, choose fewer layers, or raise memory_budget_gb."


def check_memory(need: MemoryNeed, device_budget: int, host_budget: int, remedy: str = MERGE_REMEDY) -> None:
    """Refuse before anything is allocated.

    Raises:
        MemoryBudgetError: Says how much is needed and how to need less.
    """
    for what, needed, budget in (
        ("the compute device", need.device, device_budget),
        ("main memory", need.host, host_budget),
    ):
        if needed > budget:
            raise MemoryBudgetError(
                f"calibration needs {needed / 2**30:.2f} GiB on {what}, {budget / 2**30:.2f} GiB are allowed.",
                remedy=remedy,
            )
