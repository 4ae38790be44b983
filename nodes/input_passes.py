"""Passes that gather layer inputs: the sampling of calibration, with other hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..ssr_core import (
    MOMENTS_REMEDY,
    InputCollector,
    InputLayer,
    InputMoments,
    MomentOptions,
    SharingError,
    Target,
    check_memory,
    moments_need,
)
from . import host
from .loading import Loaded
from .options import CalibrationOptions
from .passes import Passes


def gather(
    loaded: Loaded,
    model: Any,
    clip: Any | None,
    layers: Sequence[InputLayer],
    options: CalibrationOptions,
    moments: MomentOptions,
    progress: host.Progress,
    *,
    active: bool,
) -> list[Mapping[Target, InputMoments]]:
    """Moments of the inputs of some layers, for each task's prompts; the same noise for all.

    Args:
        loaded: The tasks, with the prompts of their entries.
        model: The MODEL.
        clip: The CLIP, if one is connected.
        layers: Whose inputs are gathered.
        options: How to sample.
        moments: What is kept.
        progress: Shows the passes.
        active: Whether each task's LoRA is on while its own passes run.

    Raises:
        CalibrationError: A pass failed or reached no layer.
        MemoryBudgetError: The moments would not fit.
    """
    need = moments_need(layers, moments, len(loaded.tasks))
    check_memory(need, *host.memory_budgets(model.load_device, options.memory_budget_gb), remedy=MOMENTS_REMEDY)
    tasks = loaded.tasks if active else ()
    collectors = [
        InputCollector([one for one in layers if one.target.part == part], moments, options.padding, tasks)
        for part in ("model", "clip")
    ]
    passes = Passes(loaded, model, clip, options, progress)
    for index in range(len(loaded.tasks)):
        try:
            passes.run(index, *collectors)
        except SharingError:  # a model whose layers share an input in one step and not in the next
            for collector in collectors:
                collector.share = False
            passes.run(index, *collectors)
    return [
        {target: one for collector in collectors for target, one in collector.moments(index).items()}
        for index in range(len(loaded.tasks))
    ]
