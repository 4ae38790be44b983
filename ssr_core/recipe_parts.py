"""What recipes of all kinds have: LoRAs, the model, errors that name every wrong key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .adapters import ConvertOptions
from .errors import FileError


@dataclass(frozen=True)
class Source:
    """One LoRA of a recipe.

    Attributes:
        name: File name below a loras folder, or a path.
        strength_model: Strength on the diffusion model.
        strength_clip: Strength on the text encoder.
        prompts: Calibration prompts.
        sha256: Hash of its content, if that is known.
        calibrated_at: Strengths during calibration.
        convert: How what is not low-rank is converted.
    """

    name: str
    strength_model: float
    strength_clip: float
    prompts: tuple[str, ...]
    sha256: str | None
    calibrated_at: tuple[float, float]
    convert: ConvertOptions


def refused(name: str, wrong: Sequence[str]) -> FileError:
    """The error that names every wrong key of a recipe."""
    return FileError(
        f"this cannot be made: {'; '.join(wrong)}.",
        file=name,
        remedy="correct the recipe; docs/headless.md and docs/recipe.schema.json say what each key takes.",
    )


def source_of(value: Mapping[str, Any], index: int, strengths: Sequence[Any], every: Sequence[Any]) -> Source:
    """One LoRA; `strengths` are those of all records of a calibration, `every` the sources of the recipe."""
    model = float(value.get("strength_model", 1.0))
    clip = float(value.get("strength_clip", model))
    then = value.get("calibrated_at") or (strengths[index] if len(strengths) == len(every) else (model, clip))
    convert = value.get("convert", {})
    return Source(
        value["name"],
        model,
        clip,
        tuple(value.get("prompts") or ("",)),
        value.get("sha256"),
        (float(then[0]), float(then[1])),
        ConvertOptions(max_rank=0) if convert is None else ConvertOptions(**known(convert, ConvertOptions)),
    )


def known(value: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """What of a later version's options this one has, too; the remarks name the rest."""
    names = {one.name for one in fields(kind)}
    return {key: item for key, item in value.items() if key in names}


def model_of(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """How the model is loaded, checked.

    Raises:
        FileError: It says so in no way, or in several.
    """
    ways = [way for way in ("checkpoint", "unet", "graph") if way in value]
    if value and len(ways) != 1:
        raise refused(name, [f"model has {' and '.join(ways) or 'no'} source; give checkpoint, or unet, or graph"])
    if "graph" in value and not value.get("model"):
        raise refused(name, ["model.model has to be the link [node id, output number] of the MODEL in the graph"])
    for key in ("model", "clip_link"):
        link = value.get(key)
        if link and (len(link) != 2 or not isinstance(link[0], str) or type(link[1]) is not int):
            raise refused(name, [f"model.{key} is no link [node id, output number]"])
    for key, node in value.get("graph", {}).items():
        if not (isinstance(node, dict) and isinstance(node.get("class_type"), str)):
            raise refused(name, [f"model.graph.{key} is no node with a class_type"])
        if not isinstance(node.get("inputs", {}), dict):
            raise refused(name, [f"model.graph.{key}.inputs is no object"])
    if value.get("clip") and len(value["clip"]) > 4:
        raise refused(name, ["model.clip has more than four files"])
    return value
