"""Tokens that are held out of the fit, so that a router can be judged by what it has not seen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .triangles import pack, unpack

HELD_OUT = 8
"""One token of so many is held out; 0 would be none."""

FIRST_HELD = 3
"""Place of the held-out token among `HELD_OUT`: a layer of four tokens still has one."""


@dataclass(frozen=True)
class HeldOut:
    """The share of a stack's statistics that the held-out tokens make up.

    Attributes:
        packed: (K, R (R + 1) / 2): their part of each S_k, as upper triangles (`triangles.pack`).
        tokens: (K,) float64, their weighted number.
    """

    packed: Tensor
    tokens: Tensor

    @property
    def gram(self) -> Tensor:
        """(K, R, R), unpacked anew each time."""
        return unpack(self.packed)

    def pick(self, blocks: Tensor, rows: Tensor) -> HeldOut:
        """The same of some tasks and coordinates."""
        return HeldOut(pack(self.gram[blocks][:, rows][:, :, rows]), self.tokens[blocks])


def first_held(seen: int, every: int) -> int:
    """Index of the first held-out token among those that come after `seen` others."""
    return (FIRST_HELD - seen) % every
