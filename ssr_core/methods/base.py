"""What a merge method is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..canonical import effective_directions
from ..diagnostics import gram_of
from ..errors import SolveError
from ..finite import all_finite
from ..gram import GramStats
from ..refinement import sampled_grams
from ..stacks import LayerStack


@dataclass(frozen=True)
class RouterView:
    """A router and all that diagnostics need, in one system of coordinates.

    Attributes:
        router: (R, R + E); E is 0 unless the method reads more than the LoRAs' own coordinates.
        ups: (rows, R), before the router.
        ranks: Rows of each block in R.
        grams: (K, R + E, R + E) in the same coordinates, the mean over each task's tokens that the router was
            fitted on; None without statistics.
        frame: (R, R'), float64: from the coordinates of statistics to these; None if these are the same.
        rows: (R + E, in), float64: what is read of whole inputs, where E is not 0 and Grams do not hold it.
        known_up_gram: `up_gram`, where another router of the stack had it computed.
    """

    router: Tensor
    ups: Tensor
    ranks: tuple[int, ...]
    grams: Tensor | None
    frame: Tensor | None = None
    rows: Tensor | None = None
    known_up_gram: Tensor | None = field(default=None, repr=False)

    @cached_property
    def up_gram(self) -> Tensor:
        """W = B^T B (R, R), float64, of the ups: the same for every router of a stack."""
        return gram_of(self.ups) if self.known_up_gram is None else self.known_up_gram

    def express(self, stats: GramStats) -> Tensor | None:
        """Any statistics of the stack in these coordinates, per token: (K, R + E, R + E), float64.

        None where they lack the sampled inputs that the router was corrected by.
        """
        if self.rows is not None:
            if stats.samples is None:
                return None
            return sampled_grams(stats.samples, self.rows)
        gram = stats.per_token(self.router.device)
        return gram if self.frame is None else self.frame @ gram @ self.frame.T


@dataclass(frozen=True)
class MergedFactors:
    """A method's answer for one stack: `delta = up @ down`.

    Attributes:
        down: (R, in).
        up: (rows, R).
        view: The router behind it, for methods that have one.
        condition: Condition number of what was solved (a lower bound); nan where nothing was.
        measures: Numbers of the method's own for the report, by what they are called there.
    """

    down: Tensor
    up: Tensor
    view: RouterView | None = None
    condition: float = float("nan")
    measures: Mapping[str, float] = field(default_factory=dict)


class MergeMethod(Protocol):
    """Merges stacks of two or more adapters. Implementations are frozen dataclasses of parameters."""

    name: ClassVar[str]

    @property
    def needs_calibration(self) -> bool:
        """Whether it uses statistics; a class variable where no parameter decides it."""
        ...

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


@runtime_checkable
class RoleMethod(Protocol):
    """A merge method in which LoRAs play different parts."""

    def check_roles(self, active: Sequence[bool]) -> None:
        """Refuse LoRAs among which a part is not taken, before any work is done.

        Args:
            active: For each LoRA whether it acts on anything.

        Raises:
            IncompatibleError: Says which part is not taken.
        """
        ...

    def describe_roles(self, names: Sequence[str]) -> str:
        """Which of the LoRAs plays which part, in one sentence for the report."""
        ...


@runtime_checkable
class RefitMethod(Protocol):
    """A merge method that solves again for other statistics at less than the cost of a merge."""

    def refit(
        self,
        stacks: Sequence[LayerStack],
        stats: Sequence[GramStats],
        answers: Sequence[MergedFactors],
        device: torch.device,
    ) -> list[RouterView]:
        """The routers that `merge` would find from these statistics; nothing is absorbed.

        Args:
            stacks: Stacks that were merged before.
            stats: Other statistics of them.
            answers: What `merge` gave then: a stack's coordinates are taken over.
            device: Where to compute.

        Raises:
            SolveError: A layer has no finite answer; names it.
        """
        ...


def routes(method: MergeMethod) -> bool:
    """Whether a method tells LoRAs apart by the signals of their prompts, and not by parts given to them."""
    return method.needs_calibration and not isinstance(method, RoleMethod)


@dataclass(frozen=True)
class CanonicalProblem:
    """One stack in the coordinates on which its ups really act.

    Attributes:
        ups: (rows, R''), float32 or float64: the stacked ups.
        ranks: Rows of each block in R''.
        reduce: (R', R''), float64, block-diagonal: from the stack's orthonormal coordinates to these;
            None if these are the same.
        grams: (K, R'', R''), float64, the mean over each task's tokens; or None.
        scenes: (J, R'', R''), float64: the same of the scenes; None where there are none.
    """

    ups: Tensor
    ranks: tuple[int, ...]
    reduce: Tensor | None
    grams: Tensor | None
    scenes: Tensor | None = None

    @staticmethod
    def again(view: RouterView, stats: GramStats, device: torch.device) -> CanonicalProblem:
        """The problem behind a router, with other statistics.

        Args:
            view: A router in coordinates of `canonical_problem`.
            stats: Other statistics of the same stack.
            device: Where to compute.
        """
        reduce = None if view.frame is None else view.frame.T
        return CanonicalProblem(view.ups, view.ranks, reduce, *_reduced(stats, reduce, device))

    def view(self, router: Tensor) -> RouterView:
        """A router in these coordinates."""
        frame = None if self.reduce is None else self.reduce.T
        return RouterView(router, self.ups, self.ranks, self.grams, frame)

    def basis(self, stack: LayerStack, dtype: torch.dtype) -> Tensor:
        """(R'', in): the directions of these coordinates, orthonormal within each block."""
        basis = stack.basis.to(self.ups.device, dtype)
        return basis if self.reduce is None else self.reduce.T.to(dtype) @ basis


def canonical_problem(stack: LayerStack, stats: GramStats | None, device: torch.device) -> CanonicalProblem:
    """Express a stack and its statistics in canonical coordinates.

    Args:
        stack: The stack.
        stats: Its statistics.
        device: Where to compute.
    """
    ups, reduces = [], []
    for position in range(len(stack.blocks)):
        up = stack.canonical_up(position).to(device)
        if not all_finite(up):
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
    reduce: Tensor | None = None if sum(ranks) == sum(stack.basis_ranks) else torch.block_diag(*reduces)
    return CanonicalProblem(torch.cat(ups, dim=1), ranks, reduce, *_reduced(stats, reduce, device))


def _reduced(
    stats: GramStats | None, reduce: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Grams of the tasks and of the scenes in the coordinates that `reduce` leads to."""
    if stats is None:
        return None, None
    grams = stats.per_token(device)
    scenes = None if stats.scenes is None else stats.scenes.per_token(device)
    if reduce is None:
        return grams, scenes
    return reduce.T @ grams @ reduce, None if scenes is None else reduce.T @ scenes @ reduce


def absorb(stack: LayerStack, problem: CanonicalProblem, router: Tensor, condition: float) -> MergedFactors:
    """Absorb a router into the ups: (reduced basis, ups @ router)."""
    dtype = problem.ups.dtype
    view = problem.view(router)
    return MergedFactors(problem.basis(stack, dtype), problem.ups @ router.to(dtype), view, condition)
