"""Calibration and tasks -> merged MODEL, CLIP and LORA_MODEL, and what travels along the links."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ..ssr_core import (
    Adapter,
    Calibration,
    CompressOptions,
    KeyTarget,
    MergeReport,
    MergeResult,
    PaperMerge,
    Target,
    merge,
    merge_metadata,
    prompt_warnings,
    to_tensors,
)
from ..ssr_core.words import number_of
from . import forward, host, patches
from .entries import LoRAEntries, entry_from_record
from .loading import Loaded, pass_through, rest
from .model_info import model_identity, root_of
from .options import SolveOptions
from .storage_kinds import quantised_as

OTHER_MODEL = (
    "The calibration was made on another model (or this one with other LoRAs or weights): its statistics are an "
    "approximation here; calibrate again for the exact ones."
)


class CalibrationSocket(NamedTuple):
    """What travels along a CALIBRATION link. The tensors are listed so that ComfyUI's cache can count them."""

    calibration: Calibration
    entries: LoRAEntries
    tensors: tuple[Tensor, ...]
    converted: tuple[Adapter, ...] = ()

    def known(self, model: Any) -> tuple[Adapter, ...]:
        """Converted LoRAs, if this is the model that they were converted for."""
        return self.converted if self.converted and self.calibration.model == model_identity(model) else ()

    def tokens_of(self, index: int) -> list[float]:
        """Tokens that one LoRA's passes gave each layer that it shares with others."""
        stack_tasks = self.calibration.stack_tasks
        return [
            float(stats.tokens[stack_tasks[target].index(index)])
            for target, stats in self.calibration.stats.items()
            if index in stack_tasks[target]
        ]


class MergedLoRA(dict[str, Tensor]):
    """Core's LORA_MODEL (a plain dict of tensors) that also remembers how it came about."""

    def __init__(self, tensors: Mapping[str, Tensor], origin: MergeOrigin) -> None:
        super().__init__(tensors)
        self.origin = origin


@dataclass(frozen=True)
class MergeOrigin:
    """What SSR Save LoRA and SSR Compress need beside the tensors."""

    result: MergeResult
    entries: LoRAEntries
    options: SolveOptions
    key_map: Mapping[str, KeyTarget] = field(repr=False)
    core_keys: Mapping[str, Any] = field(repr=False)
    metadata: Mapping[str, str]


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
    """Merge, and put the result onto clones of MODEL and CLIP."""
    begin = progress.reached
    progress.doing(host.Activity("solve", tuple(task.name for task in loaded.tasks)))
    result = merge(
        loaded.tasks,
        options.method,
        calibration,
        dtype=options.torch_dtype(),
        device=host.compute_device(model),
        unsupported=options.unsupported,
        unseen=options.unseen_layers,
        tick=lambda layers, total: progress.at(begin + (1 - begin) * layers / max(1, total)),
    )
    same_model = calibration is None or calibration.model == model_identity(model)
    result = replace(result, report=_with_remarks(result.report, calibration, options, same_model))
    return put_on(loaded, model, clip, result, calibration, options)


def put_on(
    loaded: Loaded,
    model: Any,
    clip: Any | None,
    result: MergeResult,
    calibration: Calibration | None,
    options: SolveOptions,
    compressed: CompressOptions | None = None,
) -> Merged:
    """Clones of MODEL and CLIP with a merge, and its LORA_MODEL.

    Args:
        loaded: The LoRAs that were merged.
        model: The base MODEL.
        clip: Its CLIP, if one is connected.
        result: The merge.
        calibration: What it was solved from.
        options: How it was solved, and how it is to be applied.
        compressed: How it was compressed afterwards, if it was.
    """
    unet, text = host.core_key_map(model, clip)
    same_model = calibration is None or calibration.model == model_identity(model)
    # before the merge: a replaced weight must not wipe that out
    steps = [partial(rest, reading=True), partial(rest, reading=False)]
    steps += [pass_through] if options.unsupported == "pass_through" else []
    for apply in steps:
        for index in range(len(loaded.tasks)):
            model = apply(loaded, index, "model", model, unet)
            clip = clip if clip is None else apply(loaded, index, "clip", clip, text)
    division = forward.divide(model, result.layers, options.apply, out_of_reach=_out_of_reach(loaded, result))
    report = result.report
    report = replace(
        report, warnings=(*report.warnings, *_rounded_rests(loaded, model)), notes=(*report.notes, *division.notes())
    )
    result = replace(result, report=report)
    new_model = forward.put_on(patches.apply(model, "model", result, without=division.layers), division)
    new_clip = patches.apply(clip, "clip", result) if clip is not None else None
    extra = {
        "dtype": options.dtype,
        "unsupported": options.unsupported,
        "unseen_layers": options.unseen_layers,
        "apply": options.apply,
        "calibrated_on_this_model": same_model,
        "compress": None if compressed is None else asdict(compressed),
    }
    metadata = merge_metadata(loaded.tasks, options.method, calibration, extra)
    origin = MergeOrigin(result, loaded.entries, options, loaded.key_map, {**unet, **text}, metadata)
    return Merged(new_model, new_clip, MergedLoRA(to_tensors(result, loaded.key_map), origin), report)


def _out_of_reach(loaded: Loaded, result: MergeResult) -> set[Target]:
    """Layers that hooks do not reach: no linear map of their own, or none that ran in calibration."""
    silent = {one.target for one in result.report.layers if one.status == "anchored" and not sum(one.tokens)}
    untapped = {entry.target.module_path for entry in loaded.key_map.values() if not entry.tapped}
    return silent | {target for target in result.layers if target.module_path in untapped}


def _rounded_rests(loaded: Loaded, model: Any) -> list[str]:
    """What is said where the rest of a conversion becomes a patch on quantised weights."""
    root, warnings = root_of("model", model), []
    for task in loaded.tasks:
        kept = [one.group.target for one in task.adapter.conversions if one.rest_kept]
        paths = {target.module_path for target in kept if target.part == "model"}
        rounded = [path for path in paths if quantised_as(root.get_submodule(path)) is not None]
        if rounded and task.strength_model != 0:
            warnings.append(
                f"What conversion cut off {number_of(len(rounded), 'layer')} of {task.name} is patched into quantised weights and "
                "rounded there, whatever apply says. A larger convert_rank at its SSR LoRA keeps more of it exact; "
                "residual drop leaves it out."
            )
    return warnings


def _with_remarks(
    report: MergeReport, calibration: Calibration | None, options: SolveOptions, same_model: bool
) -> MergeReport:
    """Add what only the host side knows."""
    warnings, notes = list(report.warnings), list(report.notes)
    if not same_model:
        warnings.append(OTHER_MODEL)
    if calibration is not None and calibration.settings.get("held_out") == 0:
        notes.append(
            "No tokens were held out, their statistics would not have fitted into memory: the report has no held-out "
            "error, the merge is the same. A larger memory_budget_gb, or fewer LoRAs at once, brings it back."
        )
    weighted = calibration is not None and calibration.settings.get("padding") != "include"
    if isinstance(options.method, PaperMerge) and weighted:
        notes.append("Padded text tokens were weighted; for the published formula calibrate with padding include.")
    return replace(report, warnings=tuple(warnings), notes=tuple(notes))


def socket_of(calibration: Calibration, loaded: Loaded | None = None) -> CalibrationSocket:
    """Pack a calibration for its link, with the LoRAs that it took long to convert."""
    tasks = () if loaded is None else loaded.tasks
    converted = tuple(task.adapter for task in tasks if task.adapter.conversions)
    tensors = [t for stats in calibration.stats.values() for t in (stats.gram, stats.tokens)]
    samples = [one for stats in calibration.stats.values() for one in stats.all_samples]
    rows = {id(one.rows): one.rows for one in samples}
    tensors += rows.values()  # once, though the stacks of a module share them
    tensors += [stats.scenes.packed for stats in calibration.stats.values() if stats.scenes is not None]
    tensors += [stats.held.packed for stats in calibration.stats.values() if stats.held is not None]
    tensors += [t for adapter in converted for layer in adapter.layers.values() for t in (layer.down, layer.up)]
    return CalibrationSocket(calibration, () if loaded is None else loaded.entries, tuple(tensors), converted)


def entries_of(socket: CalibrationSocket, override: LoRAEntries) -> LoRAEntries:
    """The LoRAs of a calibration: from connected SSR LoRA nodes, else as calibrated, else found by content."""
    if override:
        return override
    if socket.entries:
        return socket.entries
    return tuple(entry_from_record(record) for record in socket.calibration.tasks)


def calibration_report(socket: CalibrationSocket) -> str:
    """What a calibration holds, in words."""
    calibration = socket.calibration
    layers = calibration.stats
    lines = [
        "# SSR-Merge calibration",
        "",
        f"{number_of(len(layers), 'layer is', 'layers are')} shared by two or more LoRAs.",
        "",
    ]
    for index, record in enumerate(calibration.tasks):
        tokens = socket.tokens_of(index)
        unseen = sum(count == 0 for count in tokens)
        lines.append(
            f"- **{record.name}** at {record.strength_model:g} (CLIP {record.strength_clip:g}): {number_of(len(tokens), 'layer')}, "
            f"{max(tokens, default=0):.0f} tokens at most, {number_of(unseen, 'layer')} never ran. "
            f"Prompts: {' | '.join(record.prompts) or 'none'}"
        )
    names = [record.name for record in calibration.tasks]
    for scene in calibration.scenes:
        who = " and ".join(names[task] for task in scene.tasks) or "no LoRA"
        lines.append(f"- {scene.label.capitalize()}, {who} active: {scene.prompt}")
    warnings = prompt_warnings(names, [r.prompts for r in calibration.tasks])
    return "\n".join([*lines, "", *(f"Warning: {warning}" for warning in warnings)]) + "\n"
