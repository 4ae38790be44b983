"""Merging methods to compare with. Each turns K dense changes of one layer into one.

TIES and DARE are peft's own; the others are written from their papers' equations.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from peft.utils.merge_utils import dare_linear, ties
from torch import Tensor

LayerMerge = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""(K changes (out, in), K input Grams (in, in) of each LoRA alone on its prompt) -> one change."""

DENSITY = 0.5
"""Share of the changes that TIES and DARE keep, unless said otherwise."""


def ties_merge(
    deltas: Sequence[Tensor], grams: Sequence[Tensor], scale: float = 1.0, density: float = DENSITY
) -> Tensor:
    """TIES (Yadav et al. 2023): trim, elect signs, average what agrees."""
    return scale * ties(list(deltas), torch.ones(len(deltas)), density)


def dare(deltas: Sequence[Tensor], grams: Sequence[Tensor], scale: float = 1.0, density: float = DENSITY) -> Tensor:
    """DARE (Yu et al. 2024): drop at random, rescale, sum; seeded by the changes, so that layers differ."""
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(deltas[0].contiguous().numpy().tobytes()))
        return scale * dare_linear(list(deltas), torch.ones(len(deltas)), density)


def knots_ties(deltas: Sequence[Tensor], grams: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """KnOTS (Stoica et al. 2025): TIES on the right factors in the common left basis of all changes."""
    width = deltas[0].shape[1]
    u, s, vh = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    keep = s > 1e-6 * s[0]
    parts = [part.contiguous() for part in (s[keep, None] * vh[keep]).split(width, dim=1)]
    return scale * u[:, keep] @ ties(parts, torch.ones(len(parts)), DENSITY)


def regmean(deltas: Sequence[Tensor], grams: Sequence[Tensor], kept: float = 0.9) -> Tensor:
    """RegMean (Jin et al. 2023): least squares over all inputs, off-diagonals of the Grams scaled by `kept`."""
    scaled = []
    for gram in grams:
        small = kept * gram.double()
        small.diagonal().copy_(gram.diagonal())
        scaled.append(small)
    return _solved(deltas, scaled)


def firm_regmean(deltas: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """RegMean with less shrinkage: nearer to each LoRA here, at the price of more leak."""
    return regmean(deltas, grams, 0.97)


def least_squares(deltas: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """RegMean with a small ridge instead of its shrinkage: what full knowledge of all inputs allows."""
    ridge = 1e-3 * torch.stack([gram.diagonal().mean() for gram in grams]).mean()
    return _solved(deltas, [gram.double() + ridge * torch.eye(len(gram), dtype=torch.float64) for gram in grams])


def _solved(deltas: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    inverse = torch.linalg.pinv(torch.stack(list(grams)).sum(0), hermitian=True)
    change = torch.stack([delta.double() @ gram for delta, gram in zip(deltas, grams, strict=True)]).sum(0)
    return (change @ inverse).to(deltas[0].dtype)
