"""Statistics of one stack as plain sums over tokens, for processes that add theirs up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from .gram import GramStats
from .heldout import HeldOut


def sums_of(stats: GramStats) -> dict[str, Tensor]:
    """All that is a sum over tokens, by name."""
    found = {"gram": stats.gram, "tokens": stats.tokens, "nonfinite": stats.nonfinite}
    if stats.held is not None:
        found |= {"packed": stats.held.packed, "held": stats.held.tokens}
    if stats.scenes is not None:
        scenes = stats.scenes
        found |= {"scenes": scenes.packed, "scene_tokens": scenes.tokens, "scene_nonfinite": scenes.nonfinite}
    return found


def shapes_of(stats: GramStats) -> list[tuple[str, tuple[int, ...]]]:
    """What is summed, for comparison; of scenes also which LoRAs act."""
    found = [(name, tuple(value.shape)) for name, value in sums_of(stats).items()]
    return found if stats.scenes is None else [*found, (str(stats.scenes.active.tolist()), ())]


def with_sums(stats: GramStats, sums: Mapping[str, Tensor]) -> GramStats:
    """The same with other sums; Grams in the dtype that they come in."""
    held = None if stats.held is None else HeldOut(sums["packed"], sums["held"])
    scenes = stats.scenes
    if scenes is not None:
        tokens, nonfinite = sums["scene_tokens"], sums["scene_nonfinite"]
        scenes = replace(scenes, packed=sums["scenes"], tokens=tokens, nonfinite=nonfinite)
    return replace(
        stats, gram=sums["gram"], tokens=sums["tokens"], nonfinite=sums["nonfinite"], held=held, scenes=scenes
    )
