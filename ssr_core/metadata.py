"""What a merged file says about itself: enough to make the same merge again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .calibration import Calibration
from .errors import FileError
from .files import json_text
from .merge import describe
from .methods import MergeMethod
from .moments import MomentOptions
from .osrm_layer import RefitOptions
from .rounds import settings_without
from .scene_lines import settings_with_scenes
from .scenes import scenes_of
from .stacks import Task
from .version import VERSION

KEY = "ssr_merge"
REFIT_KEY = "ssr_osrm_refit"
START = "osrm_init"
"""What stands for the method in the metadata of a start for training."""


def merge_metadata(
    tasks: Sequence[Task],
    method: MergeMethod,
    calibration: Calibration | None,
    extra: Mapping[str, object] | None = None,
) -> dict[str, str]:
    """String metadata for the safetensors header.

    Args:
        tasks: The merged LoRAs.
        method: The method and its parameters.
        calibration: What it was solved from.
        extra: More JSON values (dtype, key style, host version).
    """
    records = [-1] * len(tasks) if calibration is None else calibration.match_active(tasks)
    recipe: dict[str, object] = {
        "version": VERSION,
        "method": method.name,
        "parameters": {
            name: getattr(method, name)
            for name in getattr(method, "__dataclass_fields__", {})
            if name not in ("name", "needs_calibration")
        },
        "sources": [
            {
                "name": task.name,
                "sha256": task.adapter.fingerprint,
                "strength_model": task.strength_model,
                "strength_clip": task.strength_clip,
                "prompts": list(task.prompts),
                "convert": None if task.adapter.convert_options is None else asdict(task.adapter.convert_options),
                "calibrated_at": _calibrated_at(calibration, record),
            }
            for task, record in zip(tasks, records, strict=True)
        ],
        "calibration": None
        if calibration is None
        else {
            "model": calibration.model,
            "settings": _settings(calibration, tasks, records),
            "strengths": [[r.strength_model, r.strength_clip] for r in calibration.tasks],
        },
        **(extra or {}),
    }
    title = " + ".join(task.name for task in tasks)
    return {
        "format": "pt",
        KEY: json_text(recipe),
        "modelspec.title": title,
        "modelspec.description": f"SSR-Merge {VERSION}, {describe(method)}",
    }


def _settings(calibration: Calibration, tasks: Sequence[Task], records: Sequence[int]) -> dict[str, object]:
    """How the passes ran; joint prompts as they apply to the LoRAs of this merge, by their numbers in it."""
    active = [(record, task.name) for record, task in zip(records, tasks, strict=True) if record >= 0]
    scenes = scenes_of(calibration.scenes, [record for record, _ in active])[1]
    kept = {record for record, _ in active}
    gone = [one.name for index, one in enumerate(calibration.tasks) if index not in kept]
    settings = settings_without(calibration.settings, gone)
    return settings_with_scenes(settings, scenes, [name for _, name in active])


def _calibrated_at(calibration: Calibration | None, record: int) -> list[float] | None:
    """Strengths of one LoRA during calibration; its place in the calibration need not be that in the merge."""
    if calibration is None or record < 0:
        return None
    return [calibration.tasks[record].strength_model, calibration.tasks[record].strength_clip]


def refit_metadata(
    name: str, sha256: str, prompts: Sequence[str], others: Sequence[str], options: RefitOptions, moments: MomentOptions
) -> dict[str, str]:
    """String metadata of a LoRA that OSRM Refit changed: which one, and how. No recipe, so not under `KEY`.

    Args:
        name: The LoRA that was refit.
        sha256: Its content before.
        prompts: Its own prompts.
        others: Names of the LoRAs whose prompts it was kept away from.
        options: How it was refit.
        moments: What was kept of a layer's inputs.
    """
    done = {
        "version": VERSION,
        "source": {"name": name, "sha256": sha256, "prompts": list(prompts)},
        "others": list(others),
        **asdict(options),
        "moments": asdict(moments),
    }
    return {
        "format": "pt",
        REFIT_KEY: json_text(done),
        "modelspec.title": f"{name} (refit)",
        "modelspec.description": f"SSR-Merge {VERSION}, OSRM Refit, mode {options.mode}",
    }


def with_recipe(metadata: Mapping[str, str], more: Mapping[str, object]) -> dict[str, str]:
    """Metadata whose recipe has further values."""
    recipe = json.loads(metadata[KEY])
    return {**metadata, KEY: json_text({**recipe, **more})}


def check_merge(value: Any, name: str) -> None:
    """Refuse metadata of a file that is no merge.

    Raises:
        FileError: OSRM Init wrote it.
    """
    if isinstance(value, dict) and value.get("method") == START:
        raise FileError(
            "OSRM Init wrote it, to start training from; it is no merge.",
            file=name,
            remedy="write a recipe with osrm_init (docs/headless.md) to make such a file again.",
        )
