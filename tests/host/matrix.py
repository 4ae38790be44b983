"""One cell of the compatibility matrix: a file of some family, dialect and kind through the whole pack."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapters import ADAPTERS, AdapterFile, write_adapter
from .dialects import DIALECTS, PRIMARY, Entry
from .graphs import FAMILIES
from .merging import MergeGraph
from .server import Result, Server
from .weights import dumped

OTHER_STRENGTH = 0.8
CONVERTED = ("loha", "lokr", "lokr_tucker", "glora", "oft", "boft", "diff", "dora")
"""Kinds that the pack turns into low-rank factors, where its nodes can do that."""
NEVER_MERGED = ("set", "reshape")
MAYBE_REFUSED = (*NEVER_MERGED, "loose", "lokr_tucker")
SPATIAL = ("sdxl", "sd15", "sd3")
"""Families with two-dimensional kernels of more than one element."""
WITH_LOOSE = ("zimage", "sd3", "hidream", "krea2", "wan21", "wan22", "ltxv", "anima")
"""Families with matrices that belong to no layer."""
SPLIT = {"flux": "diffusers", "zimage": "ai_toolkit", "sd3": "diffusers"}
CONVERT_OPTIONS = {"convert_rank": 1024, "convert_error": 1e-5}
"""Exact within rounding: no tiny weight has a higher rank."""
ONLY_PLAIN = ("qwen_image_edit", "flux2_klein")
"""Networks that another family has already, under other conditioning."""


@dataclass(frozen=True, order=True)
class Cell:
    """What one file of the matrix is."""

    family: str
    dialect: str
    adapter: str

    def __str__(self) -> str:
        return f"{self.family}-{self.dialect}-{self.adapter}"


def all_cells() -> list[Cell]:
    """Plain LoRAs in every dialect; every kind in the family's primary one and, for some, with split q, k, v."""
    cells = {Cell(family, dialect, "lora") for family in FAMILIES for dialect in DIALECTS[family]}
    pairs = [(f, PRIMARY[f]) for f in FAMILIES if f not in ONLY_PLAIN] + list(SPLIT.items())
    for family, dialect in pairs:
        kinds = [kind for kind in ADAPTERS if family in SPATIAL or "tucker" not in kind]
        kinds = [kind for kind in kinds if kind != "loose" or (family in WITH_LOOSE and dialect == PRIMARY[family])]
        cells |= {Cell(family, dialect, kind) for kind in kinds}
    return sorted(cells)


def files(base: Path, weights: Mapping[str, Tensor], cell: Cell) -> tuple[AdapterFile, AdapterFile]:
    """The cell's file, and a plain one that shares most of its layers."""
    few = cell.adapter != "lora"

    def include(entry: Entry, number: int) -> bool:
        spatial = weights[f"diffusion_model.{entry.module}.weight"].ndim > 2
        return not few or spatial or _special(entry, number)

    folder = base / "models" / "loras"
    dialects = DIALECTS[cell.family]
    path = folder / f"cell_{cell.family}_{cell.dialect}_{cell.adapter}.safetensors"
    first = write_adapter(path, weights, dialects[cell.dialect], cell.adapter, 301, include)
    touched = {piece.parameter.removesuffix(".weight").removeprefix("diffusion_model.") for piece in first.pieces}
    other = folder / f"other_{cell.family}_{cell.dialect if few else 'all'}.safetensors"
    second = write_adapter(
        other, weights, dialects["native"], "lora", 302, lambda e, n: n % 7 != 6 and (not few or e.module in touched)
    )
    return first, second


def _special(entry: Entry, number: int) -> bool:
    """A third of the layers, and rows of fused modules and rows in another order."""
    return number % 3 == 0 or entry.swapped or (entry.start > 0 and ".0." in entry.name)


@dataclass(frozen=True)
class Outcome:
    """What became of one cell.

    Attributes:
        result: Of the merge's prompt.
        report: The merge's report; empty where it was refused.
        merged: Weights of the merged MODEL that differ from the base.
        saved: The same after loading the saved file with core's loader.
        save_log: Console lines of that loading.
    """

    result: Result
    report: Mapping[str, Any]
    merged: Mapping[str, Tensor]
    saved: Mapping[str, Tensor]
    save_log: str


def run_cell(server: Server, cell: Cell, first: AdapterFile, second: AdapterFile) -> Outcome:
    """Merge the two files with SSR Merge, save the merge, and load it with core's loader."""
    graph = MergeGraph(server)
    entries = [
        graph.pack(
            "SSRLoRA",
            {"lora": file.name, "strength_model": strength, "conditioning": graph.conditioning(cell.family, seed)}
            | convert_options(server),
        )
        for file, strength, seed in ((first, 1.0, 501), (second, OTHER_STRENGTH, 502))
    ]
    merged = graph.join(
        "SSRMerge",
        entries,
        model=graph.checkpoint(cell.family),
        latent=graph.latent(cell.family),
        mode="sum",
        dtype="float32",
    )
    graph.dump(merged, "cell_merged", changed_only=True)
    report = graph.add("DumpReport", lora=merged.out(2))
    saved = graph.save(merged, f"cells/{cell}")
    result = server.run(graph.prompt)
    if result.status != "success":
        return Outcome(result, {}, {}, {}, "")
    name = "cells/" + re.split(r"[\\/]", result.text(saved))[-1]
    mark = len(server.log())
    again = load_with_core(server, cell, name, "cell_saved")
    again.ok()
    return Outcome(
        result,
        json.loads(result.text(report)),
        dumped(server.base, "cell_merged"),
        dumped(server.base, "cell_saved"),
        server.log(mark),
    )


def load_with_core(server: Server, cell: Cell, name: str, prefix: str) -> Result:
    """Apply a file by core's own loader and write what it changed."""
    graph = MergeGraph(server)
    model = graph.core_lora(graph.checkpoint(cell.family), name, 1.0)
    graph.dump(model, prefix, changed_only=True)
    return server.run(graph.prompt)


def convert_options(server: Server) -> dict[str, Any]:
    """Settings of the conversion, where SSR LoRA has them."""
    inputs = server.schemas()["SSRLoRA"]["input"]
    known = {**inputs.get("required", {}), **inputs.get("optional", {})}
    return {name: value for name, value in CONVERT_OPTIONS.items() if name in known}


def unloaded_keys(log: str) -> set[str]:
    """Keys that core's loader said it did not take."""
    return set(re.findall(r"lora key not loaded: ([^\s\x1b]+)", log))


def expected(*scaled: tuple[float, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sum of changes, weight by weight."""
    total: dict[str, Tensor] = {}
    for strength, truth in scaled:
        for name, delta in truth.items():
            total[name] = total[name] + strength * delta if name in total else strength * delta
    return total


def worst_error(seen: Mapping[str, Tensor], base: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> float:
    """Largest error of a changed weight, relative to its change; only the named weights may have changed."""
    touched = {name for name, value in seen.items() if bool((value != base[name]).any())}
    assert touched <= deltas.keys(), f"changed without a reason: {sorted(touched - deltas.keys())[:5]}"
    assert deltas.keys() <= seen.keys(), f"unchanged: {sorted(deltas.keys() - seen.keys())[:5]}"
    errors = [
        float((seen[name].double() - base[name].double() - delta).norm() / delta.norm())
        for name, delta in deltas.items()
    ]
    return max(errors)
