"""The schema of recipes, which is also that of a merged file's metadata; docs/recipe.schema.json is its copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from .adapters import RESTS, ConvertOptions
from .compression import LIMITS
from .emit import KEY_STYLES
from .methods import METHODS
from .padding import PaddingMode
from .sampling import SampleOptions

PASS_DEFAULTS: Mapping[str, Any] = {
    "seed": 0,
    "steps": 4,
    "width": 512,
    "height": 512,
    "frames": 1,
    "scheduler": "simple",
    "padding": "balance",
    "memory_budget_gb": 0.0,
    "sampled_tokens": SampleOptions().tokens,
    "joint_prompts": "",
    "neutral_prompts": "",
    "rounds": 1,
}
"""Settings of calibration passes where nobody says otherwise: in nodes and in recipes."""

_CONVERT = ConvertOptions()
_TEXT: dict[str, Any] = {"type": "string"}
_LINES: dict[str, Any] = {"type": ["array", "string"], "items": {"type": "string"}}
_NOTED = "Written into metadata; not needed in a recipe."


def _object(properties: dict[str, Any], required: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        **more,
    }


def _strength(words: str) -> dict[str, Any]:
    return {"type": "number", "minimum": -100, "maximum": 100, "description": words}


_SOURCE = _object(
    {
        "name": {**_TEXT, "description": "File name below a loras folder of ComfyUI, or a path."},
        "sha256": {"type": ["string", "null"], "description": "Hash of the file; another content is refused."},
        "strength_model": _strength("Strength on the diffusion model; 1 if absent."),
        "strength_clip": _strength("Strength on the text encoder; that of the model if absent."),
        "prompts": {"type": "array", "items": _TEXT, "description": "What this LoRA shows, with its trigger word."},
        "calibrated_at": {
            "type": ["array", "null"],
            "items": {"type": "number"},
            "minItems": 2,
            "description": "Strengths on model and text encoder during calibration; those of the merge if absent.",
        },
        "convert": {
            **_object(
                {
                    "max_rank": {"type": "integer", "minimum": 0},
                    "tolerance": {"type": "number", "minimum": 0},
                    "rest": {"enum": list(RESTS)},
                }
            ),
            "type": ["object", "null"],
            "description": f"How what is not low-rank is converted; at most rank {_CONVERT.max_rank} if absent.",
        },
    },
    ("name",),
)

_PASSES: dict[str, Any] = {
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
    "steps": {"type": "integer", "minimum": 1, "maximum": 100},
    "width": {"type": "integer", "minimum": 16},
    "height": {"type": "integer", "minimum": 16},
    "frames": {"type": "integer", "minimum": 1},
    "scheduler": _TEXT,
    "padding": {"enum": list(get_args(PaddingMode))},
    "sampled_tokens": {"type": "integer", "minimum": 0, "description": "Whole inputs kept; 0 for none."},
    "joint_prompts": {
        **_LINES,
        "description": "Prompts of all LoRAs together, as a list or line by line; [name or number, ...] before one "
        "names some.",
    },
    "neutral_prompts": {**_LINES, "description": "Prompts under which no LoRA should act, likewise."},
    "rounds": {
        "type": "integer",
        "minimum": 1,
        "maximum": 4,
        "description": "1: each LoRA alone. More: then all passes again on the merged model.",
    },
    "rounds_gone": {
        "type": "array",
        "items": _TEXT,
        "description": "LoRAs that only the merges of further rounds had: such a calibration cannot be made again.",
    },
    "held_out": {"type": "integer", "minimum": 0, "description": f"One token of so many was held out. {_NOTED}"},
    "memory_budget_gb": {"type": "number", "minimum": 0},
    "sigmas": {
        "type": "array",
        "items": {"type": "number", "exclusiveMinimum": 0},
        "description": "Noise levels at which the model is evaluated, instead of steps and scheduler.",
    },
    "custom_sigmas": {"type": "boolean", "description": "Whether sigmas counts; true where it is given if absent."},
    "latent": {
        "type": "array",
        "items": {"type": "integer", "minimum": 1},
        "description": "Shape of the latent, instead of width, height and frames.",
    },
    "custom_latent": {"type": "boolean", "description": "Whether latent counts; true where it is given if absent."},
    "latent_fill": {"type": ["number", "null"], "description": "The one value of all the latent; 0 if absent."},
    "custom latent": {**_TEXT, "description": f"Hash of the latent, in records. {_NOTED}"},
}

_HOW = "How the calibration passes run; what is absent is as in SSR Merge."

_RUN = _object(
    {
        "settings": _object({**_PASSES, "records": {"type": "object"}}, description=_HOW),
        "prompts": {
            "type": "array",
            "items": {"type": "array", "minItems": 2},
            "description": "For each LoRA its sha256 and the list of its prompts.",
        },
        "weight": {"type": "number", "exclusiveMinimum": 0, "description": "How much the run's tokens count."},
        "order": {"type": "array", "items": _TEXT, "description": "The LoRAs' sha256 in the order of joint prompts."},
    },
    ("settings", "prompts", "weight"),
)

_RECORDS = {
    "type": "object",
    "properties": {
        "extends": {"type": "boolean", "description": "Whether they were added to a calibration by passes."},
        "passes": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "sha256": _TEXT,
                    "prompts": {"type": "array", "items": _TEXT},
                    "weight": {"type": "number", "exclusiveMinimum": 0},
                    "options": {"type": "object"},
                },
                "required": ["sha256", "prompts", "weight"],
            },
        },
    },
    "description": f"Which records it was put together from. {_NOTED}",
}

_SETTINGS = _object(
    {
        **_PASSES,
        "runs": {"type": "array", "items": _RUN, "description": "Runs whose sum the calibration is, instead of one."},
        "records": _RECORDS,
    },
    description=_HOW,
)

_LINK = {"type": ["array", "null"], "description": "[node id, output number]"}

_MODEL = _object(
    {
        "checkpoint": {**_TEXT, "description": "File below a checkpoints folder: model and text encoder in one."},
        "unet": {**_TEXT, "description": "File below a diffusion_models folder."},
        "weight_dtype": {**_TEXT, "description": "Of the unet, as in Load Diffusion Model; default if absent."},
        "clip": {"type": "array", "items": _TEXT, "description": "One to four files below a text_encoders folder."},
        "clip_type": {**_TEXT, "description": "Type of the text encoder, as in Load CLIP and DualCLIPLoader."},
        "graph": {
            "type": "object",
            "description": "Loader nodes in ComfyUI's API format, by node id; with the links model and clip_link.",
        },
        "model": _LINK,
        "clip_link": _LINK,
        "custom_nodes": {
            "type": "array",
            "items": _TEXT,
            "description": "Folders in custom_nodes whose nodes the graph uses; no others are loaded.",
        },
    },
    description="How model and text encoder are loaded: checkpoint; or unet, clip and clip_type; or graph.",
)
_MODEL["type"] = ["object", "null"]

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "SSR-Merge recipe",
    **_object(
        {
            "$schema": _TEXT,
            "version": {**_TEXT, "description": f"Of SSR-Merge. {_NOTED}"},
            "model": _MODEL,
            "sources": {"type": "array", "items": _SOURCE, "minItems": 1, "description": "The LoRAs, in order."},
            "method": {"enum": list(METHODS), "description": "As mode in SSR Merge; ssr if absent."},
            "parameters": {"type": "object", "description": "Parameters of the method; its defaults if absent."},
            "calibration": {
                **_object(
                    {
                        "settings": _SETTINGS,
                        "file": {**_TEXT, "description": "A saved calibration, instead of passes."},
                        "model": {**_TEXT, "description": f"Identity of the model that was calibrated. {_NOTED}"},
                        "strengths": {
                            "type": "array",
                            "items": {"type": "array", "items": {"type": "number"}, "minItems": 2},
                            "description": f"As calibrated, by record. {_NOTED}",
                        },
                    }
                ),
                "type": ["object", "null"],
                "description": "null: no calibration, for methods that need none.",
            },
            "dtype": {"enum": ["auto", "bfloat16", "float16", "float32"]},
            "unsupported": {"enum": ["refuse", "pass_through"]},
            "unseen_layers": {"enum": ["anchor", "refuse"]},
            "apply": {**_TEXT, "description": f"How a MODEL got the merge; no matter for a file. {_NOTED}"},
            "compress": {
                **_object(
                    {
                        "limit": {"enum": list(LIMITS)},
                        "value": {"type": "number", "exclusiveMinimum": 0},
                        "ridge": {"type": "number", "minimum": 0},
                        "key_style": {
                            "enum": list(KEY_STYLES),
                            "description": "Of the file whose size counts; that of the recipe if absent.",
                        },
                    },
                    ("limit", "value"),
                ),
                "type": ["object", "null"],
                "description": "As in SSR Compress; not compressed if absent.",
            },
            "key_style": {"enum": list(KEY_STYLES)},
            "calibrated_on_this_model": {"type": "boolean", "description": _NOTED},
        },
        ("sources",),
    ),
}
