"""Second moments of a layer's inputs, in bounded memory: exact where the layer is narrow, sketched where it is wide.

    C = sum_n w_n x_n x_n^T        (d, d)

A wide layer keeps Y = C Omega (d, l) for a fixed random Omega, and the trace of C. Both are sums
over tokens, so sketches add up as exact moments do, and nothing waits for the device. What they
give back is the Nystroem approximation C' = Y (Omega^T Y)^+ Y^T (Tropp, Yurtsever, Udell, Cevher
2017). Always 0 <= C' <= C, so that for any orthonormal rows D orthogonal to the range of Y

    tr(D C D^T) <= tr(C) - tr(C'),

a bound that is known, not estimated: `Spectrum.rest`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .errors import CalibrationError
from .sampling import InputSample, joined

Features = Literal["means", "tokens"]
FEATURES: tuple[Features, ...] = ("means", "tokens")

CHUNK = 8192
"""Tokens that are copied at once."""

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Eigenvalues below this share of the largest are rounding, by the dtype of the sums."""

_CORE_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}
"""The same for Omega^T Y, whose inverse would blow rounding up."""


@dataclass(frozen=True)
class MomentOptions:
    """What is kept of a layer's inputs.

    Attributes:
        features: "means": the mean over the tokens of each sample, as OSRM takes them; "tokens": every
            token. A sample is one item of the batch in one call.
        exact_limit: Widest layer whose (d, d) matrix is kept.
        sketch: Columns l of the sketch of wider layers.
    """

    features: Features = "means"
    exact_limit: int = 1024
    sketch: int = 256

    def columns(self, width: int) -> int:
        """Columns that are kept of a layer with this many inputs."""
        return width if width <= self.exact_limit else max(1, min(self.sketch, width // 2))


def sketch_matrix(width: int, columns: int) -> Tensor:
    """Omega, (d, l) float32 on the CPU; the same for every layer of this width."""
    generator = torch.Generator().manual_seed(width)
    return torch.randn(width, columns, generator=generator, dtype=torch.float32)


class Spectrum(NamedTuple):
    """Leading eigenpairs of C, or of what the sketch knows of it.

    Attributes:
        values: (p,) float64, falling, above rounding.
        vectors: (d, p) float64, orthonormal columns.
        rest: Trace of C outside of them: no orthonormal rows orthogonal to `vectors` see more.
    """

    values: Tensor
    vectors: Tensor
    rest: float


@dataclass(frozen=True)
class InputMoments:
    """Second moments of one layer's inputs; sums over disjoint tokens add up.

    Attributes:
        total: (d, d), C itself, or (d, l) with l < d, its sketch C Omega.
        trace: Trace of C, the sum of the squared norms.
        tokens: Weighted tokens, or samples where means were taken.
        nonfinite: Tokens left out because a value was NaN or infinite.
        sample: A few of the tokens as they are, where that was asked for.
    """

    total: Tensor
    trace: float
    tokens: float
    nonfinite: int = 0
    sample: InputSample | None = None

    @property
    def width(self) -> int:
        """Inputs d of the layer; of a convolution in * prod(kernel)."""
        return self.total.shape[0]

    @property
    def exact(self) -> bool:
        """Whether C itself is there."""
        return self.total.shape[0] == self.total.shape[1]

    def __add__(self, other: InputMoments) -> InputMoments:
        if self.total.shape != other.total.shape:
            raise CalibrationError(
                f"moments of shape {tuple(self.total.shape)} and {tuple(other.total.shape)} do not add up.",
                remedy="gather both with the same exact_limit and sketch.",
            )
        dtype = torch.promote_types(self.total.dtype, other.total.dtype)
        samples = [one.sample for one in (self, other) if one.sample is not None]
        return InputMoments(
            self.total.to(dtype) + other.total.to(dtype),
            self.trace + other.trace,
            self.tokens + other.tokens,
            self.nonfinite + other.nonfinite,
            joined([(one, 1.0) for one in samples]) if len(samples) == 2 else None,
        )

    def per_token(self) -> InputMoments:
        """C divided by the number of tokens, which counts 1 from then on."""
        if self.tokens <= 0:
            return self
        scaled = self.total.to(torch.float64) / self.tokens
        return InputMoments(scaled.to(self.total.dtype), self.trace / self.tokens, 1.0, self.nonfinite)

    def to(self, device: torch.device) -> InputMoments:
        """The same on a device that has float64."""
        return self if self.total.device == device else replace(self, total=self.total.to(device))

    @cached_property
    def spectrum(self) -> Spectrum:
        """Eigenpairs of C, or of its Nystroem approximation."""
        total = self.total.to(torch.float64)
        if self.exact:
            values, vectors = torch.linalg.eigh((total + total.T) / 2)
            values, vectors = values.flip(0), vectors.flip(1)
        else:
            values, vectors = self._nystroem(total)
        largest = float(values[0]) if values.numel() else 0.0
        keep = values > _TOLERANCE[self.total.dtype] * max(largest, 0.0)
        values, vectors = values[keep], vectors[:, keep]
        return Spectrum(values, vectors, max(0.0, self.trace - float(values.sum())))

    @property
    def unexplained(self) -> float:
        """Mean energy in a direction that a sketch does not know, `rest / (d - p)`; 0 where C is there."""
        if self.exact:
            return 0.0
        return self.spectrum.rest / max(1, self.width - len(self.spectrum.values))

    def _nystroem(self, total: Tensor) -> tuple[Tensor, Tensor]:
        omega = sketch_matrix(self.width, total.shape[1]).to(total)
        core = omega.T @ total
        weights, mix = torch.linalg.eigh((core + core.T) / 2)
        keep = weights > _CORE_TOLERANCE[self.total.dtype] * weights[-1].clamp_min(0)
        factor = total @ (mix[:, keep] / weights[keep].sqrt())
        vectors, roots, _ = torch.linalg.svd(factor, full_matrices=False)
        return roots.square(), vectors

    def gram_of(self, rows: Tensor) -> Tensor:
        """`Z Z^T` for Z = rows X, the inputs seen through any rows (r, d): (r, r) float64.

        Of a sketch a lower bound, short of the truth by at most `spectrum.rest * |rows|^2`.
        """
        rows = rows.to(self.total.device, torch.float64)
        if self.exact:
            return rows @ self.total.to(torch.float64) @ rows.T
        seen = (rows @ self.spectrum.vectors) * self.spectrum.values.sqrt()
        return seen @ seen.T

    def filled_gram(self, rows: Tensor) -> Tensor:
        """The same, estimated: what a sketch does not know is taken as spread evenly over the directions outside."""
        gram = self.gram_of(rows)
        if self.exact:
            return gram
        rows = rows.to(gram)
        known = rows @ self.spectrum.vectors
        return gram + self.unexplained * (rows @ rows.T - known @ known.T)


class MomentsAccumulator:
    """Running second moments of one layer during one task's passes; stays on the device.

    Args:
        width: Inputs of the layer.
        options: What is kept.
        omega: `sketch_matrix` on the device and in `dtype`, or None where C itself is kept.
        device: Of the inputs.
        dtype: Of the sums, float32 or float64.
    """

    def __init__(
        self, width: int, options: MomentOptions, omega: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        columns = width if omega is None else omega.shape[1]
        wide = torch.float64 if device.type == "cpu" else torch.float32
        self.features, self.omega = options.features, omega
        self.total = torch.zeros(width, columns, device=device, dtype=dtype)
        self.trace = torch.zeros((), device=device, dtype=wide)
        self.tokens = torch.zeros((), device=device, dtype=wide)
        self.nonfinite = torch.zeros((), device=device, dtype=torch.int64)

    def add(self, chunks: Iterable[Tensor], weight: Tensor | None = None) -> None:
        """Add the inputs of one call.

        Args:
            chunks: (S, T_i, d) each: all tokens of S samples, piece by piece. Tokens with NaN or
                infinity are left out and counted.
            weight: (S, T) non-negative weights of the tokens, or None for 1.
        """
        at = 0
        sums: Tensor | None = None
        mass: Tensor | None = None
        for chunk in chunks:
            x = chunk.to(self.total.dtype)
            finite = torch.isfinite(x).all(dim=-1)
            self.nonfinite += (~finite).sum()
            x = torch.where(finite[..., None], x, 0.0)
            counted = finite.to(x)
            if weight is not None:
                counted = counted * weight[:, at : at + x.shape[1]].to(x)
            at += x.shape[1]
            if self.features == "tokens":
                self._add(x.flatten(0, 1), counted.flatten())
            else:
                part = torch.einsum("std,st->sd", x, counted)
                sums = part if sums is None else sums + part
                mass = counted.sum(dim=1) if mass is None else mass + counted.sum(dim=1)
        if sums is not None and mass is not None:
            seen = (mass > 0).to(sums)
            self._add(sums / torch.where(mass > 0, mass, 1.0)[:, None], seen)

    def _add(self, rows: Tensor, weight: Tensor) -> None:
        rows = rows * weight.sqrt()[:, None]
        self.tokens += weight.sum(dtype=self.tokens.dtype)
        self.trace += rows.square().sum(dtype=self.trace.dtype)
        self.total.addmm_(rows.T, rows if self.omega is None else rows @ self.omega)

    def result(self) -> InputMoments:
        """What was gathered, in main memory."""
        return InputMoments(self.total.cpu(), float(self.trace), float(self.tokens), int(self.nonfinite))
