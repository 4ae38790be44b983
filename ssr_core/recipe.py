"""A merge as a document: what a recipe file and a merged file's metadata say alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .adapters import ConvertOptions
from .compression import CompressOptions
from .emit import KeyStyle
from .errors import FileError, IncompatibleError
from .files import read_metadata
from .metadata import KEY, check_merge
from .methods import METHODS, MergeMethod
from .recipe_runs import RecordUse, Run, read_record_use, read_runs
from .recipe_schema import SCHEMA
from .schema import problems

CONDITIONING = "conditioning:"
"""Begin of a prompt that stands for a CONDITIONING, whose content no file holds."""


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


@dataclass(frozen=True)
class Recipe:
    """A whole merge.

    Attributes:
        sources: The LoRAs.
        method: How they are merged.
        model: How model and text encoder are loaded; empty where the file does not say.
        settings: Of the calibration passes; what is absent is as in SSR Merge. None: no calibration.
        calibration_file: A saved calibration, instead of passes.
        calibrated_model: Identity of the model that was calibrated; empty where it is not known.
        dtype: Of the merged factors.
        unsupported: What to do about keys that are not low-rank.
        unseen_layers: What to do about layers that never ran.
        compress: How much smaller the merge is made.
        key_style: Names in the file.
        same_model: False if it was solved from the calibration of another model.
        remarks: What reading it left out.
        runs: Runs whose sum the calibration is; empty for one run by `settings`.
        records: What the records were that the calibration is put together from; None for passes.
    """

    sources: tuple[Source, ...]
    method: MergeMethod
    model: Mapping[str, Any]
    settings: Mapping[str, Any] | None
    calibration_file: str | None = None
    calibrated_model: str = ""
    dtype: str = "auto"
    unsupported: str = "refuse"
    unseen_layers: str = "anchor"
    compress: CompressOptions | None = None
    key_style: KeyStyle = "comfy"
    same_model: bool = True
    remarks: tuple[str, ...] = field(default=())
    runs: tuple[Run, ...] = field(default=())
    records: RecordUse | None = None


def read_recipe(path: Path) -> Recipe:
    """Read a recipe: a JSON file, or the metadata of a file that SSR-Merge wrote.

    Raises:
        FileError: The file is missing, damaged, or says nothing of a merge; names every wrong key.
    """
    return _from_metadata(path) if path.suffix.lower() == ".safetensors" else parse_recipe(read_json(path), path.name)


def read_json(path: Path) -> Any:
    """The values of a recipe file.

    Raises:
        FileError: The file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise FileError(f"cannot read the recipe ({err.strerror}).", file=str(path), remedy="check the path.") from err
    except (ValueError, RecursionError) as err:
        raise FileError(f"the recipe is no JSON ({err}).", file=str(path), remedy="mend it there.") from err


def _from_metadata(path: Path) -> Recipe:
    metadata = read_metadata(path)
    if KEY not in metadata:
        raise FileError(
            "its metadata says nothing of a merge.", file=path.name, remedy="choose a file that SSR Save LoRA wrote."
        )
    try:
        value = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as err:
        raise FileError(f"its metadata is damaged ({err}).", file=path.name, remedy="use a recipe file.") from err
    if isinstance(value, dict):
        value.setdefault("key_style", metadata.get(f"{KEY}.key_style", "comfy"))
    return parse_recipe(value, path.name, recorded=True)


def parse_recipe(value: Any, name: str, *, recorded: bool = False) -> Recipe:
    """A recipe from JSON values.

    Args:
        value: The JSON.
        name: Of the file, for errors.
        recorded: Whether it is metadata: unknown keys of a later version are then a remark, no error.

    Raises:
        FileError: Names every wrong key.
    """
    if recorded:
        check_merge(value, name)
    wrong = problems(value, SCHEMA, unknown=not recorded)
    if wrong:
        raise refused(name, wrong)
    remarks = tuple(f"Ignored, from another version: {one}." for one in problems(value, SCHEMA)) if recorded else ()
    method = _method(value.get("method", "ssr"), value.get("parameters", {}), name)
    calibration = value.get("calibration", {} if method.needs_calibration else None)
    settings = None if calibration is None else calibration.get("settings", {})
    absent = {"sampled_tokens": 0} if recorded else {}  # the first release kept none and did not say so
    settings = None if settings is None else {**absent, **settings}
    strengths = (calibration or {}).get("strengths", [])
    sources = tuple(source_of(one, index, strengths, value["sources"]) for index, one in enumerate(value["sources"]))
    hidden = [one.name for one in sources if any(CONDITIONING in prompt for prompt in one.prompts)]
    if hidden and settings is not None:
        raise refused(name, [f"{hidden[0]} was calibrated with a CONDITIONING, whose content is not in the file"])
    runs = read_runs(settings or {}, value["sources"], name, absent)
    for one in ([run.settings for run in runs] or [settings or {}]) if recorded else ():
        if one.get("custom_latent") and one.get("latent_fill") is None:
            raise refused(
                name, ["it was calibrated on a LATENT with content, or not known to be empty; the file lacks it"]
            )
    compress = value.get("compress")
    if compress is not None and not recorded:  # files of earlier versions counted in comfy's names
        compress = {"key_style": value.get("key_style", "comfy"), **compress}
    try:
        options = None if compress is None else CompressOptions(**_known(compress, CompressOptions))
    except IncompatibleError as err:
        raise refused(name, [err.what.rstrip(".")]) from err
    return Recipe(
        sources,
        method,
        model_of(value.get("model") or {}, name),
        settings,
        (calibration or {}).get("file"),
        (calibration or {}).get("model", ""),
        value.get("dtype", "auto"),
        value.get("unsupported", "refuse"),
        value.get("unseen_layers", "anchor"),
        options,
        value.get("key_style", "comfy"),
        value.get("calibrated_on_this_model", True),
        remarks,
        runs,
        read_record_use(settings or {}, value["sources"], name),
    )


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
        ConvertOptions(max_rank=0) if convert is None else ConvertOptions(**_known(convert, ConvertOptions)),
    )


def _known(value: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """What of a later version's options this one has, too; the remarks name the rest."""
    names = {one.name for one in fields(kind)}
    return {key: item for key, item in value.items() if key in names}


def _method(name: str, parameters: Mapping[str, Any], file: str) -> MergeMethod:
    kind = METHODS[name]
    known = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    strange = [key for key in parameters if key not in known]
    wrong = [one for key, item in parameters.items() for one in problems(item, {}, f"parameters.{key}")]
    if wrong:
        raise refused(file, wrong)
    if strange:
        takes = f"takes {', '.join(known)}" if known else "takes none"
        raise refused(file, [f"parameters.{strange[0]} is no parameter of {name}, which {takes}"])
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in parameters.items()}
    try:
        return kind(**values)
    except (IncompatibleError, TypeError, ValueError) as err:
        raise refused(file, [f"parameters: {getattr(err, 'what', err)}".rstrip(".")]) from err


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
