"""A report small enough to travel to a browser with every run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from .report import MergeReport

LIMIT = 600_000
"""Characters of JSON. A server keeps the answers of its last runs in memory."""
VERSION = 1
_DETAILS = 20
_SPARED = ("closest", "overlap", "held_task_errors", "task_errors", "crosstalk")
"""Columns of the layers that go first, in this order, where not all fit: those that grow with the LoRAs."""


def compact_report(report: MergeReport, limit: int = LIMIT) -> dict[str, object]:
    """`MergeReport.to_json()` with its layers as one table and numbers to four digits, within `limit` characters.

    What does not fit is left out and counted in `omitted`: first the layers' columns that grow with the number of
    LoRAs, then the layers with the smallest error; and whatever else is too long.

    Args:
        report: The report.
        limit: Characters of JSON that may be used.

    Returns:
        The report's JSON; `layers` is `{"columns": [...], "rows": [[...], ...], "total": int}`, and of each file's
        details the first ones, with `details_total`.
    """
    full = report.to_json()
    layers = cast("Sequence[Mapping[str, Any]]", full.pop("layers"))
    files = cast("Sequence[Mapping[str, Any]]", full.pop("files"))
    head: dict[str, object] = {"version": VERSION, "kind": "merge"}
    omitted: dict[str, object] = {}
    short = [
        {**account, "details": list(account["details"])[:_DETAILS], "details_total": len(account["details"])}
        for account in files
    ]
    room = limit - _length(head)
    for name, value in {**full, "files": short}.items():
        rounded = _rounded(value)
        size = _length(rounded) + len(name) + 6
        if size > min(room, limit // 2):
            omitted[name] = True
            continue
        head[name] = rounded
        room -= size
    table, left_out = _table([_rounded(layer) for layer in layers], room)
    return {**head, "layers": table, "omitted": {**omitted, **left_out}}


def _table(layers: Sequence[Mapping[str, Any]], room: int) -> tuple[dict[str, object], dict[str, object]]:
    """The layers as columns and rows within `room` characters, and what was left out of them."""
    omitted: dict[str, object] = {}
    columns = list(layers[0]) if layers else []
    sizes = {column: sum(_length(layer.get(column)) + 2 for layer in layers) for column in columns}
    dropped = []
    for column in _SPARED:
        if sum(sizes.values()) > room and column in columns:
            columns.remove(column)
            dropped.append(column)
            del sizes[column]
    if dropped:
        omitted["layer_columns"] = dropped
    rows = [[layer.get(column) for column in columns] for layer in layers]
    order = sorted(range(len(rows)), key=lambda index: -_worst(layers[index]))
    kept, used = set[int](), _length(columns)
    for index in order:
        used += _length(rows[index]) + 2
        if used > room:
            break
        kept.add(index)
    if len(kept) < len(rows):
        omitted["layers"] = len(rows) - len(kept)
    table = {"columns": columns, "rows": [row for i, row in enumerate(rows) if i in kept], "total": len(rows)}
    return table, omitted


def _worst(layer: Mapping[str, Any]) -> float:
    """What layers are ranked by where not all fit."""
    return float((layer.get("errors") or {}).get("result") or 0.0)


def _length(value: object) -> int:
    return len(json.dumps(value))


def _rounded(value: Any) -> Any:
    """The same JSON value with four significant digits; numbers that JSON does not know become null."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if abs(value) != float("inf") and value == value else None
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
