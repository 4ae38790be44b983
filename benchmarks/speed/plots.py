"""Three small plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]


def draw(found: dict[str, Any], out: Path, stem: str) -> None:
    """Write <stem>_calibration.png, <stem>_solve.png and <stem>_published.png."""
    _calibration(found["calibration_over_forward"], out / f"{stem}_calibration.png")
    _solve(found["solve_over_sequential"], found["solve_exponents"], out / f"{stem}_solve.png")
    _published(found["merge_time_over_published"], out / f"{stem}_published.png")


def _calibration(rows: list[Row], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 4))
    for d in sorted({row["d"] for row in rows}):
        mine = [row for row in rows if row["d"] == d]
        axes.plot(
            [row["predicted"] - 1 for row in mine],
            [max(row["median"] - 1, 1e-3) for row in mine],
            "o",
            label=f"d = {d}",
        )
    ends = [min(row["predicted"] - 1 for row in rows), max(row["predicted"] - 1 for row in rows)]
    axes.plot(ends, ends, "k-", lw=0.8, label="arithmetic alone")
    axes.plot(ends, [2 * end for end in ends], "k:", lw=0.8, label="twice that")
    axes.set(xscale="log", yscale="log", xlabel="predicted overhead of calibration", ylabel="measured overhead")
    _finish(figure, axes, path)


def _solve(rows: list[Row], exponents: list[Row], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 4))
    d = max(row["d"] for row in rows)
    mine = [row for row in rows if row["d"] == d]
    slopes = {row["of"]: row["exponent_of_R"] for row in exponents if row["d"] == d}
    for name, colour, title in (("engine", "C0", "engine"), ("sequential", "C1", "sequential general solver")):
        for count, mark in zip(sorted({row["K"] for row in mine}), "osv", strict=False):
            kept = [row for row in mine if row["K"] == count]
            axes.plot(
                [count * row["r"] for row in kept],
                [1e3 / row[f"{name}_layers_per_second"] for row in kept],
                mark + "-",
                color=colour,
                ms=4,
                lw=0.8,
                label=f"{title}, K = {count} (R^{slopes[name]})" if count == mine[0]["K"] else f"K = {count}",
            )
    axes.set(xscale="log", yscale="log", xlabel="R = K r", ylabel=f"ms a layer, solve and absorb, d = {d}")
    _finish(figure, axes, path)


def _published(rows: list[Row], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    names = [f"{row['d']}, {row['tokens']}\nK {row['K']}, r {row['r']}" for row in rows]
    axes.bar(names, [row["median"] for row in rows], yerr=_errors(rows), color="C0", capsize=2)
    axes.axhline(1 / 3, color="k", ls=":", lw=0.8, label="a third")
    axes.set(ylabel="merge overhead / published algorithm's")
    axes.tick_params(axis="x", labelsize=6, rotation=60)
    _finish(figure, axes, path)


def _errors(rows: list[Row]) -> list[list[float]]:
    return [[row["median"] - row["low"] for row in rows], [row["high"] - row["median"] for row in rows]]


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
