"""OSRM Init and OSRM Refit from a recipe, by the code of their nodes. Imported once ComfyUI is there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from ..nodes import host, osrm_init, osrm_refit, paths, saving
from ..ssr_core import FileError, IncompatibleError, OSRMRecipe, Ranks, atomic_path
from .calibrating import pass_options
from .work import Wanted, check_new, entry_of, opened

_REPORT = ".report.md"


def carry_out(recipe: OSRMRecipe, wanted: Wanted, ranks: Ranks) -> tuple[list[Path], list[str]]:
    """Make a start for training, or refit LoRAs, and write the report beside them.

    Args:
        recipe: What to do.
        wanted: Where to write; `output` is the file of a start, the folder of LoRAs that are refit.
        ranks: Has to be one process: these passes are not shared out.

    Returns:
        The files, and sentences to print.

    Raises:
        SSRMergeError: Says what is wrong, where, and what to do.
    """
    if ranks.size > 1:
        raise IncompatibleError("OSRM's passes are not shared out.", remedy="start one process, without torchrun.")
    with torch.inference_mode():  # as ComfyUI runs its nodes
        return (_init if recipe.init is not None else _refit)(recipe, wanted)


def _init(recipe: OSRMRecipe, wanted: Wanted) -> tuple[list[Path], list[str]]:
    assert recipe.init is not None
    path = wanted.output or osrm_init.init_path("osrm_init")[0]
    report = path.with_name(path.stem + _REPORT)
    check_new([path, report], wanted)
    model, clip = opened(recipe.model)
    others = osrm_init.other_tasks("\n".join(recipe.prompts), (), clip)
    passes, progress = pass_options(recipe.settings or {}), host.Progress(model)
    text = osrm_init.write_init(
        path, others, model, clip, passes, recipe.moments, recipe.init, progress, wanted.overwrite
    )
    _write(report, text, wanted)
    remarks = _warnings(text)
    if recipe.init.style == "comfy" and "_0_steps_" not in path.name:
        remarks.append(
            "Core's Train LoRA reads the steps from the name: call the file something_0_steps_1.safetensors."
        )
    return [path], remarks


def _refit(recipe: OSRMRecipe, wanted: Wanted) -> tuple[list[Path], list[str]]:
    assert recipe.refit is not None
    entries = tuple(entry_of(source, wanted.beside) for source in recipe.sources)
    made = _targets([entry.name for entry in entries], wanted)
    report = _place("osrm_refit", _REPORT, wanted)
    check_new([*made, report], wanted)
    model, clip = opened(recipe.model)
    passes, progress = pass_options(recipe.settings or {}), host.Progress(model)
    refitted = osrm_refit.refit(entries, model, clip, passes, recipe.moments, recipe.refit, progress)
    acting = [path for path, on in zip(made, refitted.acting, strict=True) if on]
    for path, tensors in zip(acting, refitted.tensors, strict=True):
        saving.save_lora(tensors, path, "comfy", overwrite=wanted.overwrite)
    _write(report, refitted.report, wanted)
    return acting, _warnings(refitted.report)


def _warnings(report: str) -> list[str]:
    """Those of a report, without what surrounds them."""
    begin = "Warning: "
    return [line.removeprefix(begin) for line in report.splitlines() if line.startswith(begin)]


def _targets(names: list[str], wanted: Wanted) -> list[Path]:
    """A file for each LoRA.

    Raises:
        FileError: Two would have the same.
    """
    stems = [Path(name.replace("\\", "/")).stem for name in names]
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise FileError(
            "two of the LoRAs have this name.", file=twice[0], remedy="copy one of them under another name."
        )
    return [_place(f"{stem}_refit", ".safetensors", wanted) for stem in stems]


def _place(name: str, suffix: str, wanted: Wanted) -> Path:
    if wanted.output is not None:
        return wanted.output / f"{name}{suffix}"
    return paths.output_path(f"loras/{name}", suffix)


def _write(path: Path, text: str, wanted: Wanted) -> None:
    with atomic_path(path, wanted.overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")
