"""What a record's header says, checked value by value: it may come from a stranger."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from ..adapters import RESTS, ConvertOptions
from ..records import TaskRecord
from ..targets import Part
from .identity import RecordIdentity
from .sketch import RecordOptions

_FACTOR, _SAMPLE = {"columns", "norms"}, {"rows", "scales", "weights"}


def read_identity(header: Mapping[str, Any]) -> RecordIdentity:
    """What the record was made of.

    Raises:
        ValueError, TypeError, KeyError: It does not have the kinds of values that are written.
    """
    given, convert = header["task"], header["task"]["convert_options"]
    texts = given["name"], given["fingerprint"], header["model"], header["text_encoder"], *given["prompts"]
    strengths = given["strength_model"], given["strength_clip"]
    right = all(isinstance(one, str) for one in texts) and isinstance(given["prompts"], list)
    if not right or not all(_number(one) for one in strengths) or not isinstance(header["settings"], dict):
        raise ValueError("what it was made of")
    if convert is not None:
        counts = _count(convert["max_rank"]) and _number(convert["tolerance"]) and convert["tolerance"] >= 0
        if not counts or convert["rest"] not in RESTS:
            raise ValueError("its conversion")
    task = {
        **given,
        "prompts": tuple(given["prompts"]),
        "convert_options": None if convert is None else ConvertOptions(**convert),
    }
    return RecordIdentity(TaskRecord(**task), header["model"], header["text_encoder"], header["settings"])


def read_options(given: Mapping[str, Any]) -> RecordOptions:
    """How much the record keeps.

    Raises:
        ValueError, TypeError, KeyError, CalibrationError: These are no such options.
    """
    counts = [given[name] for name in ("columns", "exact_limit", "sampled_tokens")]
    if not all(_count(one) for one in counts) or not _number(given["budget_mb"]):
        raise ValueError("its options")
    return RecordOptions(**given)


def checked_factor(entry: dict[str, Any]) -> dict[str, Any]:
    """What the header says of one factor, unchanged.

    Raises:
        ValueError, TypeError, KeyError: It does not have the kinds of values that are written.
    """
    numbers = [entry[name] for name in ("trace", "tokens")]
    if not all(_number(one) and one >= 0 for one in numbers) or not (
        _count(entry["own"]) and _count(entry["nonfinite"])
    ):
        raise ValueError("a layer's counts")
    layers, sums, marked = entry["layers"], entry["crc32"], isinstance(entry["bfloat16"], bool)
    if not isinstance(layers, list) or not layers or not all(_is_layer(one) for one in layers):
        raise ValueError("a layer's name")
    if not marked or set(sums) not in (_FACTOR, _FACTOR | _SAMPLE) or not all(_count(one) for one in sums.values()):
        raise ValueError("a layer's tensors")
    return entry


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_layer(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[0] in get_args(Part) and isinstance(value[1], str)
