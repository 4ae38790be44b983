"""The published formula to the letter: no canonical coordinates, absolute ridge toward zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import SolveError
from ..gram import GramStats
from ..router import correlation, guide, pooled
from ..stacks import LayerStack
from .base import MergedFactors, RouterView


@dataclass(frozen=True)
class PaperMerge:
    """`Rt = (Q/N) (G/N + lambda I)^-1` in the file's own coordinates `z = down x`.

    Kept for comparison with the published code. The answer depends on how up and down share a
    LoRA's scale, and directions that calibration did not visit lose their LoRA.

    Attributes:
        ridge: The absolute lambda.
    """

    name: ClassVar[str] = "paper"
    needs_calibration: ClassVar[bool] = True

    ridge: float = 1e-4

    def merge(
        self, stacks: Sequence[LayerStack], stats: Sequence[GramStats | None], device: torch.device
    ) -> list[MergedFactors]:
        """Solve layer by layer."""
        return [self._one(stack, one, device) for stack, one in zip(stacks, stats, strict=True)]

    def _one(self, stack: LayerStack, stats: GramStats | None, device: torch.device) -> MergedFactors:
        down = torch.cat([block.down for block in stack.blocks]).to(device, torch.float64)
        up = torch.cat([block.up for block in stack.blocks], dim=1).to(device, torch.float64)
        mix = torch.block_diag(*stack.mixes).to(device)
        ranks = [block.rank for block in stack.blocks]
        if stats is None or not stats.complete:
            return MergedFactors(down, up)
        means = mix @ stats.per_token(device) @ mix.T
        grams = pooled(means, stats.tokens.to(device), balanced=False)
        g = correlation(grams)
        eye = torch.eye(g.shape[0], dtype=g.dtype, device=device)
        # Q G^-1 by solving with the symmetric G from the other side.
        router, info = torch.linalg.solve_ex(g + self.ridge * eye, guide(grams, ranks).T)
        if int(info) != 0 or not bool(torch.isfinite(router).all()):
            raise SolveError("the published formula has no finite answer.", layer=str(stack.target))
        view = RouterView(router.T, up, tuple(ranks), means, mix)
        return MergedFactors(down, up @ router.T, view)
