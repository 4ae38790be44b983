"""How much memory a calibration will need, from shapes alone, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import MemoryBudgetError
from .heldout import HELD_OUT
from .input_hooks import InputLayer
from .moments import MomentOptions
from .sampling import SampleOptions
from .stacks import LayerStack
from .triangles import packed_size


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that calibration will hold.

    Attributes:
        device: On the compute device: stacked downs, one set of Grams, the active ups, one set of samples.
        host: In main memory: one Gram for each LoRA and layer, the orthonormal coordinates, and the samples.

    Where tokens are held out, Grams count twice on the device, one and a half times in main memory.
    """

    device: int
    host: int


def memory_need(
    stacks: Sequence[LayerStack],
    dtype: torch.dtype,
    sample: SampleOptions | None = None,
    held_out: int = HELD_OUT,
    scenes: int = 0,
    rounds: int = 1,
) -> MemoryNeed:
    """Predict calibration's memory from shapes alone.

    Args:
        stacks: All stacks of one part.
        dtype: Of the activations; float16 ones are projected in float32.
        sample: Which whole inputs are kept, if any.
        held_out: One token of so many is held out; 0 for none.
        scenes: Number of joint and neutral prompts.
        rounds: How often all passes run. Of several the sum of the earlier, one more and the new sum are there at a
            time; samples stay, and are copied where they are put together.
    """
    itemsize = 4 if dtype == torch.float16 else dtype.itemsize
    device = host = basis = samples = 0
    widths: dict[str, int] = {}
    sharing: dict[str, int] = {}
    sampled: dict[str, set[int]] = {}
    for stack in (stack for stack in stacks if stack.tapped):
        ranks = stack.rank_bounds
        rank, routed = sum(ranks), len(ranks) > 1
        acting = sum(ranks) if scenes else max(ranks)
        device += itemsize * (rank * stack.in_features + acting * stack.out_features)
        basis += 4 * rank * stack.in_features
        if routed:
            device += 4 * rank * rank * (2 if held_out else 1)
            host += 4 * len(ranks) * (rank * rank + (packed_size(rank) if held_out else 0))
            host += 4 * scenes * rank * rank  # as they are gathered; they are packed in the end
        if routed and sample is not None:
            path = stack.target.module_path
            widths[path] = stack.in_features
            sampled.setdefault(path, set()).update(stack.tasks)
            sharing[path] = max(sharing.get(path, 0), len(ranks))
    if sample is not None:
        for path, width in widths.items():
            tokens = sample.shared_by(sharing[path] + scenes, width).tokens
            device += (tokens + 1) * width * dtype.itemsize
            samples += (len(sampled[path]) + scenes) * tokens * width * dtype.itemsize
    grams, kept = (host, samples) if rounds == 1 else (3 * host, 2 * rounds * samples)
    return MemoryNeed(device, basis + grams + kept)


LAYERS_AT_ONCE = 64
"""Layers that a merge solves at once, at most."""


def bytes_to_solve(stack: LayerStack, sampled: int = 0, scenes: int = 0) -> int:
    """Grams, factors and `sampled` whole inputs of one layer in float64, and what a refinement makes of these.

    Grams of all tokens, and for judging of those that are fitted and those held out; with samples each answer has
    some of twice as many rows.
    """
    r = sum(stack.rank_bounds)
    blocks = len(stack.blocks) + scenes
    solved = r * r * ((8 if sampled else 3) * blocks + 8) + r * (stack.in_features + stack.out_features)
    width = stack.in_features
    return 8 * (solved + sampled * (3 * width + 6 * r) + 3 * min(sampled, width) ** 2)


def layers_at_once(largest: int, device: torch.device) -> int:
    """Layers that a merge solves at once, by the bytes that the largest needs: about 16 MiB, 128 MiB on a GPU.

    Batches keep a GPU busy; a CPU gains nothing by them.
    """
    room = 1 << (24 if device.type == "cpu" else 27)
    return max(1, min(LAYERS_AT_ONCE, room // max(1, largest)))


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


MERGE_REMEDY = (
    "lower sampled_tokens, merge fewer LoRAs at once, in one round, with fewer joint and neutral prompts, use LoRAs of "
    "lower rank, or raise memory_budget_gb."
)
MOMENTS_REMEDY = "lower exact_limit or sketch, or raise memory_budget_gb."
RECORD_REMEDY = "lower columns, exact_limit or sampled_tokens, or raise memory_budget_gb where the node has it."


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
                f"calibration needs {needed / 2**30:.3g} GiB on {what}, {budget / 2**30:.3g} GiB are allowed.",
                remedy=remedy,
            )
