"""OSRM Refit: LoRAs of SSR LoRA nodes -> the same LoRAs with less effect on each other's prompts."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

from torch import Tensor

from ..ssr_core import (
    Adapter,
    IncompatibleError,
    MomentOptions,
    RefitOptions,
    change_tensors,
    input_layers,
    osrm_refit,
    refit_markdown,
    tensors_hash,
    whole_module,
)
from ..ssr_core.advice import silent_warnings
from ..ssr_core.metadata import refit_metadata
from ..ssr_core.words import number_of
from . import host
from .entries import LoRAEntries
from .input_passes import gather
from .loading import Loaded, load
from .options import CalibrationOptions
from .saving import DescribedLoRA


class Refitted(NamedTuple):
    """Outputs of a refit.

    Attributes:
        entries: For SSR Merge or a further SSR LoRA; without those of strength 0.
        tensors: Each LoRA as core's LORA_MODEL; its file says which it is and what was done.
        report: In words.
        acting: For each LoRA that was given, whether it is among these.
    """

    entries: LoRAEntries
    tensors: list[DescribedLoRA]
    report: str
    acting: tuple[bool, ...]


def refit(
    given: LoRAEntries,
    model: Any,
    clip: Any | None,
    calibration: CalibrationOptions,
    moments: MomentOptions,
    options: RefitOptions,
    progress: host.Progress,
) -> Refitted:
    """Gather every LoRA's inputs with that LoRA alone, and refit each against the others'.

    Args:
        given: The LoRAs; those of strength 0 are left out, and named.
        model: The MODEL.
        clip: The CLIP, if one is connected.
        calibration: How to sample.
        moments: What is kept of a layer's inputs.
        options: How to refit.
        progress: Shows the passes.

    Raises:
        IncompatibleError: There is one LoRA only, or none has a layer that is low-rank.
    """
    loaded = load(given, model, clip, progress)
    if len(loaded.tasks) < 2:
        raise IncompatibleError(
            "a single LoRA has no others to keep away from.", remedy="connect two or more SSR LoRA nodes."
        )
    modules = {whole_module(target) for task in loaded.tasks for target in task.adapter.layers}
    layers = [one for part in ("model", "clip") for one in input_layers(loaded.key_map, part) if one.target in modules]
    if not layers:
        raise IncompatibleError(
            "none of the LoRAs has a layer that can be refit.",
            remedy="connect LoRAs with linear layers, and set convert_rank of their SSR LoRA above 0.",
        )
    gathered = gather(loaded, model, clip, layers, calibration, moments, progress, active=True)
    begin = progress.reached
    result = osrm_refit(
        [task.adapter for task in loaded.tasks],
        gathered,
        options,
        device=host.compute_device(model),
        tick=lambda done, total: progress.at(begin + (1 - begin) * done / max(1, total)),
    )
    tensors = [
        DescribedLoRA(_file_of(loaded, index, adapter), _about(loaded, index, options, moments))
        for index, adapter in enumerate(result.adapters)
    ]
    entries = tuple(
        replace(entry, name=f"{entry.name} (refit)", sha256=tensors_hash(one), file=None, tensors=one)
        for entry, one in zip(loaded.entries, tensors, strict=True)
    )
    report = refit_markdown(result.reports, options) + "".join(f"\n{line}\n" for line in _remarks(loaded))
    kept = {id(entry) for entry in loaded.entries}
    acting = tuple(id(entry) in kept for entry in given)
    off = [entry.name for entry, on in zip(given, acting, strict=True) if not on]
    if off:
        report += f"\nLeft out, with strength 0: {', '.join(off)}.\n"
    return Refitted(entries, tensors, report, acting)


def _carried(adapter: Adapter) -> list[str]:
    """Keys of a file that a refit hands on as they are."""
    return [record.key for record in adapter.records if record.status in ("unsupported", "unmatched")]


def _file_of(loaded: Loaded, index: int, adapter: Adapter) -> dict[str, Tensor]:
    made = change_tensors(adapter.layers, adapter.vectors, loaded.key_map)
    return {**{key: loaded.tensors[index][key] for key in _carried(adapter)}, **made}


def _about(loaded: Loaded, index: int, options: RefitOptions, moments: MomentOptions) -> dict[str, str]:
    """Metadata of one refit LoRA."""
    entry, task = loaded.entries[index], loaded.tasks[index]
    others = [one.name for number, one in enumerate(loaded.entries) if number != index]
    return refit_metadata(entry.name, entry.sha256, task.prompts, others, options, moments)


def _remarks(loaded: Loaded) -> list[str]:
    """What a refit leaves alone or leaves out, LoRA by LoRA."""
    tasks = loaded.tasks
    silent = silent_warnings([task.name for task in tasks], [task.prompts for task in tasks])
    lines = [f"Warning: {sentence}" for sentence in silent]
    lines += [
        f"Warning: {a.name} and {b.name} have the same prompts: what is taken from their interference is taken from "
        "their own function as well."
        for a, b in combinations(tasks, 2)
        if a.prompts == b.prompts
    ]
    for task in tasks:
        carried = _carried(task.adapter)
        if carried:
            lines.append(f"{task.name}: handed on as they are: {number_of(len(carried), 'key')}, e.g. {carried[0]}.")
        if task.adapter.vectors:
            lines.append(f"{task.name}: biases and norms that are handed on as they are: {len(task.adapter.vectors)}.")
        rests = [one for one in task.adapter.conversions if one.rest_kept]
        if rests:
            worst = max(one.error for one in rests)
            lines.append(
                f"Warning: {task.name}: what conversion cut off {number_of(len(rests), 'layer')} (up to {100 * worst:.1f} % of a "
                "layer) is not in the refit LoRA. A larger convert_rank at its SSR LoRA keeps more."
            )
    return lines
