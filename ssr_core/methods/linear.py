"""Routers that need no solve: the plain sum, the average, the best gain for each LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..gram import GramStats
from ..router import Anchor, anchor_router
from ..stacks import LayerStack
from .base import MergedFactors, absorb, canonical_problem


@dataclass(frozen=True)
class SumMerge:
    """The plain sum (task arithmetic): what a chain of LoRA loaders does."""

    name: ClassVar[str] = "sum"
    needs_calibration: ClassVar[bool] = False

    def merge(
        self, stacks: Sequence[LayerStack], stats: Sequence[GramStats | None], device: torch.device
    ) -> list[MergedFactors]:
        """Rt = I."""
        return [_fixed("sum", stack, one, device) for stack, one in zip(stacks, stats, strict=True)]


@dataclass(frozen=True)
class AverageMerge:
    """The linear average over the LoRAs that have the layer."""

    name: ClassVar[str] = "average"
    needs_calibration: ClassVar[bool] = False

    def merge(
        self, stacks: Sequence[LayerStack], stats: Sequence[GramStats | None], device: torch.device
    ) -> list[MergedFactors]:
        """Rt = I / K."""
        return [_fixed("average", stack, one, device) for stack, one in zip(stacks, stats, strict=True)]


@dataclass(frozen=True)
class GainsMerge:
    """One scalar for each LoRA and layer: its energy on its own prompts over that on all prompts."""

    name: ClassVar[str] = "gains"
    needs_calibration: ClassVar[bool] = True

    def merge(
        self, stacks: Sequence[LayerStack], stats: Sequence[GramStats | None], device: torch.device
    ) -> list[MergedFactors]:
        """Rt = blockdiag(alpha_k I)."""
        return [_fixed("gains", stack, one, device) for stack, one in zip(stacks, stats, strict=True)]


def _fixed(anchor: Anchor, stack: LayerStack, stats: GramStats | None, device: torch.device) -> MergedFactors:
    problem = canonical_problem(stack, stats, device)
    size = sum(problem.ranks)
    if problem.grams is None or stats is None or not stats.complete:
        grams = torch.zeros(len(problem.ranks), size, size, dtype=torch.float64, device=device)
    else:
        grams = problem.grams
    return absorb(stack, problem, anchor_router(anchor, grams, problem.ranks), float("nan"))
