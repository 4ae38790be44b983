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
from .combining import scaled, summed
from .gram import GramStats
from .scenes import counted, summed_scenes
from .targets import Target

ROUNDS = "rounds"
"""Setting of a calibration: how many there were; 1 where it does not say."""


def with_rounds(rounds: Sequence[Calibration]) -> Calibration:
    """One calibration from its rounds: the first with every LoRA alone, the others on merges of these.

    Args:
        rounds: Of the same LoRAs, prompts and settings, in order.
    """
    first = rounds[0]
    if len(rounds) == 1:
        return first
    scenes = counted(first.scenes)
    stats: dict[Target, GramStats] = {}
    for target, one in first.stats.items():
        parts = [scaled(each.stats[target], 1.0) for each in rounds]
        seen = summed_scenes([scenes] * len(parts), [part.scenes for part in parts], scenes)
        stats[target] = _narrowed(replace(summed(parts, target), scenes=seen), one.gram.dtype)
    settings = {**first.settings, ROUNDS: len(rounds)}
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
