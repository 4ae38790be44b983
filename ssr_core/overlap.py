"""How far LoRAs read the same directions: principal angles between the row spaces of their downs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from .router import block_slices
from .triangles import symmetric_product


@dataclass(frozen=True)
class Overlap:
    """Principal angles between the blocks of one layer, as their cosines.

    Attributes:
        shared: (K, K), mean squared cosine over the smaller space's directions: 0 apart, 1 one inside
            the other. Random directions come to about the larger rank over the width.
        closest: (K, K), the largest cosine.
    """

    shared: list[list[float]]
    closest: list[list[float]]


def subspace_overlap(basis: Tensor, ranks: Sequence[int]) -> Overlap:
    """Compare the blocks' row spaces in pairs.

    The singular values of `V_i V_j^T` are the cosines of the principal angles (Björck and Golub).

    Args:
        basis: (R, in), orthonormal rows within each block.
        ranks: Rows of each block.
    """
    count = len(ranks)
    shared = torch.eye(count, dtype=torch.float64)
    closest = torch.eye(count, dtype=torch.float64)
    products = symmetric_product(basis.T, basis.T)
    slices = block_slices(ranks)
    for i, j in combinations(range(count), 2):
        cosines = products[slices[i], slices[j]].to("cpu", torch.float64)
        if 0 in cosines.shape:
            continue
        small = cosines @ cosines.T if cosines.shape[0] <= cosines.shape[1] else cosines.T @ cosines
        shared[i, j] = shared[j, i] = small.diagonal().mean().clamp(0, 1)
        closest[i, j] = closest[j, i] = torch.linalg.eigvalsh(small)[-1].clamp(0, 1).sqrt()
    return Overlap(shared.tolist(), closest.tolist())
