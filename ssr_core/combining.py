"""Sums of calibrations that were made apart: with other prompts, other seeds, on other machines.

The Grams are sums over tokens, so runs add up, with weights if wanted: that is also how the prompts of
runs made apart are reweighted or dropped without a pass, and how one more prompt is added by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .calibration import SAME_BASIS, Calibration
from .errors import IncompatibleError
from .files import json_text
from .gram import GramStats
from .heldout import HeldOut
from .records import TaskRecord
from .rounds import ROUNDS
from .sampling import InputSample, joined
from .scene_lines import settings_with_scenes
from .scenes import counted, summed_scenes
from .targets import Target
from .updates import keep

RUNS = "runs"
"""Setting of a combined calibration: what each of its runs was, with its weight."""

_AGAIN = "calibrate all of them with the same model, LoRAs and strengths."


def scaled(stats: GramStats, weight: float) -> GramStats:
    """Statistics whose tokens count `weight` times, in float64."""
    held, scenes = stats.held, stats.scenes
    if held is not None:
        held = HeldOut(weight * held.packed.double(), weight * held.tokens)
    if scenes is not None:
        scenes = replace(
            scenes,
            packed=weight * scenes.packed.double(),
            tokens=weight * scenes.tokens,
            samples=_scaled(scenes.samples, weight * scenes.tokens),
        )
    return replace(
        stats,
        gram=weight * stats.gram.double(),
        tokens=weight * stats.tokens,
        samples=_scaled(stats.samples, weight * stats.tokens),
        held=held,
        scenes=scenes,
    )


def _scaled(samples: Sequence[InputSample] | None, masses: Tensor) -> tuple[InputSample, ...] | None:
    """Samples that stand for so many tokens: their weights add up to their run's only on average."""
    if samples is None:
        return None
    return tuple(
        joined([(one, mass / float(one.weights.sum()))]) for one, mass in zip(samples, masses.tolist(), strict=True)
    )


def combine(calibrations: Sequence[Calibration], weights: Sequence[float] | None = None) -> Calibration:
    """The sum of calibrations of the same LoRAs on the same model, made apart.

    Associative and commutative (to rounding in float64). LoRAs keep their order where all have the
    same, else they are sorted by content. A LoRA's prompts are those of all runs.

    Args:
        calibrations: What is summed up.
        weights: How much each counts; None for 1. With 0.5 its tokens count half, with 0 not at all.

    Raises:
        IncompatibleError: Nothing to combine, other models or LoRAs (says what differs), or the same run twice.
    """
    weights = [1.0] * len(calibrations) if weights is None else list(weights)
    if not calibrations or len(weights) != len(calibrations):
        raise IncompatibleError(
            f"{len(weights)} weights for {len(calibrations)} calibrations.",
            remedy="connect at least one calibration, and write one weight for each or none at all.",
        )
    if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise IncompatibleError(f"the weights {weights} cannot be used.", remedy="use numbers of 0 or more, not all 0.")
    used = [(one, weight) for one, weight in zip(calibrations, weights, strict=True) if weight]
    order = _common_order([one for one, _ in used])
    parts = [(_ordered(one, order), weight) for one, weight in used]
    first = parts[0][0]
    for number, (one, _) in enumerate(parts[1:], 2):
        check_alike(first, one, number)
    runs = sorted((run for one, weight in parts for run in _runs(one, weight)), key=json_text)
    _check_once(runs)
    known = [counted(one.scenes) for one, _ in parts]
    scenes = sorted({scene for mine in known for scene in mine}, key=lambda one: (one[0].prompt, one[0].tasks, one[1]))
    stats: dict[Target, GramStats] = {}
    for target in first.stats:
        found = [scaled(one.stats[target], weight) for one, weight in parts]
        seen = summed_scenes(known, [one.scenes for one in found], scenes)
        stats[target] = replace(summed(found, target), scenes=seen)
    tasks = tuple(
        replace(
            record,
            name=min(one.tasks[index].name for one, _ in parts),
            prompts=_union([one.tasks[index].prompts for one, _ in parts]),
        )
        for index, record in enumerate(first.tasks)
    )
    settings = {**_common([one.settings for one, _ in parts]), RUNS: runs}
    return replace(first, tasks=tasks, stats=stats, settings=settings, scenes=tuple(scene for scene, _ in scenes))


def _common_order(calibrations: Sequence[Calibration]) -> list[str] | None:
    orders = {tuple(_label(record) for record in one.tasks) for one in calibrations}
    return None if len(orders) == 1 else sorted(next(iter(orders)))


def _label(record: TaskRecord) -> str:
    return json_text([record.fingerprint, record.strength_model, record.strength_clip, repr(record.convert_options)])


def _ordered(calibration: Calibration, order: list[str] | None) -> Calibration:
    """The LoRAs sorted, where the calibrations to combine have them in different orders."""
    if order is None:
        return calibration
    labels = [_label(record) for record in calibration.tasks]
    places = sorted(range(len(labels)), key=lambda index: (labels[index], json_text(calibration.tasks[index].prompts)))
    return keep(calibration, places)


def check_alike(first: Calibration, other: Calibration, number: int) -> None:
    """Refuse calibrations of other models or LoRAs.

    Raises:
        IncompatibleError: Says what differs in number `number`.
    """
    off: list[str] = []
    if first.model != other.model:
        off.append("the model")
    here, there = ({_label(r): r.name for r in one.tasks} for one in (first, other))
    off += [f"{here[label]} is only in the first" for label in here if label not in there]
    off += [f"{there[label]} is only in number {number}" for label in there if label not in here]
    if not off and len(first.tasks) != len(other.tasks):
        off.append("how often a LoRA is there")
    if not off and (first.stats.keys() != other.stats.keys() or first.stack_tasks != other.stack_tasks):
        off.append("the layers that the LoRAs share")
    if off:
        raise IncompatibleError(
            f"calibration {number} does not fit the first: {'; '.join(off)} (content or strength differs).",
            remedy=_AGAIN,
        )
    for target, mine in first.signatures.items():
        theirs = other.signatures.get(target)
        if theirs is None or mine.shape != theirs.shape or _far(mine, theirs):
            raise IncompatibleError(
                f"in calibration {number} the LoRAs have other coordinates.", layer=str(target), remedy=_AGAIN
            )


def _far(mine: Tensor, theirs: Tensor) -> bool:
    return float((mine - theirs).norm()) > SAME_BASIS * float(mine.norm())


def summed(parts: Sequence[GramStats], target: Target) -> GramStats:
    """The sum of `scaled` statistics of one stack; of scenes those of the first.

    Raises:
        IncompatibleError: The LoRAs have other ranks in some of them.
    """
    first = parts[0]
    if any(one.ranks != first.ranks for one in parts):
        raise IncompatibleError("the LoRAs have other ranks here.", layer=str(target), remedy=_AGAIN)
    return replace(
        first,
        gram=torch.stack([one.gram for one in parts]).sum(dim=0),
        tokens=torch.stack([one.tokens for one in parts]).sum(dim=0),
        nonfinite=torch.stack([one.nonfinite for one in parts]).sum(dim=0),
        samples=_samples(parts),
        held=_held(parts),
    )


def _held(parts: Sequence[GramStats]) -> HeldOut | None:
    """What all runs held out; None where one held out nothing, for then nobody knows which of its tokens fitted."""
    kept = [one.held for one in parts if one.held is not None]
    if len(kept) < len(parts):
        return None
    grams, tokens = torch.stack([one.packed for one in kept]), torch.stack([one.tokens for one in kept])
    return HeldOut(grams.sum(dim=0), tokens.sum(dim=0))


def _samples(parts: Sequence[GramStats]) -> tuple[InputSample, ...] | None:
    """The sampled inputs of all runs; None where a run that saw the layer kept none."""
    seen = [one for one in parts if bool((one.tokens > 0).any())]
    kept = [one.samples for one in seen if one.samples is not None]
    if not kept or len(kept) < len(seen):
        return None
    return tuple(joined([(one, 1.0) for one in mine]) for mine in zip(*kept, strict=True))


def _union(prompts: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """All prompts; as they stand where all runs had the same (or none), else sorted."""
    given = {one for one in prompts if one}
    return next(iter(given), ()) if len(given) < 2 else tuple(sorted({p for one in given for p in one}))


def _runs(calibration: Calibration, weight: float) -> list[dict[str, Any]]:
    earlier: Any = calibration.settings.get(RUNS)
    if earlier is None:
        prompts = [[record.fingerprint, list(record.prompts)] for record in calibration.tasks]
        # joint prompts name LoRAs by their numbers
        order = {"order": [record.fingerprint for record in calibration.tasks]} if calibration.scenes else {}
        names, settings = [record.name for record in calibration.tasks], calibration.settings
        settings = settings_with_scenes(settings, calibration.scenes, names) if settings else {}
        earlier = [{"settings": settings, "prompts": sorted(prompts), "weight": 1.0, **order}]
    return [{**run, "weight": run["weight"] * weight} for run in earlier]


def _check_once(runs: Sequence[Mapping[str, Any]]) -> None:
    seen: dict[str, Any] = {}
    for run in runs:
        # of two that differ in their rounds alone the first round would count double
        what = json_text([{k: v for k, v in run["settings"].items() if k != ROUNDS}, run["prompts"]])
        if what in seen and run["settings"]:
            raise IncompatibleError(
                f"the same run is in it twice (seed {run['settings'].get('seed')}): its tokens would count double.",
                remedy="remove one of them, or give the one a weight of 2.",
            )
        seen[what] = run


def _common(settings: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Settings in which all agree."""
    first = settings[0]
    return {
        name: value
        for name, value in first.items()
        if name != RUNS and all(name in one and json_text(one[name]) == json_text(value) for one in settings)
    }
