"""OSRM Init: prompts of other tasks -> a LoRA file that trainers start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..ssr_core import (
    VERSION,
    Adapter,
    CalibrationError,
    FileError,
    InitOptions,
    InitResult,
    MomentOptions,
    Task,
    atomic_path,
    change_tensors,
    init_markdown,
    osrm_init,
    write_safetensors,
)
from ..ssr_core.errors import ClipMissingError
from ..ssr_core.files import json_text
from ..ssr_core.metadata import START
from . import host, paths
from .entries import LoRAEntry, prompt_lines
from .input_passes import gather
from .loading import Loaded
from .model_info import kohya_key_map
from .options import CalibrationOptions
from .patches import reload_patches

FOLDER = "loras"
STEPS_MARK = "_steps_"
"""Core's Train LoRA reads the number before it as the steps that a file was trained for."""


def other_tasks(prompts: str, conditionings: Sequence[list[Any]], clip: Any | None) -> Loaded:
    """The other tasks as tasks without a LoRA: all prompts together are one, every CONDITIONING is one.

    Raises:
        CalibrationError: There is neither, or prompts without a CLIP.
    """
    entries = []
    if prompts.strip():
        if clip is None:
            raise ClipMissingError("prompts need a CLIP.", remedy="connect CLIP, or CONDITIONINGs instead of prompts.")
        entries.append(LoRAEntry("the prompts", "", 1.0, 1.0, prompt_lines(prompts)))
    for number, one in enumerate(conditionings, 1):
        entries.append(LoRAEntry(f"conditioning {number}", "", 1.0, 1.0, ("",), one))
    if not entries:
        raise CalibrationError(
            "there are no other tasks to keep away from.",
            remedy="write their prompts, one a line, or connect their CONDITIONINGs.",
        )
    tasks = tuple(Task(Adapter(entry.name, "", {}), prompts=entry.identity) for entry in entries)
    return Loaded(tuple(entries), tasks, {}, tuple({} for _ in entries))


def write_init(
    path: Path,
    loaded: Loaded,
    model: Any,
    clip: Any | None,
    calibration: CalibrationOptions,
    moments: MomentOptions,
    options: InitOptions,
    progress: host.Progress,
    overwrite: bool = False,
) -> str:
    """Gather the others' inputs, make the start and write it; the report in words."""
    result, tensors = _made(loaded, model, clip, calibration, moments, options, progress)
    unet, text = host.core_key_map(model, clip)
    _save(path, result, tensors, loaded, moments, options, {**unet, **text}, overwrite)
    return init_markdown(result, options.rank, [entry.name for entry in loaded.entries], moments.features)


def _made(
    loaded: Loaded,
    model: Any,
    clip: Any | None,
    calibration: CalibrationOptions,
    moments: MomentOptions,
    options: InitOptions,
    progress: host.Progress,
) -> tuple[InitResult, dict[str, Tensor]]:
    """The start, and its tensors as they stand in the file."""
    key_map = host.key_map(model, clip)
    layers = options.choose(key_map)
    others = gather(loaded, model, clip, layers, calibration, moments, progress, active=False)
    begin = progress.reached
    result = osrm_init(
        layers,
        others,
        options.rank,
        energy=options.energy,
        alpha=options.alpha,
        seed=calibration.seed,
        salt="|".join(prompt for task in loaded.tasks for prompt in task.prompts),
        dtype=options.dtype,
        device=host.compute_device(model),
        tick=lambda done, total: progress.at(begin + (1 - begin) * done / max(1, total)),
    )
    if not result.layers:
        raise CalibrationError(
            f"none of the {len(layers)} chosen layers has room for rank {options.rank}.",
            remedy="lower the rank, or choose other layers.",
        )
    named = kohya_key_map(model, key_map) if options.style == "kohya" else key_map
    tensors = change_tensors(result.layers, {}, named, options.style)
    if options.style == "comfy":  # core's Train LoRA copies the factors of a convolution into matrices
        tensors = {name: t.flatten(1).contiguous() if t.ndim > 2 else t for name, t in tensors.items()}
    return result, tensors


def init_path(prefix: str) -> tuple[Path, str]:
    """A new file below output/loras, and its name in LoRA lists; Train LoRA reads 0 steps out of it.

    Raises:
        FileError: The prefix leads outside, or would be misread.
    """
    if not prefix.strip() or prefix.strip().endswith(("/", "\\")):
        raise FileError("the name is empty.", file=prefix, remedy="use a name like osrm_init.")
    if STEPS_MARK in f"{prefix}_":
        raise FileError("core's Train LoRA misreads names with _steps_.", file=prefix, remedy="choose another name.")
    path = paths.output_path(f"{prefix}_0_steps", ".safetensors", FOLDER)
    name = str(path.relative_to(host.output_directory() / FOLDER))
    if name in host.lora_files():
        raise FileError(
            "another loras folder has a file of this name.", file=name, remedy="choose another filename_prefix."
        )
    return path, name


def _save(
    path: Path,
    result: InitResult,
    tensors: Mapping[str, Tensor],
    loaded: Loaded,
    moments: MomentOptions,
    options: InitOptions,
    core_keys: host.CoreKeyMap,
    overwrite: bool,
) -> None:
    """Write the file, once ComfyUI's own loader takes every key of it.

    Raises:
        FileError: It does not, or the file cannot be written.
    """
    recipe = {
        "version": VERSION,
        "method": START,
        "rank": options.rank,
        "energy": options.energy,
        "moments": asdict(moments),
        "others": [list(task.prompts) for task in loaded.tasks],
    }
    metadata = {
        "format": "pt",
        "ssr_merge": json_text(recipe),
        "ss_network_dim": str(options.rank),
        "ss_network_alpha": f"{options.alpha:g}",
    }
    with atomic_path(path, overwrite) as temporary:
        write_safetensors(temporary, tensors, metadata)
        patches, unused = reload_patches(temporary, core_keys)
        if unused or len(patches) != len(result.layers):
            raise FileError(
                f"ComfyUI would load {len(patches)} of {len(result.layers)} layers; nothing was saved.",
                file=path.name,
                remedy="set key_style to comfy; if it stays, report it with the model's name.",
            )
