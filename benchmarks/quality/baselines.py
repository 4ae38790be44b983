"""Merging methods to compare with. Each turns K dense changes of one layer into one.

TIES and DARE are peft's own; the others are written from their papers' equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft.utils.merge_utils import dare_linear, ties
from torch import Tensor

LayerMerge = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""(K changes (out, in), K input Grams (in, in) of each LoRA alone on its prompt) -> one change."""

DENSITY = 0.5


def average(deltas: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """Linear average."""
    return torch.stack(list(deltas)).mean(0)


def total(deltas: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """Task arithmetic with weight 1: what chained loaders do."""
    return torch.stack(list(deltas)).sum(0)


def ties_merge(deltas: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """TIES (Yadav et al. 2023): trim, elect signs, average what agrees."""
    return ties(list(deltas), torch.ones(len(deltas)), DENSITY)


def dare(deltas: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """DARE (Yu et al. 2024): drop at random, rescale, sum; seeded."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return dare_linear(list(deltas), torch.ones(len(deltas)), DENSITY)


def knots_ties(deltas: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """KnOTS (Stoica et al. 2025): TIES on the right factors in the common left basis of all changes."""
    width = deltas[0].shape[1]
    u, s, vh = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    keep = s > 1e-6 * s[0]
    parts = [part.contiguous() for part in (s[keep, None] * vh[keep]).split(width, dim=1)]
    return u[:, keep] @ ties(parts, torch.ones(len(parts)), DENSITY)


def regmean(deltas: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """RegMean (Jin et al. 2023): least squares over all inputs, off-diagonals of the Grams scaled by 0.9."""
    scaled = []
    for gram in grams:
        small = 0.9 * gram.double()
        small.diagonal().copy_(gram.diagonal())
        scaled.append(small)
    inverse = torch.linalg.pinv(torch.stack(scaled).sum(0), hermitian=True)
    change = torch.stack([delta.double() @ gram for delta, gram in zip(deltas, scaled, strict=True)]).sum(0)
    return (change @ inverse).to(deltas[0].dtype)


BASELINES: dict[str, LayerMerge] = {
    "average": average,
    "sum": total,
    "TIES": ties_merge,
    "DARE": dare,
    "KnOTS+TIES": knots_ties,
    "RegMean": regmean,
}
