"""Readers: input directions outside the LoRAs' own rows by which a router tells the tasks apart.

The targets of the router are the blocks' signals, each on its own task: T has `x V_k^T` in block k's
columns for a token x of task k, and 0 elsewhere. Ridge regression on all of x predicts them by

    P = T^T (X X^T + mu I)^-1 X        (R, in), X (N, in) a few tokens of each task.

What P sees inside the row space of V the router reads anyway; the rest of P spans the readers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import SolveError
from .router import block_slices
from .sampling import InputSample

NEGLIGIBLE = 1e-6
"""Predictions below this share of the largest are rounding."""


class InputRegression:
    """Ridge regression from the sampled inputs of a layer to anything; factorised once, in float64.

    Args:
        samples: One for each task; every task's weights count 1 in all.
        ridge: mu as a fraction of the mean diagonal of X X^T, X the weighted tokens.
        device: Where to compute.
        path: Of the layer, for errors.

    Raises:
        SolveError: The ridge is lost in rounding.
    """

    def __init__(self, samples: Sequence[InputSample], ridge: float, device: torch.device, path: str) -> None:
        parts = []
        for sample in samples:
            scale = (sample.weights / sample.weights.sum()).sqrt().to(device)
            parts.append(sample.rows.to(device, torch.float64) * scale[:, None])
        self.tasks = [len(part) for part in parts]
        self.x = torch.cat(parts)
        kernel = self.x @ self.x.T
        mu = ridge * kernel.diagonal().mean()
        self._factor, info = torch.linalg.cholesky_ex(kernel + mu * torch.eye(len(kernel)).to(kernel))
        self.blank = not bool(mu > 0)  # all inputs are zero
        if not self.blank and int(info) != 0:
            raise SolveError(
                f"a ridge of {ridge:g} leaves the readers undetermined.",
                layer=path,
                remedy="scout with a ridge of 0.1.",
            )

    def predictor(self, basis: Tensor, ranks: Sequence[int]) -> Tensor:
        """P (R, in) for a stack's coordinates.

        Args:
            basis: (R, in), float64.
            ranks: Rows of each task's block.
        """
        targets = self.x.new_zeros(len(self.x), len(basis))
        for tokens, rows in zip(block_slices(self.tasks), block_slices(ranks), strict=True):
            targets[tokens, rows] = self.x[tokens] @ basis[rows].T
        return torch.cholesky_solve(targets, self._factor).T @ self.x

    def readers(self, basis: Tensor, ranks: Sequence[int], limit: int | None = None) -> Tensor | None:
        """The readers of a stack.

        Args:
            basis: (R, in): the blocks' coordinates, stacked.
            ranks: Rows of each task's block.
            limit: Most readers; None for R. Those through which most of the prediction flows are kept.

        Returns:
            (E, in) in the dtype of `basis` on the CPU: orthonormal, and orthogonal to the row space of
            `basis`. None if nothing is predicted from outside of it.
        """
        wide = basis.to(self.x)
        own = row_space(wide, 64 * torch.finfo(basis.dtype).eps)
        limit = min(len(wide) if limit is None else limit, wide.shape[1] - len(own))
        if self.blank or limit <= 0:
            return None
        predictor = self.predictor(wide, ranks)
        outside = _outside(predictor, own)
        scale = float(torch.linalg.matrix_norm(self.x @ predictor.T))
        _, sizes, mix = torch.linalg.svd(self.x @ outside.T, full_matrices=False)
        rows = mix[: min(limit, int((sizes > NEGLIGIBLE * scale).sum()))] @ outside
        if len(rows) == 0:
            return None
        rows = _outside(rows / rows.norm(dim=1, keepdim=True), own)
        readers: Tensor = torch.linalg.qr(_outside(torch.linalg.qr(rows.T).Q.T, own).T).Q.T
        return readers.to("cpu", basis.dtype).contiguous()


def row_space(rows: Tensor, tolerance: float) -> Tensor:
    """Orthonormal rows that span the row space of `rows` (R, in), up to a relative tolerance: (p, in)."""
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    span: Tensor = right[sizes > tolerance * sizes[:1]]
    return span


def _outside(rows: Tensor, own: Tensor) -> Tensor:
    """The part of rows (n, in) outside the span of orthonormal `own` (p, in)."""
    for _ in range(2):  # twice is enough
        rows = rows - (rows @ own.T) @ own
    return rows
