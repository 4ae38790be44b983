"""Second moments of the stacked LoRA coordinates: the sufficient statistic of every router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import CalibrationError
from .heldout import HELD_OUT, HeldOut, first_held
from .sampling import InputSample
from .scenes import SceneStats
from .triangles import pack, packed_size, per_token


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
        held: What of the Grams held-out tokens contributed; None where none were held out.
        scenes: What passes with several LoRAs or none saw; None where there were no such passes.
    """

    gram: Tensor
    tokens: Tensor
    nonfinite: Tensor
    ranks: tuple[int, ...]
    samples: tuple[InputSample, ...] | None = None
    held: HeldOut | None = None
    scenes: SceneStats | None = None

    def __post_init__(self) -> None:
        k, r = len(self.ranks), sum(self.ranks)
        fits = self.gram.shape == (k, r, r) and self.tokens.shape == (k,) and self.nonfinite.shape == (k,)
        if self.held is not None:
            fits &= self.held.packed.shape == (k, packed_size(r)) and self.held.tokens.shape == (k,)
        if self.scenes is not None:
            fits &= self.scenes.fits(k, r)
        if not fits:
            raise CalibrationError(
                f"statistics of shape {tuple(self.gram.shape)} do not belong to {k} LoRAs of ranks {self.ranks}."
            )
        if self.samples is not None and len(self.samples) != k:
            raise CalibrationError(f"{len(self.samples)} samples do not belong to {k} LoRAs.")

    @property
    def complete(self) -> bool:
        """Whether every task's pass reached the layer; without one of them a router would delete its LoRA."""
        return bool((self.tokens > 0).all())

    @property
    def lost(self) -> int:
        """Tokens of all passes that were left out because they were not finite."""
        return int(self.nonfinite.sum()) + (0 if self.scenes is None else int(self.scenes.nonfinite.sum()))

    @property
    def all_samples(self) -> tuple[InputSample, ...]:
        """Those of the blocks and those of the scenes."""
        scenes = () if self.scenes is None else self.scenes.samples or ()
        return (*(self.samples or ()), *scenes)

    def per_token(self, device: torch.device) -> Tensor:
        """(K, R, R), float64: the mean over each task's tokens, zero for a task without any; a copy."""
        return per_token(self.gram, self.tokens, device)

    def fitted(self) -> GramStats | None:
        """Statistics of the tokens that were not held out; None where nothing was, or nothing else is left."""
        if self.held is None:
            return None
        tokens = self.tokens - self.held.tokens
        # both counts are float32 sums on some devices
        if not bool((tokens > 1e-5 * self.tokens).all()):
            return None
        rest = self.held.gram.neg_().add_(self.gram)
        return replace(self, gram=rest, tokens=tokens, samples=_parts(self.samples, held=False), held=None)

    def held_out(self) -> GramStats | None:
        """Statistics of the held-out tokens alone; None unless every task has some."""
        if self.held is None or not bool((self.held.tokens > 0).all()):
            return None
        nothing, samples = torch.zeros_like(self.nonfinite), _parts(self.samples, held=True)
        return GramStats(self.held.gram, self.held.tokens, nothing, self.ranks, samples)

    def subset(self, blocks: Sequence[int], scenes: Sequence[int] = ()) -> GramStats:
        """Statistics of some of the blocks, as if the others had never been there.

        In the first round the remaining tasks ran alone, so nothing of a dropped one is left in them; the merges of
        further rounds (`round_sums`) had it.

        Args:
            blocks: Which stay, in their new order.
            scenes: Which scenes stay: those in which no dropped LoRA acted, here or in another layer.
        """
        known = 0 if self.scenes is None else len(self.scenes.active)
        chosen = None if self.scenes is None else self.scenes.choose(scenes)
        if list(blocks) == list(range(len(self.ranks))):
            return self if list(scenes) == list(range(known)) else replace(self, scenes=chosen)
        starts = [sum(self.ranks[:i]) for i in range(len(self.ranks))]
        rows = [torch.arange(starts[b], starts[b] + self.ranks[b]) for b in blocks]
        index = torch.cat(rows)
        picked = torch.tensor(list(blocks), dtype=torch.long)
        gram = self.gram[picked][:, index][:, :, index]
        ranks = tuple(self.ranks[b] for b in blocks)
        samples = None if self.samples is None else tuple(self.samples[b] for b in blocks)
        held = None if self.held is None else self.held.pick(picked, index)
        chosen = None if chosen is None else chosen.pick(picked, index)
        return GramStats(gram, self.tokens[picked], self.nonfinite[picked], ranks, samples, held, chosen)


def _parts(samples: Sequence[InputSample] | None, *, held: bool) -> tuple[InputSample, ...] | None:
    """The held-out tokens of all samples, or the others; None unless every task has some."""
    found = [part for sample in samples or () if (part := sample.part(held)) is not None]
    return tuple(found) if samples is not None and len(found) == len(samples) else None


_CHUNK = 16384
"""Tokens added at once: a video layer's copies stay small."""

_PANEL = 256
"""Rows of a Gram added at once: what lies left of a panel's own square is the mirror of an earlier one."""


class GramAccumulator:
    """Running sum of `z^T z` for one stack during one task's passes; stays on the device.

    Nothing here waits for the device: counts are tensors too. Above `_PANEL` rows `gram` lacks what
    lies below its panels' squares until `to_host` has mirrored it. Every `held_out`-th token also goes
    into a Gram of its own, which `gram` contains: a router for judging is fitted on the difference.

    Args:
        rank: R.
        device: Where the tokens are.
        dtype: Of the sums.
        held_out: One token of so many is held out; 0 for none.
    """

    def __init__(self, rank: int, device: torch.device, dtype: torch.dtype, held_out: int = HELD_OUT) -> None:
        count = torch.zeros((), device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
        self.gram = torch.zeros(rank, rank, device=device, dtype=dtype)
        self.tokens = count
        self.nonfinite = torch.zeros((), device=device, dtype=torch.int64)
        self.held_gram = torch.zeros_like(self.gram) if held_out else None
        self.held_tokens = count.clone()
        self._every, self._seen = held_out, 0

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
        counts = finite
        if weight is not None:
            counts = weight.to(z) * finite
            z = z * counts.sqrt()[:, None]
        self.tokens += counts.sum()
        _add_gram(self.gram, z)
        if self.held_gram is not None:
            held = slice(first_held(self._seen, self._every), None, self._every)
            self._seen += len(z)
            if held.start < len(z):
                self.held_tokens += counts[held].sum()
                _add_gram(self.held_gram, z[held])

    def to_host(self) -> None:
        """Move everything to main memory, `gram` whole and `held_gram` packed; nothing is added afterwards."""
        self.tokens, self.held_tokens, self.nonfinite = (
            count.cpu() for count in (self.tokens, self.held_tokens, self.nonfinite)
        )
        self.gram = _whole(self.gram.cpu())
        self.held_gram = None if self.held_gram is None else pack(self.held_gram.cpu()[None])[0]


def _add_gram(gram: Tensor, z: Tensor) -> None:
    """Add `z^T z` to the upper panels of a Gram."""
    for start in range(0, z.shape[1], _PANEL):
        panel = slice(start, start + _PANEL)
        gram[panel, start:].addmm_(z[:, panel].T, z[:, start:])


def _whole(gram: Tensor) -> Tensor:
    """Mirror what was left out below the panels' squares, in place."""
    for end in range(_PANEL, gram.shape[0], _PANEL):
        panel = slice(end - _PANEL, end)
        gram[end:, panel] = gram[panel, end:].T
    return gram
