"""Further rounds of calibration, on the merged model.

A router that has seen each LoRA alone meets other inputs once it is in the model: its own errors of earlier layers
and steps have moved them. A further round runs the same prompts with the merge of the rounds before in the model, and
its tokens count beside theirs with the same targets: `E_k V x` for what the layers then read (dataset aggregation;
IterIS, which iterates merges likewise, forgets the earlier rounds).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .calibration import Calibration
from .combining import check_alike, scaled, summed
from .errors import IncompatibleError
from .gram import GramStats
from .rounds import ROUNDS, rounds_of
from .scenes import counted, summed_scenes
from .targets import Target


def with_rounds(rounds: Sequence[Calibration]) -> Calibration:
    """One calibration from its rounds: the first with every LoRA alone, the others on merges of these.

    Args:
        rounds: Of the same LoRAs, prompts and settings, in order; sums of rounds count as so many.

    Raises:
        IncompatibleError: There is none, or they are of other models, LoRAs or scenes.
    """
    if not rounds:
        raise IncompatibleError("there is no round of calibration.", remedy="give at least the first.")
    first = rounds[0]
    if len(rounds) == 1:
        return first
    for number, one in enumerate(rounds[1:], 2):
        check_alike(first, one, number)
        if one.scenes != first.scenes or [record.prompts for record in one.tasks] != [r.prompts for r in first.tasks]:
            raise IncompatibleError(f"round {number} ran other prompts.", remedy="run the same in all rounds.")
    scenes = counted(first.scenes)
    stats: dict[Target, GramStats] = {}
    for target, mine in first.stats.items():
        parts = [scaled(each.stats[target], 1.0) for each in rounds]
        seen = summed_scenes([scenes] * len(parts), [part.scenes for part in parts], scenes)
        stats[target] = _narrowed(replace(summed(parts, target), scenes=seen), mine.gram.dtype)
    settings = {**first.settings, ROUNDS: sum(rounds_of(one.settings) for one in rounds)}
    return replace(first, stats=stats, settings=settings)


def _narrowed(stats: GramStats, dtype: torch.dtype) -> GramStats:
    """Second moments in the dtype that passes gave them: `scaled` makes float64 of them."""
    held, scenes = stats.held, stats.scenes
    return replace(
        stats,
        gram=stats.gram.to(dtype),
        held=None if held is None else replace(held, packed=held.packed.to(dtype)),
        scenes=None if scenes is None else replace(scenes, packed=scenes.packed.to(dtype)),
    )
