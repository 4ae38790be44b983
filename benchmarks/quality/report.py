"""Tables, plots and JSON of the quality benchmark."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .records import Row

LOWER = frozenset({"function distance", "leak"})
"""Metrics where less is better."""


def write_json(rows: Sequence[Row], path: Path) -> None:
    """A list of rows."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def machine() -> str:
    """The machine in a few words."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = f"{found[0]}, {len(found)} cores" if found else name
    return f"{name}, torch {torch.__version__}"


def table(rows: Sequence[Row], name: str, metric: str) -> list[str]:
    """Markdown: methods down, K across, the best of each column in bold; the upper bound apart."""
    chosen = [row for row in rows if row.table == name and row.metric == metric]
    ks = sorted({row.k for row in chosen})
    methods = list(dict.fromkeys(row.method for row in chosen))
    values = {(row.method, row.k): row for row in chosen}
    best = {}
    for k in ks:
        means = [values[m, k].mean for m in methods if (m, k) in values and not m.startswith("single")]
        best[k] = (min if metric in LOWER else max)(means)
    lines = [f"| {metric} | " + " | ".join(f"K = {k}" for k in ks) + " |", "|---" * (len(ks) + 1) + "|"]
    for method in methods:
        cells = []
        for k in ks:
            row = values.get((method, k))
            text = "" if row is None else f"{row.mean:.3f} ± {row.std:.3f}"
            top = row is not None and round(row.mean, 3) == round(best[k], 3) and not method.startswith("single")
            cells.append(f"**{text}**" if top else text)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def plot(rows: Sequence[Row], name: str, metric: str, path: Path) -> None:
    """Curves over K with deviations as bands."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [row for row in rows if row.table == name and row.metric == metric]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=110)
    markers = "osd^vP*Xh<>p"
    for number, method in enumerate(dict.fromkeys(row.method for row in chosen)):
        line = sorted((row for row in chosen if row.method == method), key=lambda row: row.k)
        ours = method.startswith("SSR")
        axes.errorbar(
            [row.k for row in line],
            [row.mean for row in line],
            [row.std for row in line],
            label=method,
            marker=markers[number % len(markers)],
            linewidth=2.4 if ours else 1.2,
            capsize=2,
            color=f"C{number}" if number < 10 else "black",
        )
    axes.set_xlabel("LoRAs merged")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
