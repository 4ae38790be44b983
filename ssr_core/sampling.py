"""A few tokens of a layer's input, drawn from all calls of a pass in bounded memory.

Priority sampling (Duffield, Lund, Thorup 2007): a token of weight w draws u from (0, 1) and has
priority `w / u`; the n highest are kept, and stand for all with the weights `max(w, tau)`, tau the
highest priority that was not kept. Weighted sums over the sample are then unbiased, and exact as
long as there are no more than n tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import CalibrationError
from .heldout import HELD_OUT, first_held

_BITS = 23
"""Of a drawn number: with half a step added it is exact in float32, and neither 0 nor 1."""


_NARROW = 4
"""How many times more tokens a layer keeps that has fewer inputs than refinement solves equations.

Its time still grows with them, if not with their cube.
"""


@dataclass(frozen=True)
class SampleOptions:
    """How many whole inputs are kept.

    Attributes:
        tokens: Tokens n that are kept of each layer and task, in the dtype of the activations.
        seed: Of the sampling.
        most: Equations that refinement solves in a layer: as many as there are tokens or, if that is less,
            inputs. A layer with more inputs than this keeps as many tokens in all, another four times as many:
            with many LoRAs each keeps fewer.

    Raises:
        CalibrationError: No token to keep.
    """

    tokens: int = 256
    seed: int = 0
    most: int = 1280

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise CalibrationError(f"a sample of {self.tokens} tokens.", remedy="keep at least one token.")

    def room(self, width: int) -> int:
        """Tokens that a layer of so many inputs keeps in all: a narrow one's equations are no more for them."""
        return self.most if width > self.most else _NARROW * self.most

    def shared_by(self, tasks: int, width: int) -> SampleOptions:
        """Of a layer of so many inputs that so many LoRAs have."""
        return replace(self, tokens=max(1, min(self.tokens, self.room(width) // tasks)))


@dataclass(frozen=True)
class InputSample:
    """Tokens of one layer's input during one task.

    Attributes:
        rows: (m, d), at most n tokens in the dtype of the activations.
        weights: (m,) float64, positive: how many tokens each one stands for.
        held: (m,) bool, True for the held-out tokens among them; None where none were held out.
    """

    rows: Tensor
    weights: Tensor
    held: Tensor | None = None

    def part(self, held: bool) -> InputSample | None:
        """The held-out tokens, or the others; None if there are none, or if which is which is not known."""
        if self.held is None or not bool((self.held == held).any()):
            return None
        return InputSample(self.rows[self.held == held], self.weights[self.held == held])


def thinned(sample: InputSample, tokens: int) -> InputSample:
    """The first tokens of a sample, which are those of highest priority, standing for all of it."""
    if len(sample.rows) <= tokens:
        return sample
    kept, held = sample.weights[:tokens], None if sample.held is None else sample.held[:tokens]
    return InputSample(sample.rows[:tokens], kept * (sample.weights.sum() / kept.sum()), held)


def bounded(samples: Sequence[InputSample]) -> list[InputSample]:
    """Samples of all tasks with no more tokens together than their layer has room for, e.g. of combined runs.

    What is too much is drawn once more by priority, with numbers that depend on a token's place only, and keeps its
    weight in all. Sums of runs stay whole until here, so that they are associative.
    """
    width = max((one.rows.shape[1] for one in samples), default=0)
    room = max(1, SampleOptions().room(width) // max(1, len(samples)))
    return [one if len(one.rows) <= room else _drawn(one, room) for one in samples]


def _drawn(sample: InputSample, tokens: int) -> InputSample:
    priorities = sample.weights / _uniform(0, len(sample.rows), SampleOptions().seed, sample.weights.device)
    best, order = priorities.topk(tokens + 1)
    kept = order[:-1].sort().values
    weights = torch.maximum(sample.weights[kept], best[-1])
    held = None if sample.held is None else sample.held[kept]
    return InputSample(sample.rows[kept], weights * (sample.weights.sum() / weights.sum()), held)


def joined(parts: Sequence[tuple[InputSample, float]]) -> InputSample:
    """One sample of several runs; each token stands for `weight` times as many.

    The order of the tokens does not depend on that of the runs, so that sums of runs commute.
    """
    if len(parts) == 1:
        ((only, weight),) = parts
        return replace(only, weights=weight * only.weights)
    dtype = functools.reduce(torch.promote_types, [sample.rows.dtype for sample, _ in parts])
    rows = torch.cat([sample.rows.to(dtype) for sample, _ in parts])
    weights = torch.cat([weight * sample.weights for sample, weight in parts])
    flags = [sample.held for sample, _ in parts if sample.held is not None]
    order = (rows.double() @ torch.arange(1, rows.shape[1] + 1, dtype=torch.float64).sqrt()).argsort(stable=True)
    held = torch.cat(flags)[order] if len(flags) == len(parts) else None
    return InputSample(rows[order], weights[order], held)


class TokenSampler:
    """Draws the sample of one layer during one task's passes; stays on the device and never waits for it.

    The same token of the same calls draws the same number whatever the device, the layer or the task
    is: where the calls are alike, all tasks are seen at the same places.

    Args:
        options: How many are kept.
        held_out: One token of so many counts as held out, the same as in the Grams; 0 for none.
    """

    def __init__(self, options: SampleOptions, held_out: int = HELD_OUT) -> None:
        self._options, self._every = options, held_out
        self._seen = 0
        # one more than is kept: the last one's priority is tau
        self._rows: Tensor | None = None
        self._priorities = torch.zeros(0)
        self._marks = torch.zeros(0, 2)  # weight; 1 if held out

    def add(self, chunks: Iterable[Tensor], usable: Tensor, weight: Tensor | None = None) -> None:
        """Offer the tokens of one call.

        Args:
            chunks: (S, T_i, d) each: the tokens of S samples, piece by piece.
            usable: (S * T,) bool, False for tokens to leave out.
            weight: (S * T,) non-negative weight of each token, or None for 1.
        """
        weights = usable.to(torch.float32) if weight is None else torch.where(usable, weight.to(torch.float32), 0.0)
        priorities = weights / _uniform(self._seen, len(usable), self._options.seed, usable.device)
        held = torch.zeros_like(weights)
        if self._every:
            held[first_held(self._seen, self._every) :: self._every] = 1
        self._seen += len(usable)
        at = 0
        for chunk in chunks:
            samples, count = chunk.shape[:2]
            mine = [part.view(samples, -1)[:, at : at + count].flatten() for part in (priorities, weights, held)]
            self._offer(chunk.flatten(0, 1), mine[0], torch.stack(mine[1:], dim=1))
            at += count

    def _offer(self, rows: Tensor, priorities: Tensor, marks: Tensor) -> None:
        room = self._options.tokens + 1
        best, order = priorities.topk(min(room, len(priorities)))
        rows, marks = rows[order], marks[order]
        if self._rows is not None:
            rows, marks = torch.cat([self._rows, rows]), torch.cat([self._marks, marks])
            best, order = torch.cat([self._priorities, best]).topk(min(room, len(rows)))
            rows, marks = rows[order], marks[order]
        self._rows, self._priorities, self._marks = rows, best, marks

    def result(self) -> InputSample | None:
        """What was drawn, in main memory; None if there was no token to draw."""
        keep = self._options.tokens
        marks, priorities = self._marks.cpu().double(), self._priorities.cpu().double()
        threshold = priorities[keep] if len(priorities) > keep else priorities.new_zeros(())
        drawn = (priorities > 0)[:keep]
        if self._rows is None or not bool(drawn.any()):
            return None
        weights, held = marks[:keep][drawn].unbind(dim=1)
        estimated = torch.maximum(weights, threshold)
        return InputSample(self._rows[:keep].cpu()[drawn].clone(), estimated, held > 0 if self._every else None)


def _uniform(start: int, count: int, seed: int, device: torch.device) -> Tensor:
    """(count,) float32 in (0, 1): a hash of the tokens' numbers from `start` on, the same on every device."""
    x = (torch.arange(start, start + count, device=device) + 0x9E3779B9 * (seed + 1)) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # Wellons' lowbias32
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    uniform: Tensor = ((x >> (32 - _BITS)).to(torch.float32) + 0.5) / 2**_BITS
    return uniform
