"""What a merge method is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..canonical import effective_directions
from ..errors import SolveError
from ..gram import GramStats
from ..stacks import LayerStack


@dataclass(frozen=True)
class RouterView:
    """A router and all that diagnostics need, in one system of coordinates.

    Attributes:
        router: (R, R).
        ups: (rows, R), before the router.
        ranks: Rows of each block in R.
        grams: (K, R, R) in the same coordinates, not yet scaled; None without statistics.
    """

    router: Tensor
    ups: Tensor
    ranks: tuple[int, ...]
    grams: Tensor | None


@dataclass(frozen=True)
class MergedFactors:
    """A method's answer for one stack: `delta = up @ down`.

    Attributes:
        down: (R, in).
        up: (rows, R).
        view: The router behind it, for methods that have one.
        condition: Condition number of what was solved (a lower bound); nan where nothing was.
    """

    down: Tensor
    up: Tensor
    view: RouterView | None = None
    condition: float = float("nan")


class MergeMethod(Protocol):
    """Merges stacks of two or more adapters. Implementations are frozen dataclasses of parameters."""

    name: ClassVar[str]
    needs_calibration: ClassVar[bool]

    def merge(
        self, stacks: Sequence[LayerStack], stats: Sequence[GramStats | None], device: torch.device
    ) -> list[MergedFactors]:
        """Merge each stack.

        Args:
            stacks: Stacks with at least two blocks.
            stats: Their statistics; None or zero tokens where the layer never ran.
            device: Where to compute.

        Returns:
            One answer for each stack, in order.

        Raises:
            SolveError: A layer has no finite answer; names it.
        """
        ...


@dataclass(frozen=True)
class CanonicalProblem:
    """One stack in the coordinates on which its ups really act.

    Attributes:
        ups: (rows, R''), float32 or float64: the stacked ups.
        ranks: Rows of each block in R''.
        reduce: (R', R''), float64, block-diagonal: from the stack's orthonormal coordinates to these;
            None if these are the same.
        grams: (K, R'', R''), float64, or None.
    """

    ups: Tensor
    ranks: tuple[int, ...]
    reduce: Tensor | None
    grams: Tensor | None


def canonical_problem(stack: LayerStack, stats: GramStats | None, device: torch.device) -> CanonicalProblem:
    """Express a stack and its statistics in canonical coordinates."""
    ups, reduces = [], []
    for block in stack.blocks:
        up = block.canonical_up.to(device)
        if not bool(torch.isfinite(up).all()):
            raise SolveError(
                "a LoRA's values are not finite at this strength.",
                layer=str(stack.target),
                remedy="check the strengths, and the LoRA's alpha.",
            )
        directions = effective_directions(up)
        full = directions.shape[0] == directions.shape[1]
        ups.append(up if full else up @ directions.to(up))
        reduces.append(directions)
    ranks = tuple(directions.shape[1] for directions in reduces)
    grams = None if stats is None else stats.gram.to(device, torch.float64)
    if sum(ranks) == sum(stack.basis_ranks):
        return CanonicalProblem(torch.cat(ups, dim=1), ranks, None, grams)
    reduce: Tensor = torch.block_diag(*reduces)
    if grams is not None:
        grams = reduce.T @ grams @ reduce
    return CanonicalProblem(torch.cat(ups, dim=1), ranks, reduce, grams)


def absorb(stack: LayerStack, problem: CanonicalProblem, router: Tensor, condition: float) -> MergedFactors:
    """Absorb a router into the ups: (reduced basis, ups @ router)."""
    dtype = problem.ups.dtype
    down = stack.basis.to(problem.ups)
    if problem.reduce is not None:
        down = problem.reduce.T.to(dtype) @ down
    view = RouterView(router, problem.ups, problem.ranks, problem.grams)
    return MergedFactors(down, problem.ups @ router.to(dtype), view, condition)
