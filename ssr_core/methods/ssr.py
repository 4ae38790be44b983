"""Subspace Signal Routing in canonical coordinates: the default."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..errors import SolveError
from ..gram import GramStats
from ..router import Anchor, anchor_router, correlation, guide, pooled, solve
from ..stacks import LayerStack
from .base import CanonicalProblem, MergedFactors, absorb, canonical_problem


@dataclass(frozen=True)
class SSRMerge:
    """Least-squares router, ridge relative to the mean signal, pulled toward an anchor.

    Where the statistics have readers P the router reads `[basis; P] x`, and the result is
    `up M [basis; P]`: M is the row-wise least squares over more inputs, the rank stays R.

    Attributes:
        ridge: Fraction of the mean diagonal of G (of its R coordinates, whatever the readers see) that
            is added to its diagonal; 0 is plain least squares and needs more independent tokens than
            rank and readers in every layer.
        anchor: Router that directions without data keep; it takes nothing from readers.
        balance: Weight tasks equally instead of by their number of tokens.
    """

    name: ClassVar[str] = "ssr"
    needs_calibration: ClassVar[bool] = True

    ridge: float = 0.01
    anchor: Anchor = "sum"
    balance: bool = True

    def merge(
        self, stacks: Sequence[LayerStack], stats: Sequence[GramStats | None], device: torch.device
    ) -> list[MergedFactors]:
        """Solve all layers, batched over those of equal rank."""
        answers: list[MergedFactors | None] = [None] * len(stacks)
        batches: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, (stack, one) in enumerate(zip(stacks, stats, strict=True)):
            batches[(stack.rank + (0 if one is None else one.reader_rows), len(stack.blocks))].append(index)
        for (size, _), indices in batches.items():
            for at in range(0, len(indices), _batch_size(size)):
                chunk = indices[at : at + _batch_size(size)]
                for index, answer in zip(
                    chunk, self._solve([stacks[i] for i in chunk], [stats[i] for i in chunk], device), strict=True
                ):
                    answers[index] = answer
        return [answer for answer in answers if answer is not None]

    def _solve(
        self, stacks: Sequence[LayerStack], stats: Sequence[GramStats | None], device: torch.device
    ) -> list[MergedFactors]:
        problems = [canonical_problem(s, one, device, wide=True) for s, one in zip(stacks, stats, strict=True)]
        routers: list[tuple[Tensor, float]] = [(torch.zeros(0), 0.0)] * len(stacks)
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, problem in enumerate(problems):
            by_size[(sum(problem.ranks), _width(problem))].append(index)
        for (size, width), indices in by_size.items():
            if size == 0:
                for i in indices:
                    routers[i] = (torch.zeros(0, width, dtype=torch.float64, device=device), float("nan"))
                continue
            terms = [self._terms(problems[i], stats[i]) for i in indices]
            q, g, anchor, mu = (torch.stack(parts) for parts in zip(*terms, strict=True))
            router, conditions, ok = solve(q, g, anchor, mu)
            for i, one, fine, number in zip(indices, router, ok.tolist(), conditions.tolist(), strict=True):
                if not fine:
                    raise _unsolvable(stacks[i], stats[i], self.ridge)
                routers[i] = (one, number)
        return [
            absorb(stack, problem, *answer) for stack, problem, answer in zip(stacks, problems, routers, strict=True)
        ]

    def _terms(self, problem: CanonicalProblem, stats: GramStats | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Q, G, R0 and mu of one layer; a layer without data is its anchor."""
        size, width = sum(problem.ranks), _width(problem)
        if problem.grams is None or stats is None or not stats.complete:
            grams = torch.zeros(len(problem.ranks), width, width, dtype=torch.float64, device=problem.ups.device)
        else:
            grams = pooled(problem.grams, stats.tokens.to(problem.grams.device), self.balance)
        g = correlation(grams)
        g = (g + g.T) / 2
        own = g.diagonal()[:size]
        unseen = own.sum() == 0
        mu = torch.where(unseen, torch.ones_like(g[0, 0]), self.ridge * own.mean())
        chosen: Anchor = "sum" if bool(unseen) and self.anchor == "zero" else self.anchor
        anchor = functional.pad(anchor_router(chosen, grams, problem.ranks), (0, width - size))
        return guide(grams, problem.ranks), g, anchor, mu


def _width(problem: CanonicalProblem) -> int:
    """R + E."""
    return sum(problem.ranks) + (0 if problem.readers is None else len(problem.readers))


def _batch_size(rank: int) -> int:
    """Layers solved at once: about 256 MiB of float64 matrices."""
    return max(1, (1 << 25) // max(1, 8 * rank * rank))


def _unsolvable(stack: LayerStack, stats: GramStats | None, ridge: float) -> SolveError:
    tokens = 0.0 if stats is None else float(stats.tokens.sum())
    if stats is not None and not bool(torch.isfinite(stats.gram).all()):
        return SolveError(
            "the statistics overflowed.", layer=str(stack.target), remedy="calibrate in a wider dtype (bfloat16)."
        )
    return SolveError(
        f"ridge {ridge:g} leaves no solution: {tokens:.0f} tokens for rank {stack.rank}.",
        layer=str(stack.target),
        remedy="set ridge to 0.01.",
    )
