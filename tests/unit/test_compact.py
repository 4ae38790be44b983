"""The report that travels to the browser: nothing changed but digits, and never longer than allowed."""

import json
import math

import pytest

from ssr_core import FileAccount, LayerReport, MergeReport, Target, compact_report


def layer(index, k, error):
    matrix = [[1 / 3 + i + j for j in range(k)] for i in range(k)]
    return LayerReport(
        Target(f"double_blocks.{index}.img_attn.qkv"),
        "routed",
        tuple(range(k)),
        16 * k,
        tuple(100.0 + i for i in range(k)),
        condition=math.inf if index == 0 else 12345.678,
        errors={"result": error, "sum": 1 / 3, "average": 0.5, "gains": 0.25},
        crosstalk={"sum": matrix, "result": matrix},
    )


def report(layers, k=2, details=0):
    names = tuple(f"lora{i}" for i in range(k))
    account = FileAccount(
        "lora0", 5 + details, {"routed": 5}, tuple((f"k{i}", "refused", "why") for i in range(details))
    )
    errors = [((i * 7919) % layers) / max(layers, 1) for i in range(layers)]
    return MergeReport(
        "ssr", names, tuple(layer(i, k, e) for i, e in enumerate(errors)), (account,), ("mind",), ("by",)
    )


def rows_of(compact):
    table = compact["layers"]
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def close(small, full):
    """The same JSON up to four significant digits."""
    if isinstance(full, dict):
        return small.keys() == full.keys() and all(close(small[k], full[k]) for k in full)
    if isinstance(full, list | tuple):
        return len(small) == len(full) and all(close(a, b) for a, b in zip(small, full, strict=True))
    if isinstance(full, float):
        return abs(small - full) <= 5.1e-4 * abs(full)
    return small == full


def test_a_small_report_says_what_the_long_one_says():
    one = report(40)
    full, compact = one.to_json(), compact_report(one)
    assert compact["omitted"] == {}
    assert close(rows_of(compact), json.loads(json.dumps(full["layers"])))
    for name in full.keys() - {"layers", "files"}:
        assert close(compact[name], full[name]), name
    assert compact["layers"]["total"] == 40


def test_numbers_that_json_does_not_know_are_null():
    text = json.dumps(compact_report(report(3)), allow_nan=False)
    assert rows_of(json.loads(text))[0]["condition"] is None


def test_details_of_files_are_counted():
    account = compact_report(report(1, details=30))["files"][0]
    assert len(account["details"]) == 20 and account["details_total"] == 30


@pytest.mark.parametrize("layers, k, limit", [(3000, 3, 400_000), (500, 20, 400_000), (300, 2, 20_000), (50, 2, 400)])
def test_the_limit_holds_and_the_worst_layers_stay(layers, k, limit):
    one = report(layers, k)
    compact = compact_report(one, limit)
    assert len(json.dumps(compact)) <= limit + 600  # the table's and omitted's own names
    kept = rows_of(compact)
    assert len(kept) + compact["omitted"].get("layers", 0) == layers == compact["layers"]["total"]
    assert compact["omitted"]["layer_columns"][-1] == "crosstalk"
    errors = sorted((entry.errors["result"] for entry in one.layers), reverse=True)
    if kept:
        assert "crosstalk" not in kept[0]
        lowest = min(row["errors"]["result"] for row in kept)
        assert lowest >= errors[len(kept) - 1] - 1e-3


def test_kept_layers_stay_in_their_order():
    names = [row["target"] for row in rows_of(compact_report(report(300), 20_000))]
    assert names and names == sorted(names, key=lambda name: int(name.split(".")[1]))
