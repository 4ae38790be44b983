"""NP-LoRA: LoRAs are kept out of the directions that a protected LoRA reads (arXiv:2511.11051)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..canonical import NULL_TOLERANCE, effective_directions
from ..directions import orthonormal_span, principal_directions
from ..errors import IncompatibleError, SolveError
from ..gram import GramStats
from ..router import block_slices
from ..stacks import LayerStack
from .base import CanonicalProblem, MergedFactors, canonical_problem

Directions = Literal["weights", "activations"]
DIRECTIONS: tuple[Directions, ...] = ("weights", "activations")


@dataclass(frozen=True)
class NPLoRAMerge:
    """Null-space projection: `sum_protected dW + sum_others dW (I - c V V^T)`, `c = mu / (1 + mu)`.

    The columns of V (in, p) are orthonormal and lie in the protected LoRA's row space (that of the
    unfolded kernel for a convolution). Only the downs of the other LoRAs change, each on its own; among
    themselves they are summed. So are several protected LoRAs, whose directions V holds together. Rows
    that any file of the merge names apart (q, k, v of a fused layer) have a V of their own, from the
    protected LoRA's same rows. A layer that no protected LoRA has is a plain sum.

    V is chosen in the row space of the protected `dW` (`directions.principal_directions`):

    - "weights" (the paper): the right-singular directions of `dW` with the largest singular values.
    - "activations" (ours): the directions through which its output on its own prompt flows, from the
      protected LoRA's own block of the Gram of its own passes. Where all directions are taken both
      choices give the same V, but for directions that the prompt never visited: activations leave
      those unprotected.

    Attributes:
        mu: Strength of the projection, not negative: 0 is the plain sum.
        hard: Project in full, c = 1, the limit of a large mu; `mu` then counts for nothing.
        protected: Indices of the protected LoRAs among all of the merge; negative ones count from the end.
        energy: Share of the energy (squared singular values of `dW`, or of `dW X`) that the directions
            of each protected LoRA have to hold; 1 takes all above rounding.
        count: At most this many directions for each protected LoRA; 0 sets no limit.
        directions: What they are chosen by. "activations" needs a calibration; in layers that it did not
            see, weights decide, and the report counts them as anchored.

    Raises:
        IncompatibleError: A parameter is out of its range.
    """

    name: ClassVar[str] = "np_lora"

    mu: float = 0.5
    hard: bool = False
    protected: tuple[int, ...] = (-1,)
    energy: float = 1.0
    count: int = 0
    directions: Directions = "weights"

    def __post_init__(self) -> None:
        if not (self.mu >= 0 and math.isfinite(self.mu)):
            raise _refused(f"mu is {self.mu}.", "use a number from 0 on, or hard for the full projection.")
        if not 0 < self.energy <= 1:
            raise _refused(f"the energy share is {self.energy}.", "use more than 0 and at most 1.")
        if self.count < 0:
            raise _refused(f"the number of directions is {self.count}.", "use 0 for no limit.")
        if self.directions not in DIRECTIONS:
            raise _refused(f"directions is {self.directions!r}.", f"use one of {', '.join(DIRECTIONS)}.")

    @property
    def needs_calibration(self) -> bool:
        """Only if activations choose the directions."""
        return self.directions == "activations"

    @property
    def share(self) -> float:
        """c, what the others lose of a protected direction."""
        return 1.0 if self.hard else self.mu / (1 + self.mu)

    def check_roles(self, active: Sequence[bool]) -> None:
        """Refuse LoRAs among which none is to be protected, or none to be projected."""
        if len(active) < 2:
            raise _refused(
                f"{len(active)} LoRA is enabled; one is protected and one is kept out of its directions.",
                "connect at least two LoRAs with strengths other than 0.",
            )
        roles = self._roles(len(active))
        if not any(active[index] for index in roles):
            raise _refused("every protected LoRA has strength 0.", "raise its strength, or merge by sum.")
        if not any(on for index, on in enumerate(active) if index not in roles):
            raise _refused("every LoRA that acts is protected.", "leave one unprotected, or merge by sum.")

    def describe_roles(self, names: Sequence[str]) -> str:
        """Which LoRAs are protected from which."""
        roles = self._roles(len(names))
        others = ", ".join(name for index, name in enumerate(names) if index not in roles)
        return f"Protected: {', '.join(names[index] for index in sorted(roles))}. Kept out of its directions: {others}."

    def merge(
        self, stacks: Sequence[LayerStack], stats: Sequence[GramStats | None], device: torch.device
    ) -> list[MergedFactors]:
        """Project layer by layer."""
        return [self._one(stack, one, device) for stack, one in zip(stacks, stats, strict=True)]

    def _roles(self, count: int) -> frozenset[int]:
        """The protected LoRAs among `count`."""
        if not self.protected or not all(-count <= index < count for index in self.protected):
            raise _refused(
                f"protected is {list(self.protected)}, and there are {count} LoRAs.",
                f"use indices from 0 to {count - 1}, or from -1 (the last) to {-count}.",
            )
        return frozenset(index % count for index in self.protected)

    def _one(self, stack: LayerStack, stats: GramStats | None, device: torch.device) -> MergedFactors:
        roles = self._roles(stack.count)
        problem = canonical_problem(stack, stats, device)
        basis, ups = problem.basis(stack, torch.float64), problem.ups.double()
        blocks = block_slices(problem.ranks)
        guards = [
            self._guard(stack, problem, stats, at, blocks[at]) for at, task in enumerate(stack.tasks) if task in roles
        ]
        others = [block for task, block in zip(stack.tasks, blocks, strict=True) if task not in roles]
        regions = self._regions(stack, basis, ups, guards)
        pieces = [(basis[guard.block], ups[:, guard.block]) for guard in guards]
        before = after = 0.0
        for block in others:
            for region in regions:
                up = region.only(ups[:, block])
                kept = effective_directions(up)
                down, up = kept.T @ basis[block], up @ kept
                before += _energy(down, up)
                down = down - self.share * (down @ region.v) @ region.v.T
                after += _energy(down, up)
                pieces.append((down, up))
        downs, all_ups = (torch.cat(parts, dim) for dim, parts in enumerate(zip(*pieces, strict=True)))
        measures = {}
        if guards and before > 0:
            sizes = [region.v.shape[1] for region in regions]
            measures["protected directions"] = sum(sizes) / len(sizes)
            measures["share of the others' energy removed"] = 1 - after / before
        view = None
        if len(regions) == 1:  # one router for all rows, in the coordinates that diagnostics know
            router = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
            for block in others:
                router[block] -= self.share * (basis[block] @ regions[0].v) @ regions[0].coefficients.T
            view = problem.view(router)
        return MergedFactors(downs.to(problem.ups), all_ups.to(problem.ups), view, measures=measures)

    def _guard(
        self, stack: LayerStack, problem: CanonicalProblem, stats: GramStats | None, at: int, block: slice
    ) -> _Guard:
        """One protected LoRA, with its statistics if activations choose and the layer has them."""
        if not self.needs_calibration or stats is None or not stats.complete or problem.grams is None:
            # the ups carry rounding of their dtype, which must not pass for directions
            return _Guard(block, None, max(NULL_TOLERANCE, 64 * torch.finfo(problem.ups.dtype).eps) ** 2)
        gram = problem.grams[at][block, block]
        if not bool(torch.isfinite(gram).all()):
            raise SolveError(
                "the statistics overflowed.", layer=str(stack.target), remedy="calibrate in a wider dtype (bfloat16)."
            )
        return _Guard(block, gram, len(gram) * torch.finfo(stats.gram.dtype).eps)

    def _regions(self, stack: LayerStack, basis: Tensor, ups: Tensor, guards: Sequence[_Guard]) -> list[_Region]:
        """The stack's rows, divided where their directions differ."""
        regions, free = [], []
        for rows in _rows_apart(stack):
            found = [ups.new_zeros(len(basis), 0)]
            for guard in guards if self.share else ():
                inside = principal_directions(
                    ups[rows, guard.block], guard.gram, energy=self.energy, count=self.count, floor=guard.floor
                )
                placed = ups.new_zeros(len(basis), inside.shape[1])
                placed[guard.block] = inside
                found.append(placed)
            coefficients = torch.cat(found, dim=1)
            if coefficients.shape[1] == 0:
                free.append(rows)
            else:
                alone = len(guards) == 1  # orthonormal as they come
                span = (coefficients, basis.T @ coefficients) if alone else orthonormal_span(basis, coefficients)
                regions.append(_Region([rows], *span))
        if free:
            empty = ups.new_zeros(len(basis), 0)
            regions.append(_Region(free, empty, basis.T @ empty))
        return regions


class _Guard(NamedTuple):
    """One protected LoRA in a stack.

    Attributes:
        block: Its coordinates.
        gram: (r, r) of its own prompt there, if activations choose.
        floor: Energies below this share of the largest are rounding.
    """

    block: slice
    gram: Tensor | None
    floor: float


class _Region(NamedTuple):
    """Rows of a stack with the same directions.

    Attributes:
        rows: Their ranges.
        coefficients: (R, p), `v = basis^T coefficients`; zero outside the protected blocks.
        v: (in, p), orthonormal.
    """

    rows: list[slice]
    coefficients: Tensor
    v: Tensor

    def only(self, up: Tensor) -> Tensor:
        """`up` with zeros outside these rows."""
        kept = torch.zeros_like(up)
        for rows in self.rows:
            kept[rows] = up[rows]
        return kept


def _rows_apart(stack: LayerStack) -> list[slice]:
    """Ranges of rows inside which no LoRA's part begins or ends."""
    edges = {0, stack.out_features}
    for block in stack.blocks:
        for start, layer in block.parts:
            edges |= {start, start + layer.up.shape[0]}
    return [slice(*ends) for ends in pairwise(sorted(edges))]


def _energy(down: Tensor, up: Tensor) -> float:
    """|up @ down|_F^2."""
    return float(((up.T @ up) * (down @ down.T)).sum())


def _refused(what: str, remedy: str) -> IncompatibleError:
    return IncompatibleError(f"NP-LoRA: {what}", remedy=remedy)
