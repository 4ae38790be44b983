"""Second moments of the stacked LoRA coordinates: the sufficient statistic of every router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import CalibrationError
from .sampling import InputSample


@dataclass(frozen=True)
class GramStats:
    """What calibration knows about one stack.

    Attributes:
        gram: (K, R, R), float32 or float64: `S_k = Z_k Z_k^T`, one for each block of the stack, in the
            stack's orthonormal coordinates.
        tokens: (K,) float64, number of (weighted) tokens in each S_k.
        nonfinite: (K,) int64, tokens left out because a coordinate was NaN or infinite.
        ranks: Rows that each block contributes to R.
        samples: Whole inputs of the layer, one sample for each block; None where none were kept.
    """

    gram: Tensor
    tokens: Tensor
    nonfinite: Tensor
    ranks: tuple[int, ...]
    samples: tuple[InputSample, ...] | None = None

    def __post_init__(self) -> None:
        k, r = len(self.ranks), sum(self.ranks)
        if self.gram.shape != (k, r, r) or self.tokens.shape != (k,) or self.nonfinite.shape != (k,):
            raise CalibrationError(
                f"statistics of shape {tuple(self.gram.shape)} do not belong to {k} LoRAs of ranks {self.ranks}."
            )
        if self.samples is not None and len(self.samples) != k:
            raise CalibrationError(f"{len(self.samples)} samples do not belong to {k} LoRAs.")

    @property
    def complete(self) -> bool:
        """Whether every task's pass reached the layer; without one of them a router would delete its LoRA."""
        return bool((self.tokens > 0).all())

    def subset(self, blocks: Sequence[int]) -> GramStats:
        """Statistics of some of the blocks, as if the others had never been there.

        The passes of the remaining tasks ran alone, so nothing of a dropped one is left in them.
        """
        starts = [sum(self.ranks[:i]) for i in range(len(self.ranks))]
        rows = [torch.arange(starts[b], starts[b] + self.ranks[b]) for b in blocks]
        index = torch.cat(rows)
        picked = torch.tensor(list(blocks), dtype=torch.long)
        gram = self.gram[picked][:, index][:, :, index]
        ranks = tuple(self.ranks[b] for b in blocks)
        samples = None if self.samples is None else tuple(self.samples[b] for b in blocks)
        return GramStats(gram, self.tokens[picked], self.nonfinite[picked], ranks, samples)


_CHUNK = 16384
"""Tokens added at once: a video layer's copies stay small."""

_PANEL = 256
"""Rows of a Gram added at once: what lies left of a panel's own square is the mirror of an earlier one."""


class GramAccumulator:
    """Running sum of `z^T z` for one stack during one task's passes; stays on the device.

    Nothing here waits for the device: counts are tensors too. Above `_PANEL` rows `gram` lacks what
    lies below its panels' squares until `to_host` has mirrored it.
    """

    def __init__(self, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        self.gram = torch.zeros(rank, rank, device=device, dtype=dtype)
        self.tokens = torch.zeros((), device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
        self.nonfinite = torch.zeros((), device=device, dtype=torch.int64)

    def add(self, z: Tensor, weight: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            z: (N, R), one row a token; rows with NaN or infinity are left out and counted.
            weight: (N,) non-negative weight of each token, or None for 1.
        """
        for start in range(0, z.shape[0], _CHUNK):
            self._add(z[start : start + _CHUNK], None if weight is None else weight[start : start + _CHUNK])

    def _add(self, z: Tensor, weight: Tensor | None) -> None:
        z = z.to(self.gram.dtype)
        finite = torch.isfinite(z.abs().amax(dim=1))  # amax keeps NaN; isfinite of all z makes several temporaries
        # Only on the CPU can one look without waiting, and then there is mostly nothing to mask.
        if z.device.type != "cpu" or not bool(finite.all()):
            self.nonfinite += (~finite).sum()
            z = torch.where(finite[:, None], z, 0.0)
        if weight is None:
            self.tokens += finite.sum()
        else:
            weight = weight.to(z) * finite
            self.tokens += weight.sum()
            z = z * weight.sqrt()[:, None]
        for start in range(0, z.shape[1], _PANEL):
            panel = slice(start, start + _PANEL)
            self.gram[panel, start:].addmm_(z[:, panel].T, z[:, start:])

    def to_host(self) -> None:
        """Move everything to main memory and make the Gram whole; nothing is added afterwards."""
        self.gram, self.tokens, self.nonfinite = self.gram.cpu(), self.tokens.cpu(), self.nonfinite.cpu()
        for end in range(_PANEL, self.gram.shape[0], _PANEL):
            panel = slice(end - _PANEL, end)
            self.gram[end:, panel] = self.gram[panel, end:].T
