"""Merge methods as people write them: a name and its settings on one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from .errors import IncompatibleError
from .methods import METHODS, MergeMethod

_YES, _NO = ("true", "on", "yes", "1"), ("false", "off", "no", "0")
OSRM_REASON = (
    "OSRM Refit is no merge: it changes the LoRAs themselves, before they are calibrated. Put it before SSR Calibrate "
    "and connect a second SSR Compare there. Its errors are about the changed LoRAs; what they kept of the old ones is "
    "in OSRM Refit's report."
)


class NoMergeError(IncompatibleError):
    """A line names something that is no merge, and is explained."""


def parse_lines(lines: Sequence[str]) -> list[MergeMethod | NoMergeError]:
    """Read all lines (`parse_method`); in place of one that is no merge, its explanation.

    Args:
        lines: A method each.

    Raises:
        IncompatibleError: A line means nothing; the error names it and what the method takes.
    """
    found: list[MergeMethod | NoMergeError] = []
    for line in lines:
        try:
            found.append(parse_method(line))
        except NoMergeError as err:
            found.append(err)
        except IncompatibleError as err:
            raise IncompatibleError(f"the line {line!r} of methods: {err.what}", remedy=err.remedy) from err
    return found


def parse_method(line: str) -> MergeMethod:
    """Read a line such as `ssr ridge=0.1 anchor=average` or `np_lora mu=1`.

    Args:
        line: A method's name, then any of its parameters as name=value; lists with commas.

    Raises:
        NoMergeError: It names OSRM Refit.
        IncompatibleError: There is no such method or parameter, or the value makes no sense.
    """
    words = line.split()
    name = words[0].lower() if words else ""
    if name.startswith("osrm"):
        raise NoMergeError(OSRM_REASON)
    if name not in METHODS:
        raise IncompatibleError(f"there is no method {name!r}.", remedy=f"use one of {', '.join(METHODS)}.")
    kind = METHODS[name]
    defaults = {f.name: f.default for f in fields(kind)}  # type: ignore[arg-type]
    values = {}
    for word in words[1:]:
        key, sign, value = word.partition("=")
        if not sign or key not in defaults:
            known = ", ".join(f"{key}={default}" for key, default in defaults.items()) or "none"
            raise IncompatibleError(f"the method {name} has no setting {word!r}.", remedy=f"it has {known}.")
        try:
            values[key] = _read(value, defaults[key])
        except ValueError as err:
            raise IncompatibleError(
                f"{word!r} is no value for {name}.", remedy=f"write it like {key}={defaults[key]}."
            ) from err
    return kind(**values)


def _read(text: str, default: object) -> object:
    """A value of the default's type."""
    if isinstance(default, bool):
        if text.lower() not in _YES + _NO:
            raise ValueError(text)
        return text.lower() in _YES
    if isinstance(default, int):
        return int(text)
    if isinstance(default, float):
        return float(text)
    if isinstance(default, tuple):
        return tuple(int(part) for part in text.split(","))
    return text
