"""Coordinates that depend on what a LoRA does, not on how it is factored.

`down = mix @ basis` with orthonormal rows in `basis` and a lower-triangular `mix` with a positive
diagonal, which makes the pair unique. Statistics are kept in the coordinates of `basis`: they can be
taken back to the file's own coordinates (`mix`), and the same delta gives the same answer however
its scale is shared out between up and down.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WELL_REGULAR = 1e-8
"""Smallest over largest eigenvalue of `up^T up` from which nobody has to look closer."""

NULL_TOLERANCE = 1e-6
"""Directions of a delta below this share of its largest singular value count as absent."""


DEPENDENT_TOLERANCE = 1e-10
"""A row of `down` whose new part is below this share of the largest row depends on the rows before it."""


WELL_CONDITIONED = 3e3
"""Condition number up to which the factor of `down down^T` gives coordinates of files below float64.

They lose eps * condition^2 = 2e-9 of their orthogonality, a thirtieth of what rounding to float32 costs.
"""


class RowBasis(NamedTuple):
    """`down = mix @ basis`.

    Attributes:
        basis: (r', in) with orthonormal rows, float64, r' the rank of `down`.
        mix: (r, r'), float64; lower triangular with a positive diagonal where `down` has full rank.
    """

    basis: Tensor
    mix: Tensor


def row_basis(down: Tensor) -> RowBasis:
    """Orthonormal coordinates of the row space of `down` (r, in).

    Rows that depend on earlier ones get no coordinate of their own: QR would fill it with rounding
    noise, and statistics kept in it would mean nothing on another machine.
    """
    narrow = down.dtype != torch.float64
    down = down.to(torch.float64)
    quick = _cholesky_basis(down) if narrow else None
    if quick is not None:
        return quick
    largest = max(down.norm(dim=1).tolist())
    rows = torch.arange(down.shape[0])
    while True:
        q, r = torch.linalg.qr(down[rows].T)
        dependent = r.diagonal().abs() <= DEPENDENT_TOLERANCE * largest
        if not bool(dependent.any()):
            break
        # Beyond the first dependent row QR's directions are arbitrary: judge the rest by what is known so far.
        first = int(dependent.nonzero()[0])
        known, rest = q[:, :first], down[rows[first:]]
        for _ in range(2):  # twice is enough
            rest = rest - (rest @ known) @ known.T
        keep = torch.ones(len(rows), dtype=torch.bool)
        keep[first:] = (rest.norm(dim=1) > DEPENDENT_TOLERANCE * largest).cpu()
        keep[first] = False
        rows = rows[keep]
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r)
    basis = (q * sign).T.contiguous()
    return RowBasis(basis, (r * sign[:, None]).T.contiguous() if len(rows) == down.shape[0] else down @ basis.T)


def _cholesky_basis(down: Tensor) -> RowBasis | None:
    """The same pair from the Cholesky factor of `down down^T`: matrix products, half the time of a QR.

    Args:
        down: (r, in), float64.

    Returns:
        None unless the rows are certainly well-conditioned: |L| |L^-1| in the Frobenius norm bounds
        the condition number.
    """
    factor, info = torch.linalg.cholesky_ex(down @ down.T)
    if int(info) != 0:
        return None
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
    if not float(factor.norm() * inverse.norm()) <= WELL_CONDITIONED:  # NaN too
        return None
    return RowBasis(inverse @ down, factor)


def effective_directions(up: Tensor) -> Tensor:
    """Directions of the coordinates on which `up` (out, r') really acts.

    Returns:
        (r', r''), float64, with orthonormal columns; the identity if `up` has full column rank.
    """
    up = up.to(torch.float64)
    gram = up.T @ up
    if _certainly_regular(gram):
        return torch.eye(up.shape[1], dtype=up.dtype, device=up.device)
    values, vectors = torch.linalg.eigh(gram)
    largest = values[-1] if values.numel() else values.sum()
    keep = values > NULL_TOLERANCE**2 * largest
    if bool(keep.all()):
        return torch.eye(up.shape[1], dtype=up.dtype, device=up.device)
    directions: Tensor = vectors[:, keep]
    return directions


def _certainly_regular(gram: Tensor) -> bool:
    """Whether the smallest eigenvalue is far from zero: it is at least 1 / |L^-1|^2, ten times cheaper to find."""
    if not len(gram):
        return False
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:
        return False
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(gram)).to(gram), upper=False)
    return bool(inverse.norm().square() * gram.norm() < 1 / WELL_REGULAR)


def balance(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Share the norm of each rank-one term evenly between its row of `down` and its column of `up`.

    The product stays the same. Both factors then survive float16, to which the host casts them
    under low VRAM.
    """
    row, column = down.norm(dim=1), up.norm(dim=0)
    usable = (row > 0) & (column > 0)
    factor = torch.where(usable, (column / row.clamp_min(1e-300)).sqrt(), torch.ones_like(row))
    return down * factor[:, None], up / factor.clamp_min(1e-300)
