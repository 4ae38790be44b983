"""Every family, in every dialect, with every kind of adapter: the matrix behind docs/compatibility.md.

The cells' statuses and key counts must be those of the committed docs/compatibility.json, so that the table
cannot go stale. With SSR_WRITE_COMPATIBILITY set (`make compatibility`) the table is written instead.
"""

from __future__ import annotations

import os
import re
import runpy
from collections import Counter

import pytest

from .compatibility_table import comparable, read, row, write
from .conftest import CHECKOUT, PACK
from .matrix import (
    CONVERTED,
    MAYBE_REFUSED,
    OTHER_STRENGTH,
    all_cells,
    convert_options,
    expected,
    files,
    load_with_core,
    run_cell,
    unloaded_keys,
    worst_error,
)
from .weights import base_weights

DOCS = PACK / "docs"
WRITE = bool(os.environ.get("SSR_WRITE_COMPATIBILITY"))
CELLS = all_cells()
KNOWN = set(CELLS)
TOLERANCE, CONVERTED_TOLERANCE = 2e-5, 1e-4
UNUSED = ("unmatched", "shadowed", "strength_0")
BREAKS_CORE = ("lumina2", "zimage_names")
"""Core takes k and v of a grouped-query model for rows that do not exist, and fails when the model is loaded."""


@pytest.fixture(scope="module")
def weights(base):
    """The base parameters of the last family asked for: cells come family by family."""
    held = {}

    def of(family):
        if family not in held:
            held.clear()
            held[family] = base_weights(base, family)
        return held[family]

    return of


@pytest.fixture(scope="module")
def table():
    """Rows of the cells that ran; written at the end if asked for, beside those of cells that were not selected."""
    rows = {}
    yield rows
    if WRITE:
        every = {cell: entry for cell, entry in (read(DOCS) | rows).items() if cell in KNOWN}
        assert every.keys() == KNOWN, (
            f"no row yet for {sorted(map(str, KNOWN - every.keys()))[:5]}; nothing was written"
        )
        version = runpy.run_path(str(CHECKOUT / "comfyui_version.py"))["__version__"]
        write(DOCS, version, list(every.values()))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(server, base, weights, table, cell):
    before = weights(cell.family)
    first, second = files(base, before, cell)
    outcome = run_cell(server, cell, first, second)
    if outcome.result.status != "success":
        found = refused(server, cell, first, outcome)
    else:
        found = merged(server, cell, first, second, outcome, before)
    if not WRITE:
        assert comparable(found) == comparable(read(DOCS).get(cell, {})), "docs/compatibility.json is stale"
    table[cell] = found


def test_table_has_exactly_these_cells(server):
    assert WRITE or read(DOCS).keys() == KNOWN, "docs/compatibility.json is stale: run make compatibility"


def refused(server, cell, first, outcome):
    """The error names the file; core takes less than half of it, or the kind is one that is not merged."""
    result = outcome.result
    assert result.status == "error" and first.name in result.error, result.error
    if cell.adapter == "lora":
        mark = len(server.log())
        taken = load_with_core(server, cell, first.name, "cell_core")
        assert taken.status == "success"
        assert len(unloaded_keys(server.log(mark))) > len(first.tensors) / 2
    else:
        assert any(key in result.error for key in first.tensors), result.error
        assert cell.adapter in MAYBE_REFUSED or not convert_options(server), "this kind should have been converted"
    return row(cell, "refused", _gist(result.error), {"refused": len(first.tensors)}, None)


def _gist(error):
    """The cause in an error message, without the names of files, layers and keys."""
    said = re.split(r" File: | \(first unknown| \(ERROR", error.removeprefix("SSR-Merge: "))[0]
    return re.sub(r"^.* cannot be routed; the first is \S+: |^\S+ \(\w+\): ", "", said).strip().rstrip(".")


def merged(server, cell, first, second, outcome, before):
    """Weights, saved file and the account of every key."""
    account = next(entry for entry in outcome.report["files"] if entry["name"] == first.name)
    assert sum(account["fates"].values()) == account["keys"] == len(first.tensors)
    other = next(entry for entry in outcome.report["files"] if entry["name"] == second.name)
    assert sum(other["fates"].values()) == other["keys"] == len(second.tensors)
    unused = {key for key, fate, _ in account["details"] if fate in UNUSED}
    assert len(unused) == sum(account["fates"].get(fate, 0) for fate in UNUSED)
    reasons = Counter(reason for _, fate, reason in account["details"] if fate in UNUSED)
    assert all(reasons), "a key is unused without a reason"
    more = beyond_core(server, cell, first, unused) if cell.adapter == "lora" else 0
    deltas = expected((1.0, first.truth(without=unused)), (OTHER_STRENGTH, second.truth()))
    error = max(worst_error(seen, before, deltas) for seen in (outcome.merged, outcome.saved))
    assert error < (CONVERTED_TOLERANCE if cell.adapter in CONVERTED else TOLERANCE)
    assert not unloaded_keys(outcome.save_log) and "NOT LOADED" not in outcome.save_log
    said = [f"{n} of {account['keys']} keys unused: {reason}" for reason, n in sorted(reasons.items())]
    said += [f"ComfyUI's own LoRA loader leaves out {more} of the keys used here"] if more else []
    return row(cell, "ok", "; ".join(said), account["fates"], error)


def beyond_core(server, cell, first, unused):
    """Number of keys that core's own loader leaves out and the pack reads; there is none the other way round."""
    mark = len(server.log())
    result = load_with_core(server, cell, first.name, "cell_core")
    if (cell.family, cell.dialect) == BREAKS_CORE:
        assert result.status == "error"
        return 0
    left_out = unloaded_keys(server.log(mark))
    assert result.status == "success" and unused <= left_out
    return len(left_out - unused)
