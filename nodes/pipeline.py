"""The nodes' work, step by step: entries -> tasks -> calibration -> merge -> MODEL, CLIP, LORA_MODEL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ssr_core import (
    Calibration,
    CalibrationError,
    Calibrator,
    IncompatibleError,
    KeyTarget,
    LayerStack,
    MergeMethod,
    MergeReport,
    MergeResult,
    Task,
    TextRows,
    build_stacks,
    check_memory,
    memory_need,
    merge,
    merge_metadata,
    prompt_warnings,
    read_adapter,
    records_of,
    to_tensors,
)
from . import host
from .entries import LoRAEntries, LoRAEntry, entry_from_record
from .options import CalibrationOptions, SolveOptions

CALIBRATION_SHARE = 0.9
"""Of the progress bar of a whole merge."""

OTHER_MODEL = (
    "The calibration was made on another model (or this one with other LoRAs or weights): its statistics are an "
    "approximation here; calibrate again for the exact ones."
)


class CalibrationSocket(NamedTuple):
    """What travels along a CALIBRATION link. The tensors are listed so that ComfyUI's cache can count them."""

    calibration: Calibration
    entries: LoRAEntries
    tensors: tuple[Tensor, ...]


class MergedLoRA(dict[str, Tensor]):
    """Core's LORA_MODEL (a plain dict of tensors) that also remembers how it came about."""

    def __init__(self, tensors: Mapping[str, Tensor], origin: MergeOrigin) -> None:
        super().__init__(tensors)
        self.origin = origin


@dataclass(frozen=True)
class MergeOrigin:
    """What SSR Save LoRA needs beside the tensors."""

    result: MergeResult
    key_map: Mapping[str, KeyTarget] = field(repr=False)
    core_keys: Mapping[str, Any] = field(repr=False)
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Loaded:
    """LoRAs read for one MODEL and CLIP."""

    entries: LoRAEntries
    tasks: tuple[Task, ...]
    key_map: Mapping[str, KeyTarget] = field(repr=False)
    tensors: tuple[Mapping[str, Tensor], ...] = field(repr=False)


def load(entries: LoRAEntries, model: Any, clip: Any | None) -> Loaded:
    """Read the LoRAs for the connected MODEL and CLIP; those of strength 0 everywhere are left out.

    Raises:
        IncompatibleError: Nothing is enabled, or a LoRA does not fit.
        FileError: A file is damaged or refused.
    """
    key_map = host.key_map(model, clip)
    used = [e for e in entries if e.strength_model != 0 or (clip is not None and e.strength_clip != 0)]
    if not used:
        raise IncompatibleError(
            "no LoRA is enabled.", remedy="connect at least one SSR LoRA that is enabled, with a strength other than 0."
        )
    tensors, tasks = [], []
    for entry in used:
        host.check_cancel()
        content = entry.load()
        adapter = read_adapter(content, key_map, name=entry.name, fingerprint=entry.sha256)
        clip_strength = entry.strength_clip if clip is not None else 0.0
        tasks.append(Task(adapter, entry.strength_model, clip_strength, entry.identity))
        tensors.append(content)
    return Loaded(tuple(used), tuple(tasks), key_map, tuple(tensors))


def calibrate(
    loaded: Loaded, model: Any, clip: Any | None, options: CalibrationOptions, progress: host.Progress
) -> Calibration:
    """One short sampling pass for each LoRA and prompt, that LoRA alone, the same noise for all.

    Raises:
        CalibrationError: A pass failed, or a LoRA has neither prompt nor CONDITIONING.
        MemoryBudgetError: The statistics would not fit.
    """
    stacks = build_stacks(loaded.tasks)
    by_part = {part: [s for s in stacks if s.target.part == part] for part in ("model", "clip")}
    if all(len(stack.blocks) < 2 for stack in stacks):
        return Calibration(records_of(loaded.tasks), {}, {}, host.model_identity(model), options.settings())
    _check_budget(stacks, model, options)
    latent = options.latent_for(model)
    sigmas = options.sigmas_for(model)
    passes = _Passes(loaded, model, clip, options, latent, sigmas, progress)
    calibrators = {part: Calibrator(members, options.padding) for part, members in by_part.items()}
    for index in range(len(loaded.tasks)):
        passes.run(index, calibrators["model"], calibrators["clip"])
    stats = {**calibrators["model"].result(), **calibrators["clip"].result()}
    shared = {stack.target: stack.tasks for stack in stacks if len(stack.blocks) > 1}
    settings = {**options.settings(), "sigmas": [float(s) for s in sigmas[:-1]], "latent": list(latent.shape)}
    return Calibration(records_of(loaded.tasks), stats, shared, host.model_identity(model), settings)


def _check_budget(stacks: Sequence[LayerStack], model: Any, options: CalibrationOptions) -> None:
    need = memory_need(stacks, host.activation_dtype(model))
    check_memory(need, *host.memory_budgets(model.load_device, options.memory_budget_gb))


class _Passes:
    """Runs one LoRA's prompts through the text encoder and the diffusion model."""

    def __init__(
        self,
        loaded: Loaded,
        model: Any,
        clip: Any | None,
        options: CalibrationOptions,
        latent: Tensor,
        sigmas: Tensor,
        progress: host.Progress,
    ) -> None:
        self.loaded, self.model, self.clip, self.options = loaded, model, clip, options
        self.progress = progress
        self.latent, self.sigmas = latent, sigmas
        self.noise = host.shared_noise(latent, options.seed)
        passes = sum(1 if e.conditioning is not None else len(e.prompts) for e in loaded.entries)
        progress.stage(0.0, CALIBRATION_SHARE, passes * (len(sigmas) - 1))

    def run(self, index: int, model_calibrator: Calibrator, clip_calibrator: Calibrator) -> None:
        """All prompts of one LoRA; its statistics count only if every pass succeeds."""
        entry = self.loaded.entries[index]
        with ExitStack() as stack:
            prepared = self._encode(index, entry, clip_calibrator, stack)
            if self.loaded.tasks[index].strength_model == 0:
                return
            tap = stack.enter_context(model_calibrator.task(index))
            tap.prepare(self.model.load_device, host.activation_dtype(self.model))
            try:
                for conditioning, rows in prepared:
                    host.check_cancel()
                    tap.describe_text(rows)
                    host.run_calibration_pass(
                        self.model,
                        conditioning,
                        tap,
                        noise=self.noise,
                        latent=self.latent,
                        sigmas=self.sigmas,
                        seed=self.options.seed,
                        on_step=lambda step, x0: self.progress.step(1, x0),
                    )
            except Exception as err:
                if host.is_out_of_memory(err):
                    raise torch.OutOfMemoryError(
                        f"SSR-Merge: out of memory while calibrating {entry.name}. Nothing was changed. "
                        "What to do: lower width and height, or merge fewer LoRAs at once."
                    ) from err
                raise

    def _encode(
        self, index: int, entry: LoRAEntry, calibrator: Calibrator, stack: ExitStack
    ) -> list[tuple[list[Any], TextRows | None]]:
        """Conditionings of one LoRA, with its text-encoder adapter active while they are made."""
        if self.clip is None:
            if entry.conditioning is None:
                raise CalibrationError(
                    "its prompts need a CLIP.", file=entry.name, remedy="connect CLIP, or a CONDITIONING to SSR LoRA."
                )
            return [(entry.conditioning, _rows_of(entry.conditioning, [], self.model))]
        if entry.conditioning is not None and not any(entry.prompts):
            return [(entry.conditioning, _rows_of(entry.conditioning, [], self.model))]
        tap = stack.enter_context(calibrator.task(index))
        encoded = []
        for prompt in entry.prompts:
            host.check_cancel()
            with (
                tap.attached(host.root_of("clip", self.clip)),
                host.text_rows(self.clip, tap.describe_text) as masks,
            ):
                conditioning = host.encode(self.clip, prompt)
            encoded.append((conditioning, _rows_of(conditioning, masks, self.model)))
        if entry.conditioning is not None:
            return [(entry.conditioning, _rows_of(entry.conditioning, [], self.model))]
        return encoded


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
    return TextRows(torch.stack(found).any(dim=0), host.joint_text(model))


class Merged(NamedTuple):
    """Outputs of a merge."""

    model: Any
    clip: Any | None
    lora: MergedLoRA
    report: MergeReport


def solve(
    loaded: Loaded,
    model: Any,
    clip: Any | None,
    calibration: Calibration | None,
    options: SolveOptions,
    progress: host.Progress,
) -> Merged:
    """Solve, and put the result onto clones of MODEL and CLIP."""
    method: MergeMethod = options.method()
    begin = progress.reached

    def tick(layers: int, total: int) -> None:
        progress.stage(begin + (1 - begin) * layers / max(1, total), 1.0, 1)
        progress.step(0)

    result = merge(
        loaded.tasks,
        method,
        calibration,
        dtype=options.torch_dtype(),
        device=host.compute_device(model),
        unsupported=options.unsupported,
        unseen=options.unseen_layers,
        tick=tick,
    )
    unet, text = host.core_key_map(model, clip)
    new_model = host.apply(model, "model", result)
    new_clip = host.apply(clip, "clip", result) if clip is not None else None
    if options.unsupported == "pass_through":
        new_model, new_clip = _pass_through(loaded, new_model, new_clip, unet, text)
    same_model = calibration is None or calibration.model == host.model_identity(model)
    extra = {"dtype": options.dtype, "calibrated_on_this_model": same_model}
    origin = MergeOrigin(
        result, loaded.key_map, {**unet, **text}, merge_metadata(loaded.tasks, method, calibration, extra)
    )
    report = result.report if same_model else replace(result.report, notes=(*result.report.notes, OTHER_MODEL))
    return Merged(new_model, new_clip, MergedLoRA(to_tensors(result, loaded.key_map), origin), report)


def _pass_through(loaded: Loaded, model: Any, clip: Any | None, unet: Any, text: Any) -> tuple[Any, Any | None]:
    """Keys that are not low-rank, as the host's own patches at the LoRA's strength."""
    for task, tensors in zip(loaded.tasks, loaded.tensors, strict=True):
        records = task.adapter.keys_with("unsupported")
        for part, core in (("model", unet), ("clip", text)):
            names = [r.key for r in records if r.target is not None and r.target.part == part]
            strength = task.strength_model if part == "model" else task.strength_clip
            if not names or strength == 0:
                continue
            if part == "model":
                model = host.apply_host_patches(model, tensors, names, strength, core)
            elif clip is not None:
                clip = host.apply_host_patches(clip, tensors, names, strength, core)
    return model, clip


def socket_of(calibration: Calibration, entries: LoRAEntries) -> CalibrationSocket:
    """Pack a calibration for its link."""
    tensors = tuple(t for stats in calibration.stats.values() for t in (stats.gram, stats.tokens))
    return CalibrationSocket(calibration, entries, tensors)


def entries_of(socket: CalibrationSocket, override: LoRAEntries) -> LoRAEntries:
    """The LoRAs of a calibration: from connected SSR LoRA nodes, else as calibrated, else found by content."""
    if override:
        return override
    if socket.entries:
        return socket.entries
    return tuple(
        entry_from_record(r.name, r.fingerprint, r.strength_model, r.strength_clip, r.prompts)
        for r in socket.calibration.tasks
    )


def calibration_report(socket: CalibrationSocket) -> str:
    """What a calibration holds, in words."""
    calibration = socket.calibration
    layers = calibration.stats
    lines = ["# SSR-Merge calibration", "", f"{len(layers)} layers are shared by two or more LoRAs.", ""]
    for index, record in enumerate(calibration.tasks):
        tokens = [
            float(stats.tokens[calibration.stack_tasks[target].index(index)])
            for target, stats in layers.items()
            if index in calibration.stack_tasks[target]
        ]
        unseen = sum(count == 0 for count in tokens)
        lines.append(
            f"- **{record.name}** at {record.strength_model:g} (CLIP {record.strength_clip:g}): {len(tokens)} layers, "
            f"{max(tokens, default=0):.0f} tokens at most, {unseen} layers never ran. "
            f"Prompts: {' | '.join(record.prompts) or 'none'}"
        )
    warnings = prompt_warnings([r.name for r in calibration.tasks], [r.prompts for r in calibration.tasks])
    return "\n".join([*lines, "", *(f"Warning: {warning}" for warning in warnings)]) + "\n"
