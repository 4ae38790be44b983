"""What one LoRA file holds for one model, with every key accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .errors import IncompatibleError
from .targets import Target

KeyStatus = Literal["low_rank", "converted", "vector", "unsupported", "shadowed", "unmatched"]


@dataclass(frozen=True)
class LoRALayer:
    """A low-rank change of one target: `delta = scale * up @ down`.

    Attributes:
        down: (r, in * prod(kernel)).
        up: (out, r).
        alpha: The file's alpha, or None where it has none (scale 1).
        kernel: Spatial kernel of the layer it changes; empty for linear layers.
    """

    down: Tensor
    up: Tensor
    alpha: float | None = None
    kernel: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.down.ndim != 2 or self.up.ndim != 2 or self.down.shape[0] != self.up.shape[1]:
            raise IncompatibleError(
                f"down {tuple(self.down.shape)} and up {tuple(self.up.shape)} are not a pair of factors."
            )

    @property
    def rank(self) -> int:
        """Number of rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """Alpha / rank, or 1 without alpha."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The dense change of the weight, (out, in * prod(kernel))."""
        return self.scale * (self.up.to(dtype) @ self.down.to(dtype))


@dataclass(frozen=True)
class KeyRecord:
    """Fate of one key of a LoRA file.

    Attributes:
        key: The key as the file spells it.
        status: What reading made of it.
        target: The target it belongs to, where it has one.
        reason: Why it is unsupported, shadowed or unmatched, or what it was converted to; empty otherwise.
        loader_key: The key under a name that the host's loader knows; empty where it has none.
    """

    key: str
    status: KeyStatus
    target: Target | None = None
    reason: str = ""
    loader_key: str = ""


@dataclass(frozen=True)
class DenseGroup:
    """Keys of one file that change one parameter in a way that is not low-rank (LoHa, LoKr, DoRA ...).

    Attributes:
        target: Module and rows.
        parameter: Name of the parameter inside the module.
        keys: The file's keys that belong to the change.
        kind: What it is, for reports.
        weight_shape: Shape of the whole parameter.
        is_map: Whether the parameter is the matrix of a linear map (else its change is simply added).
        bends: Whether the change is not proportional to the strength.
    """

    target: Target
    parameter: str
    keys: tuple[str, ...]
    kind: str
    weight_shape: tuple[int, ...]
    is_map: bool = True
    bends: bool = False

    @property
    def change_shape(self) -> tuple[int, ...]:
        """Shape of the change: the target's rows of the parameter."""
        rows = self.weight_shape[0] if self.target.out_slice is None else self.target.out_slice[1]
        return (rows, *self.weight_shape[1:])


ROUNDING = 2e-6
"""Relative error of a factorisation in float32 that is rounding alone."""

Rest = Literal["pass_through", "drop"]
RESTS: tuple[Rest, ...] = ("pass_through", "drop")


@dataclass(frozen=True)
class ConvertOptions:
    """How changes that are not low-rank are converted.

    Attributes:
        max_rank: Largest rank of a layer; 0 converts nothing.
        tolerance: Relative error (Frobenius) that a layer may have; the smallest rank that keeps it.
        rest: What becomes of the part that `max_rank` cuts off: the host applies it as a patch of its
            own, or it is dropped.
    """

    max_rank: int = 128
    tolerance: float = 1e-3
    rest: Rest = "pass_through"

    @property
    def bound(self) -> float:
        """The error that is aimed at: the tolerance, but not less than what float32 arithmetic leaves."""
        return max(self.tolerance, ROUNDING)


@dataclass(frozen=True)
class Conversion:
    """What a change that is not low-rank became.

    Attributes:
        group: The keys.
        rank: Rank of the factors; 0 for a vector, which is exact.
        error: Relative error (Frobenius) of the factors.
        rest_kept: Whether the host applies what the factors leave out as a patch of its own.
        rest: What they leave out of a replaced weight, dense like the file itself; None for other kinds, whose
            rest is the file's own keys less the factors.
    """

    group: DenseGroup
    rank: int
    error: float
    rest_kept: bool = False
    rest: Tensor | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Adapter:
    """One LoRA, read for one model.

    Attributes:
        name: What the user calls it (the file name).
        fingerprint: sha256 of its content.
        layers: Low-rank changes by target.
        vectors: Changes of biases and norms, by (target, parameter name): same shape as the parameter.
        records: One entry for each key of the file.
        dense: Changes that are not low-rank and not converted (yet); their keys are unsupported.
        conversions: What was converted.
        convert_options: How its changes that are not low-rank were converted, if they were.
        untapped: Targets whose module hooks cannot watch (the model reads the weight without calling it).
    """

    name: str
    fingerprint: str
    layers: Mapping[Target, LoRALayer]
    vectors: Mapping[tuple[Target, str], Tensor] = field(default_factory=dict)
    records: tuple[KeyRecord, ...] = ()
    dense: tuple[DenseGroup, ...] = ()
    conversions: tuple[Conversion, ...] = ()
    convert_options: ConvertOptions | None = None
    untapped: frozenset[Target] = frozenset()

    def keys_with(self, status: KeyStatus) -> list[KeyRecord]:
        """Records of one status."""
        return [record for record in self.records if record.status == status]
