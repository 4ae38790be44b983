"""Checking JSON against a schema: the few keywords of JSON Schema that recipes use, with errors for people."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}
_WORDS = {
    "object": "an object",
    "array": "a list",
    "string": "a text",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "null": "null",
}


def problems(value: Any, schema: Schema, path: str = "", *, unknown: bool = True) -> list[str]:
    """What is wrong with a JSON value.

    Args:
        value: The value.
        schema: With type, enum, minimum, maximum, exclusiveMinimum, minItems, items, required,
            properties and additionalProperties; all else is ignored.
        path: Where the value stands, for the sentences.
        unknown: Whether keys that the schema does not know count.

    Returns:
        One sentence for each problem, in order; nothing if the value is right.
    """
    here = path or "the recipe"
    wanted = schema.get("type", [])
    kinds = [wanted] if isinstance(wanted, str) else list(wanted)
    if kinds and not any(_is(value, kind) for kind in kinds):
        return [f"{here} is {_shown(value)}, not {' or '.join(_WORDS[kind] for kind in kinds)}"]
    found: list[str] = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{here} is {_shown(value)}, not one of {', '.join(map(str, schema['enum']))}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        found += _range(value, schema, here)
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            found.append(f"{here} has {len(value)} entries, at least {schema['minItems']} are needed")
        for index, item in enumerate(value):
            found += problems(item, schema.get("items", {}), f"{path}[{index}]", unknown=unknown)
    if isinstance(value, dict):
        found += _members(value, schema, path, unknown)
    return found


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES[kind])


def _range(value: float, schema: Schema, here: str) -> list[str]:
    if not -sys.float_info.max <= value <= sys.float_info.max:  # integers of any length, too
        return [f"{here} is not finite"]
    if "minimum" in schema and value < schema["minimum"]:
        return [f"{here} is {value}, the least is {schema['minimum']}"]
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        return [f"{here} is {value}, it has to be more than {schema['exclusiveMinimum']}"]
    if "maximum" in schema and value > schema["maximum"]:
        return [f"{here} is {value}, the most is {schema['maximum']}"]
    return []


def _members(value: Mapping[str, Any], schema: Schema, path: str, unknown: bool) -> list[str]:
    known: Mapping[str, Schema] = schema.get("properties", {})
    dot = f"{path}." if path else ""
    found = [f"{dot}{name} is missing" for name in schema.get("required", ()) if name not in value]
    closed = schema.get("additionalProperties", True) is False
    for name, item in value.items():
        if name in known:
            found += problems(item, known[name], dot + name, unknown=unknown)
        elif closed and unknown:
            found.append(f"{dot}{name} is no known key{_near(name, list(known))}")
    return found


def _near(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(known)})"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
