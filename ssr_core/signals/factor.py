"""Low-rank factors of a layer's second moments, exact on the rows of the LoRA that was recorded.

From the sketch `Y = C Omega` with `Omega = [B^T, random]`, B the LoRA's own orthonormal rows, the
Nystroem approximation is taken in two steps,

    F_o = C B^T (B C B^T)^(-1/2),      F_r F_r^T = Nystroem approximation of C - F_o F_o^T,

so that `C' = F_o F_o^T + F_r F_r^T` has C' B^T = C B^T: whatever LoRAs come later, the router's guide
(rows `down_k X_k Z_k^T`) is exact, and only what other LoRAs read of this one's inputs is approximated.
F_r may be cut without touching that. What C' lacks is known by its trace and put where nothing is
known, evenly over the directions outside B:

    D C D^T ~ D C' D^T + rest / (d - r) (D D^T - D B^T B D^T).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..moments import InputMoments
from ..sampling import InputSample

_ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6}
"""Eigenvalues below this share of the largest are rounding, by the dtype of the sums."""


@dataclass(frozen=True)
class InputFactor:
    """`C ~ F F^T` of one layer's inputs, F = columns * norms.

    Attributes:
        columns: (d, p), unit norm each; the first `own` ones are F_o, the others fall in norm.
        norms: (p,) their lengths.
        own: Columns that make the LoRA's own rows exact.
        trace: Of C.
        tokens: Weighted tokens.
        nonfinite: Tokens left out because a value was NaN or infinite.
        sample: A few of the tokens as they are; None if none were kept.
    """

    columns: Tensor
    norms: Tensor
    own: int
    trace: float
    tokens: float
    nonfinite: int = 0
    sample: InputSample | None = None

    @property
    def width(self) -> int:
        """Inputs d."""
        return self.columns.shape[0]

    @property
    def size(self) -> int:
        """Columns p."""
        return self.columns.shape[1]

    @property
    def rest(self) -> float:
        """Trace of C outside of F F^T."""
        return max(0.0, self.trace - float(self.norms.double().square().sum()))

    @property
    def unknown(self) -> float:
        """`rest` as a share of the trace."""
        return self.rest / self.trace if self.trace > 0 else 0.0

    def cut(self, size: int) -> InputFactor:
        """The strongest columns only; never fewer than the LoRA's own."""
        size = max(size, self.own)
        return replace(self, columns=self.columns[:, :size].contiguous(), norms=self.norms[:size].contiguous())

    @cached_property
    def dense(self) -> Tensor:
        """F (d, p) in float64."""
        return self.columns.double() * self.norms.double()

    def gram_of(self, rows: Tensor, own: Tensor) -> Tensor:
        """`D C D^T` for any rows D.

        Args:
            rows: (R, d), D.
            own: (r, d), orthonormal rows of the recorded LoRA on this layer: exact, so that no share of
                the rest is theirs.

        Returns:
            (R, R) float64, positive semidefinite.
        """
        rows, own = rows.double(), own.double()
        seen = rows @ self.dense
        free = self.width - len(own)
        if self.rest <= 0 or free <= 0:
            return seen @ seen.T
        outside = rows - (rows @ own.T) @ own
        return seen @ seen.T + (self.rest / free) * (outside @ outside.T)


def factorise(moments: InputMoments, omega: Tensor | None, own: Tensor) -> InputFactor:
    """Take moments apart.

    Args:
        moments: `C Omega`, or C itself.
        omega: (d, o + l) as it was applied, beginning with `own.T`; None where C is exact.
        own: (o, d) orthonormal rows, B.
    """
    total = moments.total.double()
    tolerance = _ROUNDING[moments.total.dtype]
    ahead = total @ own.T if omega is None else total[:, : len(own)]
    first = _inverse_root(own @ ahead, tolerance, None)
    exact = ahead @ first
    if omega is None:
        remainder = (total + total.T) / 2 - exact @ exact.T
        values, vectors = torch.linalg.eigh(remainder)
        keep = values > tolerance * max(moments.trace, 0.0)
        later = vectors[:, keep] * values[keep].sqrt()
    else:
        random = omega[:, len(own) :].double()
        left = total[:, len(own) :] - exact @ (exact.T @ random)
        later = left @ _inverse_root(random.T @ left, tolerance, float((random.T @ total[:, len(own) :]).trace()))
    columns = torch.cat([_turned(exact), _turned(later)], dim=1)
    norms = columns.norm(dim=0)
    some = norms > 0
    columns, norms = columns[:, some], norms[some]
    return InputFactor(
        columns / norms,
        norms,
        int(some[: exact.shape[1]].sum()),
        moments.trace,
        moments.tokens,
        moments.nonfinite,
        moments.sample,
    )


def _inverse_root(core: Tensor, tolerance: float, scale: float | None) -> Tensor:
    """M (n, m) with M M^T the pseudo-inverse of a positive semidefinite matrix (n, n)."""
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    largest = float(values[-1]) if values.numel() else 0.0
    keep = values > tolerance * max(largest, scale or 0.0, 1e-300)
    root: Tensor = vectors[:, keep] / values[keep].sqrt()
    return root


def _turned(factor: Tensor) -> Tensor:
    """The factor with orthogonal columns, the longest first; F F^T stays."""
    values, vectors = torch.linalg.eigh(factor.T @ factor)
    turned: Tensor = factor @ vectors.flip(1)
    return turned[:, values.flip(0) > 0]
