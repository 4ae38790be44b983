"""Dense change of a weight -> low-rank factors, within a stated error.

Small matrices take an exact SVD. Large ones a randomised one (Halko, Martinsson and Tropp 2011,
algorithm 4.4 with power iterations) from a fixed seed, whose error is measured, not estimated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .canonical import balance

OVERSAMPLING = 16
"""Directions beyond the wanted rank that the random range finder keeps."""

POWER_ITERATIONS = 2

_ROWS = 4096
_TINY, _HUGE = 1e-25, 1e25


class Truncation(NamedTuple):
    """`up @ down`, the best approximation of a matrix within its rank.

    Attributes:
        down: (p, in).
        up: (out, p).
        error: Frobenius norm of what is left, relative to the matrix.
    """

    down: Tensor
    up: Tensor
    error: float

    @property
    def rank(self) -> int:
        """The number p of directions kept."""
        return self.down.shape[0]


def truncate(matrix: Tensor, max_rank: int, tolerance: float) -> Truncation:
    """The smallest rank that keeps the relative error under a tolerance, capped.

    The factors come out in a fixed order and sign, so that the same change gives the same
    coordinates each time.

    Args:
        matrix: (out, in), float32 or float64.
        max_rank: Largest rank to return, at least 1.
        tolerance: Relative error in the Frobenius norm; 0 keeps every direction above rounding.

    Returns:
        Factors of the matrix's dtype with balanced norms, on its device. A matrix of zeros gives rank 1.
    """
    size = min(matrix.shape)
    wanted = min(max_rank, size)
    norm = float(matrix.norm(dtype=torch.float64))
    if norm == 0:
        return Truncation(matrix.new_zeros(1, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], 1), 0.0)
    dtype = matrix.dtype
    if not _TINY < norm < _HUGE:  # products of such numbers leave float32
        matrix = matrix.double()
    if wanted + OVERSAMPLING >= size // 4:
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        rest = 0.0
    else:
        u, s, vh, rest = _randomised(matrix, wanted + OVERSAMPLING)
    energy = s.double().square()
    tail = energy.flip(0).cumsum(0).flip(0) + rest**2  # energy lost if only the directions before are kept
    limit = max(tolerance, torch.finfo(dtype).eps) * norm
    enough = (tail <= limit**2).nonzero()
    rank = max(1, min(wanted, int(enough[0]) if len(enough) else len(s)))
    left = float(tail[rank]) if rank < len(s) else rest**2
    sign = vh[:rank].gather(1, vh[:rank].abs().argmax(dim=1, keepdim=True)).sign()
    down, up = balance(vh[:rank] * sign, u[:, :rank] * (s[:rank] * sign[:, 0]))
    return Truncation(down.to(dtype).contiguous(), up.to(dtype).contiguous(), left**0.5 / norm)


def _randomised(matrix: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Leading singular triplets, and the norm of the part of the matrix outside their span."""
    generator = torch.Generator().manual_seed(matrix.shape[1])
    start = torch.randn(matrix.shape[1], size, generator=generator, dtype=torch.float64)
    q = _orthonormal(matrix @ start.to(matrix))
    for _ in range(POWER_ITERATIONS):
        q = _orthonormal(matrix @ _orthonormal(matrix.T @ q))
    small = q.T @ matrix
    right, triangle = torch.linalg.qr(small.T.double())
    u, s, vh = torch.linalg.svd(triangle.T, full_matrices=False)
    outside = sum(
        float((rows - part @ small).norm(dtype=torch.float64)) ** 2
        for rows, part in zip(matrix.split(_ROWS), q.split(_ROWS), strict=True)
    )
    return q.double() @ u, s, vh @ right.T, outside**0.5


def _orthonormal(columns: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(columns)[0]
    return q
