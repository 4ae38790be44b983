"""A calibration: all passes in one round, or more of them, from the second on with the merge in the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ssr_core import (
    HELD_OUT,
    ROUNDS,
    Calibration,
    Calibrator,
    LayerStack,
    MemoryBudgetError,
    Ranks,
    Scene,
    SSRMerge,
    assemble,
    build_stacks,
    check_memory,
    memory_need,
    merge,
    parse_scenes,
    with_rounds,
)
from ..ssr_core.errors import ClipMissingError
from . import host, pipeline
from .loading import Loaded
from .model_info import model_identity
from .options import CalibrationOptions, SolveOptions
from .passes import CALIBRATION_SHARE, Passes, count_passes

SOLVE_SHARE = 0.2
"""Of a round in the progress bar, for the merge that the next round runs on."""


def calibrate(
    loaded: Loaded,
    model: Any,
    clip: Any | None,
    options: CalibrationOptions,
    progress: host.Progress,
    ranks: Ranks | None = None,
) -> Calibration:
    """One short sampling pass for each LoRA and prompt, that LoRA alone, and for each scene; the same noise for all.

    Further rounds run the same passes on the merge of the rounds before (`ssr_core.round_sums`).

    Args:
        loaded: The LoRAs.
        model: The MODEL.
        clip: Its CLIP.
        options: Noise, size, sigmas and so on.
        progress: Moves by steps.
        ranks: Processes that share the passes; each of them gets the whole calibration.

    Raises:
        CalibrationError: A pass failed, a LoRA has neither prompt nor CONDITIONING, or scenes have no CLIP.
        IncompatibleError: A joint prompt names a LoRA that is not there.
        MemoryBudgetError: The statistics would not fit.
    """
    stacks, ranks, names = build_stacks(loaded.tasks), ranks or Ranks(), [task.name for task in loaded.tasks]
    shared = any(len(stack.blocks) > 1 for stack in stacks)
    # with one LoRA switched on nothing is calibrated, and a prompt for several is no mistake
    scenes = parse_scenes(options.joint_prompts, options.neutral_prompts, names) if shared else ()
    # memory may be short for one process alone: all of them have to keep the same
    held_out = ranks.least(_held_out_within_budget(stacks, model, options, len(scenes)) if shared else HELD_OUT)
    count = options.rounds if shared else 1
    total = _Round(stacks, scenes, held_out, count).run(loaded, model, clip, options, progress, ranks)
    for number in range(1, count):
        host.check_cancel()
        with_merge = _merged(loaded, model, clip, total, progress, CALIBRATION_SHARE * number / count)
        found = _Round(stacks, scenes, held_out, count, number).run(loaded, *with_merge, options, progress, ranks)
        total = with_rounds([total, replace(found, model=total.model)])
    return total


@dataclass(frozen=True)
class _Round:
    """All passes once.

    Attributes:
        stacks: The LoRAs' stacks.
        scenes: Prompts of several LoRAs or none.
        held_out: One token of so many is held out.
        count: Rounds in all.
        number: Of this one, from 0; from 1 on a merge of the LoRAs is in the model.
    """

    stacks: Sequence[LayerStack]
    scenes: Sequence[Scene]
    held_out: int
    count: int
    number: int = 0

    def run(
        self,
        loaded: Loaded,
        model: Any,
        clip: Any | None,
        options: CalibrationOptions,
        progress: host.Progress,
        ranks: Ranks,
    ) -> Calibration:
        """Every LoRA's prompts, then the scenes."""
        scenes = self.scenes
        parts = [
            Calibrator(
                [s for s in self.stacks if s.target.part == part],
                options.padding,
                options.sample,
                self.held_out,
                scenes,
                merged=self.number > 0,
            )
            for part in ("model", "clip")
        ]
        settings = {**options.settings(), ROUNDS: 1, "held_out": self.held_out}
        if any(len(stack.blocks) > 1 for stack in self.stacks):
            if scenes and clip is None:
                first = scenes[0]
                raise ClipMissingError(
                    f"the {first.label} {first.prompt!r} needs a CLIP.",
                    remedy="connect CLIP, or empty joint_prompts and neutral_prompts.",
                )
            counts = [count_passes(entry) for entry in loaded.entries] + [1] * len(scenes)
            shares = ranks.shares(counts, whole=options.sample is not None)
            solve = 0 if self.number + 1 == self.count else SOLVE_SHARE
            until = max(progress.reached, CALIBRATION_SHARE * (self.number + 1 - solve) / self.count)
            at = (self.number, self.count)
            passes = Passes(loaded, model, clip, options, progress, shares, scenes, until=until, round=at)
            for index in range(len(loaded.tasks)):
                passes.run(index, *parts)
            for number in range(len(scenes)):
                passes.run_scene(number, *parts)
            settings = {**settings, "sigmas": passes.sigmas[:-1].tolist(), "latent": list(passes.latent.shape)}
            settings |= options.latent_content(model)
        return assemble(loaded.tasks, parts, model=model_identity(model), settings=settings, ranks=ranks)


def _merged(
    loaded: Loaded, model: Any, clip: Any | None, calibration: Calibration, progress: host.Progress, until: float
) -> tuple[Any, Any | None]:
    """MODEL and CLIP with the merge of a calibration so far, by the default method; fills the progress bar to `until`."""
    begin = progress.reached
    progress.doing(host.Activity("solve", tuple(task.name for task in loaded.tasks)))
    options = SolveOptions(SSRMerge(), "auto", "pass_through", "anchor", "auto")
    result = merge(
        loaded.tasks,
        options.method,
        calibration,
        dtype=torch.float32,
        device=host.compute_device(model),
        unsupported=options.unsupported,
        judge=False,
        tick=lambda done, total: progress.at(begin + max(0.0, until - begin) * done / max(1, total)),
    )
    found = pipeline.put_on(loaded, model, clip, result, calibration, options)
    return found.model, found.clip


def _held_out_within_budget(stacks: Sequence[LayerStack], model: Any, options: CalibrationOptions, scenes: int) -> int:
    """One token of how many is held out: none where that would not fit into memory; the report says so."""
    dtype, budgets = host.activation_dtype(model), host.memory_budgets(model.load_device, options.memory_budget_gb)
    try:
        check_memory(memory_need(stacks, dtype, options.sample, scenes=scenes, rounds=options.rounds), *budgets)
    except MemoryBudgetError:
        check_memory(memory_need(stacks, dtype, options.sample, 0, scenes, options.rounds), *budgets)
        return 0
    return HELD_OUT
