"""Symmetric matrices as their upper triangles: half the room, in memory and on disk."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed_size(size: int) -> int:
    """Entries of the upper triangle of a matrix of `size` rows."""
    return size * (size + 1) // 2


def pack(matrices: Tensor) -> Tensor:
    """(K, n, n) -> (K, n (n + 1) / 2), row by row."""
    size = matrices.shape[-1]
    rows, columns = torch.triu_indices(size, size)
    return matrices.flatten(1).index_select(1, rows * size + columns)


def places(size: int) -> Tensor:
    """(n * n,): where each entry of a symmetric matrix stands in its packed upper triangle."""
    rows, columns = torch.triu_indices(size, size)
    found = torch.empty(size, size, dtype=torch.int64)
    found[rows, columns] = found[columns, rows] = torch.arange(len(rows))
    return found.flatten()


def per_token(grams: Tensor, tokens: Tensor, device: torch.device) -> Tensor:
    """Sums of second moments (K, R, R) as means over (K,) tokens, float64; zero where there are no tokens."""
    tokens = tokens.to(device, torch.float64)
    shares = torch.where(tokens > 0, 1 / tokens.clamp_min(1e-300), torch.zeros_like(tokens))
    return grams.to(device, torch.float64, copy=True).mul_(shares[:, None, None])


_PANEL = 128
"""Rows of a symmetric product computed at once: what lies left of a panel is the mirror of an earlier one."""


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """`left^T right` (n, n) of matrices (m, n) whose product is known to be symmetric, for little over half of it."""
    size = left.shape[1]
    product = left.new_empty(size, size)
    for start in range(0, size, _PANEL):
        end = start + _PANEL
        product[start:end, start:] = left[:, start:end].T @ right[:, start:]
        product[end:, start:end] = product[start:end, end:].T
    return product


def unpack(packed: Tensor, at: Tensor | None = None) -> Tensor:
    """(K, n (n + 1) / 2) -> (K, n, n).

    Args:
        packed: The triangles.
        at: `places(n)` if the caller has it: most layers are of one size.
    """
    if at is None:
        at = places((math.isqrt(8 * packed.shape[1] + 1) - 1) // 2)
    size = math.isqrt(len(at))
    return packed.index_select(1, at).view(len(packed), size, size)
