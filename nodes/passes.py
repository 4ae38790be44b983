"""The calibration passes: each LoRA alone with its own prompts, then joint and neutral prompts, on the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ssr_core import (
    Calibrator,
    Scene,
    TextRows,
)
from ..ssr_core.errors import ClipMissingError
from . import host
from .entries import LoRAEntry
from .loading import Loaded, acting_on
from .model_info import joint_text, root_of
from .options import CalibrationOptions

CALIBRATION_SHARE = 0.9
"""Of the progress bar of a whole merge."""


def count_passes(entry: LoRAEntry) -> int:
    """Samplings that one LoRA takes: one for each prompt, or one of its CONDITIONING."""
    return 1 if entry.conditioning is not None else len(entry.prompts)


_Prepared = list[tuple[list[Any], TextRows | None]]


class Collector(Protocol):
    """What gathers something of one part of the model during the passes: `Calibrator`, `InputCollector`."""

    def task(self, index: int) -> AbstractContextManager[Any]:
        """A tap for one task's passes."""
        ...


class Passes:
    """Runs prompts through the text encoder and the diffusion model, with one LoRA or those of a scene.

    Args:
        loaded: The LoRAs.
        model: The MODEL.
        clip: Its CLIP.
        options: Noise, size, sigmas and so on.
        progress: Moves by steps.
        shares: For each LoRA, then each scene, which of its prompts are run here; None for all of them.
        scenes: Prompts of several LoRAs or none.
        until: Share of the progress bar that the passes fill.
        round: Index of the round, and how many there are; from the second on a merge of the LoRAs is in MODEL and
            CLIP, and none of them acts by itself.
    """

    def __init__(
        self,
        loaded: Loaded,
        model: Any,
        clip: Any | None,
        options: CalibrationOptions,
        progress: host.Progress,
        shares: Sequence[Sequence[int]] | None = None,
        scenes: Sequence[Scene] = (),
        *,
        until: float = CALIBRATION_SHARE,
        round: tuple[int, int] = (0, 1),
    ) -> None:
        self.round = round
        self.loaded, self.model, self.clip, self.options, self.progress = loaded, model, clip, options, progress
        self.latent, self.sigmas = options.latent_for(model), options.sigmas_for(model)
        self.noise = host.shared_noise(self.latent, options.seed)
        self.core_keys = host.core_key_map(model, clip)
        self.scenes = scenes
        self.shares = shares or [range(count_passes(entry)) for entry in loaded.entries] + [range(1)] * len(scenes)
        labels = [f"{scene.label} {number}" for number, scene in enumerate(scenes, 1)]
        self.names = (*(task.name for task in loaded.tasks), *labels)
        passes = sum(map(len, self.shares))
        progress.stage(progress.reached, until, passes * (len(self.sigmas) - 1))

    def run(self, index: int, model_calibrator: Collector, clip_calibrator: Collector) -> None:
        """All prompts of one LoRA; its statistics count only if every pass succeeds."""
        entry = self.loaded.entries[index]
        if not self.shares[index]:
            return
        # of a CONDITIONING there is one pass, but every prompt beside it is read by the text encoder
        given = entry.conditioning
        prompts = entry.prompts if given is not None else [entry.prompts[i] for i in self.shares[index]]
        ready: _Prepared = [] if given is None else [(given, _rows_of(given, [], self.model))]
        with ExitStack() as stack, _named_out_of_memory(entry.name):
            if self.clip is not None and (given is None or any(prompts)):
                encoded = self._encode((index,), prompts, stack.enter_context(clip_calibrator.task(index)))
                ready = ready or encoded
            elif given is None:
                remedy = "connect CLIP, or a CONDITIONING to SSR LoRA."
                raise ClipMissingError("its prompts need a CLIP.", file=entry.name, remedy=remedy)
            self._sample(index, (index,), ready, stack.enter_context(model_calibrator.task(index)))

    def run_scene(self, number: int, model_calibrator: Calibrator, clip_calibrator: Calibrator) -> None:
        """The prompt of one scene, with its LoRAs active; its statistics count only if the pass succeeds."""
        scene, place = self.scenes[number], len(self.loaded.tasks) + number
        if not self.shares[place]:
            return
        with ExitStack() as stack, _named_out_of_memory(self.names[place]):
            tap = stack.enter_context(clip_calibrator.scene(number))
            prepared = self._encode(scene.tasks, [scene.prompt], tap)
            self._sample(place, scene.tasks, prepared, stack.enter_context(model_calibrator.scene(number)))

    def _apart(self, acting: Sequence[int]) -> Sequence[int]:
        """LoRAs whose other parts have to be put onto the model: none where a merge has them."""
        return () if self.round[0] > 0 else acting

    def _sample(self, place: int, acting: Sequence[int], prepared: _Prepared, tap: Any) -> None:
        """Sample with each CONDITIONING; `place` is that of the LoRA or scene among all names."""
        if not tap.paths:  # LoRAs of the text encoder only
            return
        model = acting_on(self.loaded, self._apart(acting), "model", self.model, self.core_keys[0])
        tap.prepare(model.load_device, host.activation_dtype(model))
        steps = len(self.sigmas) - 1
        for number, (conditioning, rows) in enumerate(prepared):
            host.check_cancel()
            at = host.Activity("calibrate", self.names, place, number, len(prepared), steps, *self.round)
            self.progress.doing(at)
            tap.describe_text(rows)
            host.run_calibration_pass(
                model,
                conditioning,
                tap,
                noise=self.noise,
                latent=self.latent,
                sigmas=self.sigmas,
                seed=self.options.seed,
                on_step=lambda step, x0: self.progress.step(1, x0),
            )

    def _encode(self, acting: Sequence[int], prompts: Sequence[str], tap: Any) -> _Prepared:
        """Conditionings of prompts, with the text-encoder adapters of some LoRAs active while they are made."""
        clip = acting_on(self.loaded, self._apart(acting), "clip", self.clip, self.core_keys[1])
        encoded: _Prepared = []
        for prompt in prompts:
            host.check_cancel()
            with (
                tap.attached(root_of("clip", clip)) as modules,
                host.layers_called_as_modules(modules),
                host.text_rows(clip, tap.describe_text) as masks,
            ):
                conditioning = host.encode(clip, prompt)
            encoded.append((conditioning, _rows_of(conditioning, masks, self.model)))
        return encoded


@contextmanager
def _named_out_of_memory(name: str) -> Iterator[None]:
    """Say which LoRA was being calibrated and what helps; the host still sees an out-of-memory error."""
    try:
        yield
    except Exception as err:
        if not host.is_out_of_memory(err):
            raise
        raise torch.OutOfMemoryError(
            f"SSR-Merge: out of memory while calibrating {name}. Nothing was changed. "
            "What to do: lower width and height, or merge fewer LoRAs at once."
        ) from err


def _rows_of(conditioning: Sequence[Any], masks: Sequence[Tensor], model: Any) -> TextRows | None:
    """What is known about padding: the conditioning's own mask, else the encoder's of the same length."""
    if len(conditioning) != 1:
        return None
    text, extra = conditioning[0][0], conditioning[0][1]
    if not isinstance(text, Tensor) or text.ndim != 3:
        return None
    length = text.shape[1]
    found = [extra["attention_mask"].bool().flatten().cpu()] if extra.get("attention_mask") is not None else []
    found += [mask.flatten()[:length] for mask in masks if mask.numel() >= length and length % mask.shape[1] == 0]
    found = [mask for mask in found if mask.numel() == length]
    if not found:
        return None
    return TextRows(torch.stack(found).any(dim=0), joint_text(model))
