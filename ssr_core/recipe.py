"""A merge as a document: what a recipe file and a merged file's metadata say alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .compression import CompressOptions
from .emit import KeyStyle
from .errors import FileError, IncompatibleError
from .files import read_metadata
from .metadata import KEY, check_merge
from .methods import METHODS, MergeMethod
from .recipe_parts import Source, known, model_of, refused, source_of
from .recipe_runs import RecordUse, Run, read_record_use, read_runs
from .recipe_schema import SCHEMA
from .rounds import GONE
from .schema import problems

CONDITIONING = "conditioning:"
"""Begin of a prompt that stands for a CONDITIONING, whose content no file holds."""


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
    gone = sorted({lora for one in [settings or {}, *(run.settings for run in runs)] for lora in one.get(GONE, ())})
    if gone:
        raise refused(name, [f"its calibration ran further rounds with LoRAs that are not in it: {', '.join(gone)}"])
    for one in ([run.settings for run in runs] or [settings or {}]) if recorded else ():
        if one.get("custom_latent") and one.get("latent_fill") is None:
            raise refused(
                name, ["it was calibrated on a LATENT with content, or not known to be empty; the file lacks it"]
            )
    compress = value.get("compress")
    if compress is not None and not recorded:  # files of earlier versions counted in comfy's names
        compress = {"key_style": value.get("key_style", "comfy"), **compress}
    try:
        options = None if compress is None else CompressOptions(**known(compress, CompressOptions))
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


def _parameters(kind: type[MergeMethod]) -> dict[str, dict[str, Any]]:
    """The schema of each of a method's parameters."""
    names: dict[object, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}
    found: dict[str, dict[str, Any]] = {}
    for name, hint in get_type_hints(kind).items():
        if get_origin(hint) is Literal:
            found[name] = {"enum": list(get_args(hint))}
        elif get_origin(hint) is tuple:
            found[name] = {"type": "array", "items": {"type": names[get_args(hint)[0]]}}
        elif hint in names:
            found[name] = {"type": names[hint]}
    return found


def _method(name: str, parameters: Mapping[str, Any], file: str) -> MergeMethod:
    kind = METHODS[name]
    known = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    strange = [key for key in parameters if key not in known]
    takes = _parameters(kind)
    wrong = [one for key, item in parameters.items() for one in problems(item, takes.get(key, {}), f"parameters.{key}")]
    if wrong:
        raise refused(file, wrong)
    if strange:
        listed = f"takes {', '.join(known)}" if known else "takes none"
        raise refused(file, [f"parameters.{strange[0]} is no parameter of {name}, which {listed}"])
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in parameters.items()}
    try:
        return kind(**values)
    except (IncompatibleError, TypeError, ValueError) as err:
        raise refused(file, [f"parameters: {getattr(err, 'what', err)}".rstrip(".")]) from err
