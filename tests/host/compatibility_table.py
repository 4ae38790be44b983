"""The compatibility table: rows as JSON for machines, and as tables for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .adapters import ADAPTERS
from .dialects import DIALECTS, PRIMARY
from .graphs import FAMILIES
from .matrix import Cell

Row = dict[str, Any]
COUNTS = ("read", "routed", "summed", "passed", "converted", "refused", "unused")
"""Numbers of keys in a row; all but the first add up to it."""
COLUMN_OF_FATE = {
    "routed": "routed",
    "merged": "routed",
    "anchored": "routed",
    "summed": "summed",
    "passed_through": "passed",
    "host_patch": "passed",
    "converted": "converted",
    "refused": "refused",
    "unmatched": "unused",
    "shadowed": "unused",
    "strength_0": "unused",
}

_INTRO = """# What loads and merges

Made by `make compatibility` on ComfyUI {version}: for each cell a random file of that dialect and kind was merged with
a second, plain LoRA by SSR Merge (mode sum) in a running ComfyUI, on a tiny checkpoint with random weights that
ComfyUI's own loader takes for that family. "ok" means: every weight of the merged MODEL is the base plus both changes,
computed independently in float64; SSR Save LoRA's file, loaded by core's LoRA loader, gives the same weights without
an unloaded key; and every key of the file has a fate in the report. The number is the worst relative error of one
layer's change. "part": some keys of the file were unused, because the model has no layer of that name; the report
lists each. A file of which fewer than half of the layers exist is refused; core's own loader then reads less than half
of it, too. Core's loader never reads a key that the pack leaves out; where it reads fewer, a note says how many.

Rows are names of layers, as trainers write them (native: ComfyUI's own names; A/B, up/down: names of the factors).
Columns are kinds: vectors are biases and norms, set is replaced parameters, loose are matrices that belong to no layer,
reshape changes the shape of a weight; an empty cell was not run. Kinds other than plain LoRA were converted with
convert_rank 1024 and convert_error 1e-5, which loses nothing on these small layers. At real widths the default rank of
128 leaves a part of a DoRA or of a LoKr over: [measured](benchmarks/conversion.md). Quantised bases:
[measured](benchmarks/quantised.md).

Not shown by this: real checkpoints, files of real trainers (the spellings are written down from their code and
documentation), and image quality. Mode ssr is compared with a dense least-squares solution in every family by
tests/host/test_router.py.
"""


def row(cell: Cell, status: str, reason: str, fates: Mapping[str, int], error: float | None) -> Row:
    """One row of the table.

    Args:
        cell: The cell.
        status: "ok" or "refused".
        reason: Why it was refused, or why keys are unused.
        fates: Number of the file's keys by fate.
        error: Worst relative error of a weight; None where nothing was merged.
    """
    counts = dict.fromkeys(COUNTS, 0)
    for fate, number in fates.items():
        counts[COLUMN_OF_FATE[fate]] += number
        counts["read"] += number
    rounded = None if error is None else float(f"{error:.0e}")
    named = {f"keys_{name}": number for name, number in counts.items()}
    identity = {"family": cell.family, "dialect": cell.dialect, "adapter": cell.adapter}
    return {**identity, "status": status, "reason": reason, **named, "max_relative_weight_error": rounded}


def comparable(entry: Row) -> Row:
    """A row without what differs from machine to machine."""
    return {name: value for name, value in entry.items() if name != "max_relative_weight_error"}


def read(folder: Path) -> dict[Cell, Row]:
    """The committed rows by cell; empty where there is no table yet."""
    path = folder / "compatibility.json"
    if not path.is_file():
        return {}
    return {cell_of(entry): entry for entry in json.loads(path.read_text())["cells"]}


def cell_of(entry: Row) -> Cell:
    return Cell(entry["family"], entry["dialect"], entry["adapter"])


def write(folder: Path, version: str, rows: Sequence[Row]) -> None:
    """Write compatibility.json and compatibility.md."""
    ordered = sorted(rows, key=cell_of)
    lines = ",\n".join("    " + json.dumps(entry) for entry in ordered)
    text = f'{{\n  "comfyui": {json.dumps(version)},\n  "cells": [\n{lines}\n  ]\n}}\n'
    assert json.loads(text)["cells"] == ordered
    (folder / "compatibility.json").write_text(text)
    (folder / "compatibility.md").write_text(_markdown(version, ordered))


def _markdown(version: str, rows: Sequence[Row]) -> str:
    by_cell = {cell_of(entry): entry for entry in rows}
    sections = [_INTRO.format(version=version), _summary(rows)]
    for family in FAMILIES:
        mine = {cell: entry for cell, entry in by_cell.items() if cell.family == family}
        if mine:
            sections.append(_family_section(family, mine))
    return "\n".join(sections)


def _summary(rows: Sequence[Row]) -> str:
    """Family by kind: how many of the cells were merged."""
    lines = ["## In short", "", "Cells merged, of cells run.", ""]
    lines += ["| family | " + " | ".join(ADAPTERS) + " |", "|---" * (len(ADAPTERS) + 1) + "|"]
    for family in FAMILIES:
        shown = []
        for kind in ADAPTERS:
            states = [entry["status"] for entry in rows if (entry["family"], entry["adapter"]) == (family, kind)]
            shown.append(f"{states.count('ok')} of {len(states)}" if states else "")
        lines.append(f"| {family} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, ""])


def _family_section(family: str, rows: Mapping[Cell, Row]) -> str:
    adapters = [kind for kind in ADAPTERS if any(cell.adapter == kind for cell in rows)]
    dialects = sorted({cell.dialect for cell in rows}, key=lambda name: (name != PRIMARY[family], name))
    notes: list[str] = []
    lines = [f"## {family}", "", "| keys | " + " | ".join(adapters) + " |", "|---" * (len(adapters) + 1) + "|"]
    for dialect in dialects:
        shown = [_shown(rows.get(Cell(family, dialect, kind)), notes) for kind in adapters]
        lines.append(f"| {dialect}: `{DIALECTS[family][dialect].pattern}` | " + " | ".join(shown) + " |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), ""]
    return "\n".join(lines)


def _shown(entry: Row | None, notes: list[str]) -> str:
    """One cell of a table, with the number of its footnote."""
    if entry is None:
        return ""
    word = "part" if entry["keys_unused"] else entry["status"]
    text = entry["status"] if entry["status"] != "ok" else f"{word} {_power(entry['max_relative_weight_error'])}"
    note = entry["reason"]
    if not note:
        return text
    if note not in notes:
        notes.append(note)
    return f"{text} ({notes.index(note) + 1})"


def _power(error: float) -> str:
    """An upper bound of an error as a power of ten."""
    return f"<1e{math.ceil(math.log10(max(error, 1e-12)) + 1e-9)}"
