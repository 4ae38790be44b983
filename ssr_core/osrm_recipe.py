"""OSRM as a document: a start for training, or LoRAs that are to be refit, for the command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from .errors import IncompatibleError
from .metadata import START
from .moments import FEATURES, MomentOptions
from .osrm_layer import REFIT_MODES, RefitOptions
from .osrm_options import INIT_STYLES, LAYER_CHOICES, InitOptions
from .recipe import Recipe, parse_recipe, read_json, read_recipe
from .recipe_parts import Source, model_of, refused, source_of
from .recipe_schema import SCHEMA
from .schema import problems

_Options = TypeVar("_Options", MomentOptions, InitOptions, RefitOptions)

INIT, REFIT = START, "osrm_refit"

REFIT_MOMENTS = MomentOptions("tokens")
"""Where nobody says otherwise: in the node and in recipes."""


@dataclass(frozen=True)
class OSRMRecipe:
    """An OSRM Init or an OSRM Refit.

    Attributes:
        model: How model and text encoder are loaded; empty where the file does not say.
        settings: Of the passes; what is absent is as in the nodes.
        moments: What is kept of a layer's inputs.
        prompts: What the other LoRAs show, for a start.
        init: The start; None for a refit.
        sources: The LoRAs that are refit.
        refit: How; None for a start.
    """

    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    moments: MomentOptions
    prompts: tuple[str, ...] = ()
    init: InitOptions | None = None
    sources: tuple[Source, ...] = ()
    refit: RefitOptions | None = None


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


def _says(words: str, **schema: Any) -> dict[str, Any]:
    return {**schema, "description": words}


_PROPERTIES = SCHEMA["properties"]
_SHARE: dict[str, Any] = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_MOMENTS = {
    "features": _says(
        "What is learnt of layer inputs: each sample's mean over its tokens, or every token.", enum=list(FEATURES)
    ),
    "exact_limit": _says("Widest layer whose second moments are kept exactly.", type="integer", minimum=0),
    "sketch": _says("Columns of the sketch of wider layers.", type="integer", minimum=8),
}
_INIT = _object(
    {
        "prompts": _says(
            "What the other LoRAs show; together they are one task.",
            type="array",
            items={"type": "string"},
            minItems=1,
        ),
        "rank": _says("Of every layer.", type="integer", minimum=1),
        "alpha": _says("Of every layer.", type="number", exclusiveMinimum=0),
        "layers": _says("Which kinds of layers get a start.", enum=list(LAYER_CHOICES)),
        "only": _says("Regular expression that the path of a layer has to contain.", type="string"),
        "text_encoder": _says("Whether layers of the text encoder get a start too.", type="boolean"),
        "energy": _says("Share of the others' energy that is avoided.", **_SHARE),
        "key_style": _says("Names inside the file.", enum=list(INIT_STYLES)),
        "dtype": {"enum": ["bfloat16", "float16", "float32"]},
        **_MOMENTS,
    },
    "prompts",
)
_REFIT = _object(
    {
        "mode": _says("How the LoRAs are refit, as in OSRM Refit.", enum=list(REFIT_MODES)),
        "strength": _says(
            "How much; 0 changes nothing; mode project takes up to 1, mode analytic ignores it.",
            type="number",
            minimum=0,
        ),
        "energy": _says("Share of the energy of the others' inputs that counts as theirs.", **_SHARE),
        "ridge": _says("Of mode contrast, as a share of the mean eigenvalue.", type="number", exclusiveMinimum=0),
        **_MOMENTS,
    }
)
_UNUSED = ("sampled_tokens", "joint_prompts", "neutral_prompts", "held_out", "rounds", "rounds_gone", "runs", "records")
_PASSES = _PROPERTIES["calibration"]["properties"]["settings"]
_SETTINGS = _object(
    {
        "settings": _says(
            "How the passes run; what is absent is as in the node.",
            **_object({name: one for name, one in _PASSES["properties"].items() if name not in _UNUSED}),
        )
    }
)
_COMMON = {"$schema": {"type": "string"}, "model": _PROPERTIES["model"], "calibration": _SETTINGS}


def _document(title: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"$schema": SCHEMA["$schema"], "title": title, **schema}


OSRM_SCHEMA: Mapping[str, Mapping[str, Any]] = {
    INIT: _document("OSRM Init recipe", _object({**_COMMON, INIT: _INIT}, INIT)),
    REFIT: _document(
        "OSRM Refit recipe",
        _object({**_COMMON, REFIT: _REFIT, "sources": {**_PROPERTIES["sources"], "minItems": 2}}, REFIT, "sources"),
    ),
}
"""By kind; the inputs have the names of the nodes'. docs/<kind>.schema.json are copies."""


def read_any(path: Path) -> Recipe | OSRMRecipe:
    """Read a recipe of any kind: of a merge, of a start for training, or of LoRAs that are refit.

    Raises:
        FileError: The file is missing or damaged; names every wrong key.
    """
    if path.suffix.lower() == ".safetensors":
        return read_recipe(path)
    value = read_json(path)
    kinds = [kind for kind in OSRM_SCHEMA if isinstance(value, dict) and kind in value]
    if len(kinds) > 1:
        raise refused(path.name, ["it has osrm_init and osrm_refit; write one recipe for each"])
    return _parse(value, kinds[0], path.name) if kinds else parse_recipe(value, path.name)


def _parse(value: Mapping[str, Any], kind: str, name: str) -> OSRMRecipe:
    wrong = problems(value, OSRM_SCHEMA[kind])
    if wrong:
        raise refused(name, wrong)
    given = dict(value[kind])
    moments = _with(MomentOptions() if kind == INIT else REFIT_MOMENTS, given)
    common = (model_of(value.get("model") or {}, name), value.get("calibration", {}).get("settings", {}), moments)
    if kind == INIT:
        if "dtype" in given:
            given["dtype"] = getattr(torch, given["dtype"])
        options = _with(InitOptions(), {"style": given.get("key_style", InitOptions().style), **given})
        return OSRMRecipe(*common, prompts=tuple(given["prompts"]), init=options)
    sources = value["sources"]
    try:
        refit = _with(RefitOptions(seed=common[1].get("seed", 0)), given)
    except IncompatibleError as err:
        raise refused(name, [err.what.rstrip(".")]) from err
    return OSRMRecipe(
        *common, sources=tuple(source_of(one, at, (), sources) for at, one in enumerate(sources)), refit=refit
    )


def _with(options: _Options, given: Mapping[str, Any]) -> _Options:
    """Options with what is given of them."""
    names = {one.name for one in fields(options)}
    return replace(options, **{name: item for name, item in given.items() if name in names})
