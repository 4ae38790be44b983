"""How much memory a calibration will need, from shapes alone, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import MemoryBudgetError
from .input_hooks import InputLayer
from .moments import MomentOptions
from .sampling import ScoutOptions
from .stacks import LayerStack


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that calibration will hold.

    Attributes:
        device: On the compute device: stacked downs, one set of Grams, the active ups; with a scout the
            readers too, or its samples where they are larger than the Grams.
        host: In main memory: one Gram for each LoRA and layer, and the orthonormal coordinates; with a
            scout the readers too, and its samples where they are larger than the Grams.
    """

    device: int
    host: int


def memory_need(stacks: Sequence[LayerStack], dtype: torch.dtype, scout: ScoutOptions | None = None) -> MemoryNeed:
    """Predict calibration's memory from shapes alone.

    Args:
        stacks: All stacks of one part.
        dtype: Of the activations; float16 ones are projected in float32.
        scout: How readers are found, if they are.
    """
    itemsize = 4 if dtype == torch.float16 else dtype.itemsize
    device = host = grams = kept = 0
    samples: dict[str, int] = {}
    sampled: dict[str, set[int]] = {}
    for stack in (stack for stack in stacks if stack.tapped):
        ranks = stack.rank_bounds
        routed = len(ranks) > 1
        rank = sum(ranks) if routed else 0
        readers = 0
        if scout is not None and routed:
            readers = min(rank if scout.limit is None else scout.limit, rank, stack.in_features)
            path = stack.target.module_path
            samples[path] = (scout.tokens + 1) * stack.in_features * dtype.itemsize
            sampled.setdefault(path, set()).update(stack.tasks)
        rows = sum(ranks) + readers
        device += itemsize * (rows * stack.in_features + max(ranks) * stack.out_features)
        host += 4 * rows * stack.in_features
        grams += 4 * (rank + readers) ** 2
        kept += 4 * len(ranks) * (rank + readers) ** 2
    held = sum(len(sampled[path]) * size for path, size in samples.items())
    return MemoryNeed(device + max(grams, sum(samples.values())), host + max(kept, held))


LAYERS_AT_ONCE = 64
"""Layers that a merge solves at once, at most."""


def bytes_to_solve(stack: LayerStack, readers: int = 0) -> int:
    """Grams and factors of one layer in float64."""
    r = sum(stack.rank_bounds) + readers
    return 8 * (r * r * (len(stack.blocks) + 4) + r * (stack.in_features + stack.out_features))


def layers_at_once(largest: int) -> int:
    """Layers that a merge solves at once, by the bytes that the largest needs: about 512 MiB."""
    return max(1, min(LAYERS_AT_ONCE, (1 << 29) // max(1, largest)))


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
