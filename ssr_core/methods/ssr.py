"""Subspace Signal Routing in canonical coordinates: the default."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..diagnostics import scene_errors
from ..errors import IncompatibleError, SolveError
from ..gram import GramStats
from ..refinement import LEAST_RIDGE, SMALLEST_RIDGE, Refinement, refine, sampled_grams
from ..router import Anchor, anchor_router, correlation, guide, pooled, pooled_scenes, solve, with_scenes
from ..scenes import JOINT_WEIGHT, NEUTRAL_WEIGHT, SceneStats, selectors
from ..stacks import LayerStack
from .base import CanonicalProblem, MergedFactors, RouterView, absorb, canonical_problem

LEFT_OUT = "error on sampled tokens left out of the fit"
UNCORRECTED = "the same without the correction from sampled tokens"
JOINT = "error on joint prompts"
NEUTRAL = "effect left on prompts under which no LoRA of the layer acts"


@dataclass(frozen=True)
class SSRMerge:
    """Least-squares router, ridge relative to the mean signal, pulled toward an anchor.

    Joint and neutral prompts (`scenes`) take part where calibration had some.

    Attributes:
        ridge: Fraction of the mean diagonal of G that is added to its diagonal; 0 is plain least squares
            and needs more independent tokens than rank in every layer.
        anchor: Router that directions without data keep.
        balance: Weight tasks equally instead of by their number of tokens; a correction always weighs them equally.
        refine: Correct the downs by what the sampled inputs show outside of the LoRAs' own coordinates
            (`refinement`); does nothing where calibration kept no samples.
        joint_weight: How much a joint prompt counts: this times the number of its LoRAs (not balanced: of its
            tokens). More brings pictures that show them together nearer to their sum, and costs some of each
            LoRA's own prompts. A layer that has none of its LoRAs takes it as a neutral prompt.
        refine_ridge: Least ridge of the correction, as a fraction of the inputs' mean squared norm. Less comes
            nearer to each LoRA under its calibration prompt and strays further under other prompts.
        neutral_weight: How much all neutral prompts count together, as a share of all LoRAs together (not balanced:
            if each has as many tokens as a LoRA). Joint prompts of which a layer has no LoRA are among them there.
            Several prompts of little weight keep other pictures as they are at less cost to the LoRAs than one of
            much weight.

    Raises:
        IncompatibleError: A weight is negative or not finite, or `refine_ridge` below 1e-6 or not finite.
    """

    name: ClassVar[str] = "ssr"
    needs_calibration: ClassVar[bool] = True

    ridge: float = 0.01
    anchor: Anchor = "sum"
    balance: bool = True
    refine: bool = True
    joint_weight: float = JOINT_WEIGHT
    refine_ridge: float = LEAST_RIDGE
    neutral_weight: float = NEUTRAL_WEIGHT

    def __post_init__(self) -> None:
        for name, weight in (("joint_weight", self.joint_weight), ("neutral_weight", self.neutral_weight)):
            if not (weight >= 0 and math.isfinite(weight)):
                raise IncompatibleError(f"{name} is {weight}.", remedy="use a number from 0 on.")
        if not (self.refine_ridge >= SMALLEST_RIDGE and math.isfinite(self.refine_ridge)):
            raise IncompatibleError(f"refine_ridge is {self.refine_ridge}.", remedy=f"use {LEAST_RIDGE:g}.")

    def merge(
        self, stacks: Sequence[LayerStack], stats: Sequence[GramStats | None], device: torch.device
    ) -> list[MergedFactors]:
        """Solve all layers, batched over those of equal rank."""
        answers: list[MergedFactors | None] = [None] * len(stacks)
        batches: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, stack in enumerate(stacks):
            batches[(stack.rank, len(stack.blocks))].append(index)
        for (size, _), indices in batches.items():
            for at in range(0, len(indices), _batch_size(size)):
                chunk = indices[at : at + _batch_size(size)]
                some, ours = [stacks[i] for i in chunk], [stats[i] for i in chunk]
                problems = [canonical_problem(s, one, device) for s, one in zip(some, ours, strict=True)]
                found = zip(some, problems, ours, self._solve(some, problems, ours), strict=True)
                for index, (stack, problem, one, answer) in zip(chunk, found, strict=True):
                    answers[index] = self._absorbed(stack, problem, one, *answer)
        return [answer for answer in answers if answer is not None]

    def refit(
        self,
        stacks: Sequence[LayerStack],
        stats: Sequence[GramStats],
        answers: Sequence[MergedFactors],
        device: torch.device,
    ) -> list[RouterView]:
        """Solve for other statistics in the coordinates of earlier answers."""
        views = [answer.view for answer in answers if answer.view is not None]
        problems = [CanonicalProblem.again(view, one, device) for view, one in zip(views, stats, strict=True)]
        found = []
        routers = self._solve(stacks, problems, stats)
        for stack, problem, one, (router, _), view in zip(stacks, problems, stats, routers, views, strict=True):
            fit = self._corrected(stack, problem, one, router, view)
            found.append(problem.view(router) if fit is None else fit[1])
        return found

    def _solve(
        self, stacks: Sequence[LayerStack], problems: Sequence[CanonicalProblem], stats: Sequence[GramStats | None]
    ) -> list[tuple[Tensor, float]]:
        """Routers and condition numbers, batched over problems of equal size."""
        routers: list[tuple[Tensor, float]] = [(torch.zeros(0), 0.0)] * len(stacks)
        by_size: dict[int, list[int]] = defaultdict(list)
        for index, problem in enumerate(problems):
            by_size[sum(problem.ranks)].append(index)
        for size, indices in by_size.items():
            if size == 0:
                for i in indices:
                    routers[i] = (problems[i].ups.new_zeros(0, 0, dtype=torch.float64), float("nan"))
                continue
            terms = [self._terms(problems[i], stats[i]) for i in indices]
            q, g, anchor, mu = (torch.stack(parts) for parts in zip(*terms, strict=True))
            router, conditions, ok = solve(q, g, anchor, mu)
            for i, one, fine, number in zip(indices, router, ok.tolist(), conditions.tolist(), strict=True):
                if not fine:
                    raise _unsolvable(stacks[i], stats[i], self.ridge)
                routers[i] = (one, number)
        return routers

    def _absorbed(
        self, stack: LayerStack, problem: CanonicalProblem, stats: GramStats | None, router: Tensor, condition: float
    ) -> MergedFactors:
        """Routed factors; with a correction the router goes into the downs instead of the ups."""
        if stats is None or not len(router):
            return absorb(stack, problem, router, condition)
        seen = stats.scenes
        fit = self._corrected(stack, problem, stats, router)
        if fit is None:
            answer = absorb(stack, problem, router, condition)
            return answer if seen is None else replace(answer, measures=_scenes_measured(problem, seen, answer.view))
        found, view = fit
        assert view.rows is not None
        measures = {LEFT_OUT: found.left_out, UNCORRECTED: found.uncorrected}
        if seen is not None and seen.samples:
            chosen = selectors(seen.active.to(router.device), problem.ranks)
            measures |= _measures(view.router, sampled_grams(seen.samples, view.rows), chosen, view.up_gram)
        down = (router @ view.rows[: len(router)] + found.down).to(problem.ups.dtype)
        return MergedFactors(down, problem.ups, view, condition, measures)

    def _corrected(
        self,
        stack: LayerStack,
        problem: CanonicalProblem,
        stats: GramStats,
        router: Tensor,
        before: RouterView | None = None,
    ) -> tuple[Refinement, RouterView] | None:
        """A router's correction by sampled inputs, where there are some; `before` is any router of the same stack."""
        seen = stats.scenes
        if not self.refine or not len(router) or stats.samples is None or (seen is not None and seen.samples is None):
            return None
        plain, basis = before or problem.view(router), problem.basis(stack, torch.float64)
        chosen = router[:0] if seen is None else selectors(seen.active.to(router.device), problem.ranks)
        weights = [] if seen is None else (self._emphasis(seen) * seen.weights).tolist()
        scenes = zip(() if seen is None else seen.samples or (), chosen, weights, strict=True)
        counting = [one for one in scenes if one[-1] > 0]
        found = refine(stats.samples, basis, problem.ranks, router, plain.up_gram, counting, self.refine_ridge)
        if found is None:
            return None
        wide = torch.cat([router, torch.eye(len(router)).to(router)], dim=1)
        rows = torch.cat([basis, found.down])
        return found, RouterView(wide, problem.ups, problem.ranks, found.grams, plain.frame, rows, plain.up_gram)

    def _emphasis(self, seen: SceneStats) -> Tensor:
        return seen.emphasis(self.joint_weight, self.neutral_weight)

    def _terms(self, problem: CanonicalProblem, stats: GramStats | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Q, G, R0 and mu of one layer; a layer without data is its anchor."""
        size = sum(problem.ranks)
        if problem.grams is None or stats is None or not stats.complete:
            grams = torch.zeros(len(problem.ranks), size, size, dtype=torch.float64, device=problem.ups.device)
        else:
            grams = pooled(problem.grams, stats.tokens.to(problem.grams.device), self.balance)
        q, g = guide(grams, problem.ranks), correlation(grams)
        if problem.scenes is not None and stats is not None and stats.scenes is not None and stats.complete:
            seen = stats.scenes
            scenes = pooled_scenes(
                problem.scenes, seen.tokens.to(g), seen.weights.to(g), stats.tokens.to(g), self.balance
            )
            scenes = scenes * self._emphasis(seen).to(g)[:, None, None]
            q, g = with_scenes(q, g, scenes, selectors(seen.active.to(g.device), problem.ranks))
        g = (g + g.T) / 2
        own = g.diagonal()
        unseen = own.sum() == 0
        mu = torch.where(unseen, torch.ones_like(g[0, 0]), self.ridge * own.mean())
        chosen: Anchor = "sum" if bool(unseen) and self.anchor == "zero" else self.anchor
        return q, g, anchor_router(chosen, grams, problem.ranks), mu


def _scenes_measured(problem: CanonicalProblem, seen: SceneStats, view: RouterView | None) -> dict[str, float]:
    """Errors of a router that is not refined, from the scenes' second moments."""
    if problem.scenes is None or view is None:
        return {}
    device = view.router.device
    return _measures(view.router, problem.scenes, selectors(seen.active.to(device), problem.ranks), view.up_gram)


def _measures(router: Tensor, grams: Tensor, chosen: Tensor, up_gram: Tensor) -> dict[str, float]:
    """Errors on joint and on neutral prompts, relative to the plain sum.

    A joint prompt of LoRAs that a layer does not have is a neutral one there.
    """
    errors, energy = scene_errors(router, grams, chosen, up_gram)
    neutral = chosen.sum(dim=1) == 0
    found = {}
    for name, which in ((JOINT, ~neutral), (NEUTRAL, neutral)):
        if bool(energy[which].sum() > 0):
            found[name] = float((errors[which].sum() / energy[which].sum()).sqrt())
    return found


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
