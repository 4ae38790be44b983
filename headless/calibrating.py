"""The calibration of a recipe: by passes, as a sum of runs, from records, or from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from ..nodes import host, loading, options, pipeline, record_weights, recording
from ..nodes.calibrating import calibrate
from ..nodes.entries import LoRAEntries
from ..ssr_core import (
    PASS_DEFAULTS,
    ROUNDS,
    Adapter,
    Calibration,
    Ranks,
    Recipe,
    RecordUse,
    check_unsupported,
    combine,
    load_calibration,
)


class Calibrated(NamedTuple):
    """A calibration, and what else came out on the way.

    Attributes:
        calibration: None for methods that need none.
        known: LoRAs that were converted for it.
        loaded: The LoRAs as they were calibrated, if they were.
    """

    calibration: Calibration | None
    known: tuple[Adapter, ...] = ()
    loaded: loading.Loaded | None = None


def calibrated(
    recipe: Recipe,
    merging: LoRAEntries,
    model: Any,
    clip: Any | None,
    progress: host.Progress,
    beside: Path,
    ranks: Ranks,
) -> Calibrated:
    """Make the calibration, or read it.

    Args:
        recipe: Says how.
        merging: Its LoRAs, as they will be merged.
        model: The MODEL.
        clip: The CLIP, if there is one.
        progress: Moves by steps.
        beside: Folder that the calibration's file is relative to.
        ranks: Processes that share the passes; those of records are run by the first process alone.

    Raises:
        SSRMergeError: Says what is wrong, where, and what to do.
    """
    if recipe.settings is None:
        return Calibrated(None)
    if recipe.calibration_file is not None:
        return Calibrated(load_calibration(beside / recipe.calibration_file))
    if recipe.records is not None and ranks.rank > 0:
        return Calibrated(None)
    then = tuple(
        entry.with_strengths(*source.calibrated_at) for entry, source in zip(merging, recipe.sources, strict=True)
    )
    if recipe.records is not None:
        return _from_records(recipe, recipe.records, then, model, clip, progress)
    if not recipe.runs:
        return _run(recipe, recipe.settings, then, model, clip, progress, ranks, ())
    made: list[Calibrated] = []
    for run in recipe.runs:
        entries = tuple(replace(entry, prompts=prompts) for entry, prompts in zip(then, run.prompts, strict=True))
        known = made[-1].known if made else ()
        made.append(_run(recipe, run.settings, entries, model, clip, progress, ranks, known))
    parts = [one.calibration for one in made if one.calibration is not None]
    return Calibrated(combine(parts, [run.weight for run in recipe.runs]), made[-1].known, made[-1].loaded)


def _run(
    recipe: Recipe,
    settings: Mapping[str, Any],
    entries: LoRAEntries,
    model: Any,
    clip: Any | None,
    progress: host.Progress,
    ranks: Ranks,
    known: tuple[Adapter, ...],
) -> Calibrated:
    """One run of all LoRAs' prompts."""
    loaded = loading.load(entries, model, clip, progress, known)
    check_unsupported(loaded.tasks, cast(Any, recipe.unsupported))
    calibration = calibrate(loaded, model, clip, pass_options(settings), progress, ranks)
    return Calibrated(calibration, tuple(pipeline.socket_of(calibration, loaded).known(model)), loaded)


def _from_records(
    recipe: Recipe, use: RecordUse, entries: LoRAEntries, model: Any, clip: Any | None, progress: host.Progress
) -> Calibrated:
    """Records of just the size of then: found in the library, or made and kept there."""
    sampling = pass_options({**(recipe.settings or {}), ROUNDS: 1})  # records are of LoRAs alone
    loaded = loading.load(entries, model, clip, progress)
    check_unsupported(loaded.tasks, cast(Any, recipe.unsupported))
    how = recording.RecordingOptions(use.options, exactly=True)
    found = recording.obtain(loaded, model, clip, sampling, how, progress)
    loaded, _, calibration = record_weights.put_together(loaded, found, use.weights, sampling)
    return Calibrated(calibration, tuple(pipeline.socket_of(calibration, loaded).known(model)), loaded)


def pass_options(settings: Mapping[str, Any]) -> options.CalibrationOptions:
    """How to sample, by the settings of a recipe; what is absent is as in the nodes."""
    values = {**PASS_DEFAULTS, **{name: settings[name] for name in PASS_DEFAULTS if name in settings}}
    if "sigmas" in settings and settings.get("custom_sigmas", True):
        values["sigmas"] = torch.tensor([*settings["sigmas"], 0.0])  # what follows the last one is not evaluated
    if "latent" in settings and settings.get("custom_latent", True):
        fill = float(settings.get("latent_fill") or 0.0)
        values["latent"] = {"samples": torch.full(tuple(settings["latent"]), fill)}
    return options.calibration_options(values)
