"""Tables, plots and JSON of the quality benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ssr_core.words import number_of

from ..speed.machine import sentence
from .protocols import OWN_DISTANCE
from .records import Record, Row, paired

LOWER = frozenset({"function distance", "leak", OWN_DISTANCE})
"""Metrics where less is better."""


def write_json(rows: Sequence[Row], path: Path) -> None:
    """A list of rows."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def table(rows: Sequence[Row], name: str, metric: str) -> list[str]:
    """Markdown: methods down, K across, the best of each column in bold; the upper bound apart."""
    chosen = [row for row in rows if row.table == name and row.metric == metric]
    ks = sorted({row.k for row in chosen})
    methods = list(dict.fromkeys(row.method for row in chosen))
    values = {(row.method, row.k): row for row in chosen}
    most = max((row.seeds for row in chosen), default=0)
    best = {}
    for k in ks:
        means = [values[m, k].mean for m in methods if (m, k) in values and not m.startswith("single")]
        best[k] = (min if metric in LOWER else max)(means, default=math.nan)
    lines = [f"| {metric} | " + " | ".join(f"K = {k}" for k in ks) + " |", "|---" * (len(ks) + 1) + "|"]
    for method in methods:
        cells = []
        for k in ks:
            row = values.get((method, k))
            text = "" if row is None else _cell(row, most)
            top = row is not None and round(row.mean, 3) == round(best[k], 3) and not method.startswith("single")
            cells.append(f"**{text}**" if top else text)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _cell(row: Row, most: int) -> str:
    """Mean and deviation; how many runs where other rows have more."""
    spread = f"{row.mean:.3f} ± {row.std:.3f}" if row.seeds > 1 else f"{row.mean:.3f}"
    return spread if row.seeds == most else f"{spread} (runs: {row.seeds})"


TOP = 1.5
"""Largest value that a plot shows: sums of many LoRAs would flatten all the rest."""


def plot(rows: Sequence[Row], name: str, metric: str, path: Path) -> None:
    """Curves over K with deviations as bands; nothing if none of it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [row for row in rows if row.table == name and row.metric == metric and "neutral" not in row.method]
    if not chosen:
        return
    figure, axes = pyplot.subplots(figsize=(8, 4.4), dpi=110)
    markers, colours = "osd^vP*Xh<>p", pyplot.get_cmap("tab20").colors
    for number, method in enumerate(dict.fromkeys(row.method for row in chosen)):
        line = sorted((row for row in chosen if row.method == method), key=lambda row: row.k)
        ours = method == "SSR (ours)"
        axes.errorbar(
            [row.k for row in line],
            [row.mean for row in line],
            [row.std for row in line],
            label=method,
            marker=markers[number % len(markers)],
            markersize=5,
            linewidth=2.6 if ours else 1.2,
            capsize=2,
            color="black" if ours else colours[number % len(colours)],
            zorder=3 if ours else 2,
        )
    if max(row.mean for row in chosen) > TOP:
        axes.set_ylim(0, TOP)
        axes.set_title(f"means above {TOP:g} are in the table", fontsize=8)
    axes.set_xlabel("LoRAs merged")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


TABLES = {
    "the base model": ("success",),
    "single LoRAs": ("success",),
    "preservation": ("function distance", "success", "similarity"),
    "preservation: generic prompts": ("leak", "success"),
    "composition": ("objects right", "all right", "objects right, other order", OWN_DISTANCE),
    "subject and style": ("both", "content", "style", OWN_DISTANCE),
    "two subjects and a style": ("both", "content", "style", OWN_DISTANCE),
    "OSRM start": ("function distance", "success"),
    "many subjects": ("function distance", "success", "similarity"),
    "many subjects: generic prompts": ("leak", "success"),
    "ablation: other methods' settings": ("function distance", "success"),
    "ablation: other methods' settings: generic prompts": ("leak", "success"),
    "ablation: solve": ("function distance", "success"),
    "ablation: solve: generic prompts": ("leak", "success"),
    "ablation: calibration data": ("function distance", "success", "similarity"),
    "ablation: calibration data: generic prompts": ("leak", "success"),
    "ablation: neutral prompts": ("function distance", "success"),
    "ablation: neutral prompts: generic prompts": ("leak", "success"),
    "calibration prompts": ("function distance", "success"),
    "calibration prompts: generic prompts": ("leak",),
}


def page(rows: Sequence[Row], records: Sequence[Record], machine: dict[str, Any], processes: int) -> str:
    """The whole page."""
    lines = ["# Quality: a world of drawings", ""]
    for part in ("world.md", "findings.md"):
        lines += [Path(__file__).with_name(part).read_text(encoding="utf-8").strip(), ""]
    for name, metrics in TABLES.items():
        if not any(row.table == name for row in rows):
            lines += [f"## {name[0].upper()}{name[1:]}", "", "Not measured in this run.", ""]
            continue
        lines += [f"## {name[0].upper()}{name[1:]}", ""]
        if name == "preservation":
            lines += ["![function distance](quality_function.png)", "", "![success](quality_success.png)", ""]
        for metric in metrics:
            lines += table(rows, name, metric)
    lines += _versus(records)
    several = number_of(processes, "process", "processes")
    lines += [f"`make bench-quality` wrote this page, {several} at a time; {sentence(machine)}", ""]
    return "\n".join(lines)


def _versus(records: Sequence[Record]) -> list[str]:
    """Paired differences to ours."""
    ours = "SSR (ours)"
    others = dict.fromkeys(
        r.method for r in records if r.table == "preservation" and r.method not in (ours, "single LoRA")
    )
    lines = [
        "## Paired differences to ours",
        "",
        "Preservation, over all K and seeds: function distance minus ours; positive means that ours is nearer.",
        "",
        "| method | mean | deviation | ours nearer |",
        "|---|---|---|---|",
    ]
    for other in others:
        found = paired(records, "preservation", "function distance", other, ours)
        if len(found) > 1:
            wins = sum(value > 0 for value in found)
            lines.append(f"| {other} | {fmean(found):+.3f} | {stdev(found):.3f} | {wins} of {len(found)} |")
    return [*lines, ""]
