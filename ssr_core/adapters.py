"""What one LoRA file holds for one model, with every key accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .errors import IncompatibleError
from .targets import Target

KeyStatus = Literal["low_rank", "vector", "unsupported", "shadowed", "unmatched"]


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
        reason: Why it is unsupported, shadowed or unmatched; empty otherwise.
    """

    key: str
    status: KeyStatus
    target: Target | None = None
    reason: str = ""


@dataclass(frozen=True)
class Adapter:
    """One LoRA, read for one model.

    Attributes:
        name: What the user calls it (the file name).
        fingerprint: sha256 of its content.
        layers: Low-rank changes by target.
        vectors: Changes of biases and norms, by (target, parameter name): same shape as the parameter.
        records: One entry for each key of the file.
    """

    name: str
    fingerprint: str
    layers: Mapping[Target, LoRALayer]
    vectors: Mapping[tuple[Target, str], Tensor] = field(default_factory=dict)
    records: tuple[KeyRecord, ...] = ()

    def keys_with(self, status: KeyStatus) -> list[KeyRecord]:
        """Records of one status."""
        return [record for record in self.records if record.status == status]
