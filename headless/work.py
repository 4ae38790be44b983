"""A recipe carried out by the code of the nodes. Imported once ComfyUI is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from ..nodes import compressing, entries, host, loading, options, paths, pipeline, saving
from ..nodes.host.graph import load_packs, run_graph
from ..nodes.model_info import model_identity
from ..ssr_core import (
    Calibration,
    CompressionReport,
    FileError,
    Ranks,
    Recipe,
    Source,
    TaskRecord,
    atomic_path,
    read_safetensors,
    save_calibration,
)
from .calibrating import calibrated
from .loaders import model_graph


@dataclass(frozen=True)
class Wanted:
    """What is to be written.

    Attributes:
        output: The merged file; None for a numbered one in ComfyUI's output/loras.
        overwrite: Replace files that exist.
        calibration: Where to save the calibration, if anywhere.
        beside: Folder that paths in the recipe are relative to.
    """

    output: Path | None
    overwrite: bool
    calibration: Path | None
    beside: Path


def carry_out(recipe: Recipe, wanted: Wanted, ranks: Ranks) -> tuple[list[Path], list[str]]:
    """Load, calibrate, merge, compress, save.

    Args:
        recipe: What to do.
        wanted: What to write; the first process writes it.
        ranks: Processes that share the calibration passes.

    Returns:
        The merged file (nothing on all processes but the first), and sentences to print.

    Raises:
        SSRMergeError: Says what is wrong, where, and what to do.
    """
    check_new(_files(wanted), wanted, ranks)
    with torch.inference_mode():  # as ComfyUI runs its nodes
        model, clip = opened(recipe.model)
        remarks = _identity_remarks(recipe, model)
        progress = host.Progress(model)
        merging = tuple(entry_of(source, wanted.beside) for source in recipe.sources)
        made = calibrated(recipe, merging, model, clip, progress, wanted.beside, ranks)
        if ranks.rank > 0:
            return [], remarks
        calibration, known, loaded = made
        if wanted.calibration is not None and calibration is not None and recipe.calibration_file is None:
            save_calibration(calibration, wanted.calibration, wanted.overwrite)
        if loaded is None or loaded.entries != loading.acting(merging, clip):
            loaded = loading.load(merging, model, clip, progress, known)
        merged, report = _merged(recipe, loaded, model, clip, calibration, progress)
        path = wanted.output or paths.output_path("loras/ssr_merged", ".safetensors")
        saving.save_lora(merged.lora, path, recipe.key_style, recipe.model, wanted.overwrite)
        _write_reports(path, merged, report, wanted.overwrite)
    return [path], remarks


def check_new(paths: Sequence[Path], wanted: Wanted, ranks: Ranks | None = None) -> None:
    """Refuse to replace files, unless that is wanted.

    The first process writes, perhaps on a disk of its own, so its answer holds for all: the others would wait for it
    to no end.

    Raises:
        FileError: One exists.
    """
    taken = [str(path) for path in paths if path.exists() and not wanted.overwrite]
    in_the_way = (ranks or Ranks()).told(taken[0] if taken else "")
    if in_the_way:
        raise FileError("a file of this name exists already.", file=in_the_way, remedy="give --overwrite.")


def opened(model: Mapping[str, Any]) -> tuple[Any, Any | None]:
    """MODEL and CLIP as a recipe says that they are loaded.

    Raises:
        FileError: It says nothing, or names a file or a pack that is not there.
    """
    chosen = model_graph(model)
    load_packs(chosen.packs)
    loaded, clip = run_graph(chosen.graph, (chosen.model, chosen.clip))
    return loaded, clip


def _files(wanted: Wanted) -> list[Path]:
    """All named files that are to be written."""
    made = [wanted.calibration] if wanted.calibration is not None else []
    if wanted.output is not None:
        made += [wanted.output, *_report_paths(wanted.output)]
    return made


def _report_paths(path: Path) -> list[Path]:
    """The reports beside a merged file: for people, for programs."""
    return [path.with_suffix(f".report{suffix}") for suffix in (".md", ".json")]


def _identity_remarks(recipe: Recipe, model: Any) -> list[str]:
    if not recipe.same_model:
        return ["The file was solved from the calibration of another model; this one is calibrated anew."]
    if recipe.calibrated_model and recipe.calibrated_model != model_identity(model):
        return ["The model differs from the one that the file was made on: the result will differ, too."]
    return []


def entry_of(source: Source, beside: Path) -> entries.LoRAEntry:
    """A LoRA by its path, or by its name in the loras folders; its content is checked if the recipe knows it.

    Raises:
        FileError: There is no such file, or its content is another one.
    """
    strengths = (source.strength_model, source.strength_clip)
    path = beside / source.name
    if path.is_file():
        tensors = read_safetensors(path)[0]
        entry = entries.LoRAEntry(source.name, entries.file_hash(path), *strengths, source.prompts, tensors=tensors)
    elif source.sha256 is not None and source.name not in host.lora_files():
        record = TaskRecord(source.name, source.sha256, *strengths, source.prompts, source.convert)
        entry = entries.entry_from_record(record)
    else:
        entry = entries.entry_from_file(source.name, *strengths, source.prompts, None)
    if source.sha256 is not None and entry.sha256 != source.sha256:
        raise FileError(
            f"its content is not that of the recipe (sha256 {entry.sha256[:16]}… instead of {source.sha256[:16]}…).",
            file=source.name,
            remedy="put the file back that was merged, or take sha256 out of the recipe.",
        )
    return replace(entry, convert=source.convert)


def _merged(
    recipe: Recipe,
    loaded: loading.Loaded,
    model: Any,
    clip: Any | None,
    calibration: Calibration | None,
    progress: host.Progress,
) -> tuple[pipeline.Merged, CompressionReport | None]:
    chosen = options.SolveOptions(
        recipe.method, recipe.dtype, cast(Any, recipe.unsupported), cast(Any, recipe.unseen_layers), "weights"
    )
    merged = pipeline.solve(loaded, model, clip, calibration, chosen, progress)
    if recipe.compress is None:
        return merged, None
    return compressing.compressed(merged.lora.origin, loaded, model, clip, calibration, recipe.compress, progress)


def _write_reports(path: Path, merged: pipeline.Merged, report: CompressionReport | None, overwrite: bool) -> None:
    text, values = merged.report.to_markdown(), merged.report.to_json()
    if report is not None:
        text, values = f"{text}\n{report.to_markdown()}", {**values, "compression": report.to_json()}
    for name, content in zip(_report_paths(path), (text, json.dumps(values, indent=1)), strict=True):
        with atomic_path(name, overwrite) as temporary:
            temporary.write_text(content, encoding="utf-8")
