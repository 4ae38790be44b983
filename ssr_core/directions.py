"""Which directions of its inputs a LoRA depends on most. Free functions on float64 tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .canonical import NULL_TOLERANCE


def principal_directions(up: Tensor, gram: Tensor | None, *, energy: float, count: int, floor: float) -> Tensor:
    """The principal directions of `dW = up @ B` in the coordinates of B, whose r rows are orthonormal.

    Without a Gram: the right-singular directions of `dW` with the largest singular values; those of
    `up` are the same in these coordinates.

    With the Gram `S = B X X^T B^T` of inputs X (one column a token): the directions through which the
    output `dW X` flows. The best rank-p stand-in for `dW` on X, by `|(dW - A) X|_F`, is `A = U U^T dW`
    with the p leading left-singular vectors U of `dW X` (Eckart and Young), and the answer spans A's row
    space: from no other p directions can the output be told better, by least squares. U are
    eigenvectors of `dW X X^T dW^T = up S up^T`, so neither X nor the part of it outside the row space
    of B is needed: the choice is exact.

    Args:
        up: (rows, r).
        gram: (r, r), or None to choose by weights.
        energy: Share of the energy (squared singular values of `dW`, or of `dW X`) to hold, in (0, 1].
        count: At most this many; 0 sets no limit.
        floor: Energies below this share of the largest are rounding.

    Returns:
        (r, p) with orthonormal columns, the most important first where weights choose; p is 0 if
        there is no energy.
    """
    core = torch.linalg.qr(up, mode="r").R  # up = Q core: all that matters of the rows
    if gram is None:
        _, sizes, right = torch.linalg.svd(core, full_matrices=False)
        directions: Tensor = right[: _kept(sizes.square(), energy, count, floor)].T
    else:
        energies, outputs = torch.linalg.eigh(core @ gram @ core.T)
        energies, outputs = energies.flip(0).clamp_min(0), outputs.flip(1)
        # dW^T U = B^T up^T Q W = B^T core^T W
        directions = torch.linalg.qr(core.T @ outputs[:, : _kept(energies, energy, count, floor)]).Q
    return directions


def _kept(energies: Tensor, share: float, count: int, floor: float) -> int:
    """How many directions to take, from their energies in falling order."""
    present = int((energies > floor * energies[:1]).sum())
    if present == 0:
        return 0
    tail = energies.flip(0).cumsum(0).flip(0)  # the energy lost if only the directions before are taken
    enough = (tail <= (1 - share) * tail[0]).nonzero()
    wanted = int(enough[0]) if len(enough) else present
    return min(wanted, present, count or present)


def orthonormal_span(basis: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the span of `basis^T coefficients`.

    Args:
        basis: (R, in).
        coefficients: (R, n), n at least 1.

    Returns:
        Coefficients (R, p) and directions (in, p) with orthonormal columns, `directions = basis^T
        coefficients`; p is smaller than n where columns depend on each other.
    """
    left, sizes, right = torch.linalg.svd(basis.T @ coefficients, full_matrices=False)
    keep = sizes > NULL_TOLERANCE * sizes[0]
    return coefficients @ (right[keep].T / sizes[keep]), left[:, keep]
