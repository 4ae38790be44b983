"""The demo's picture: crosstalk before and after, reconstruction error, error by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from ssr_core import MergeReport

matplotlib.use("Agg")

import matplotlib.pyplot as plt

_COLOURS = {"ssr": "#0072B2", "sum": "#D55E00", "average": "#E69F00"}
_ARROW = {"arrowstyle": "-", "color": "grey"}
_NAMES = {"ssr": "SSR", "sum": "plain sum", "average": "average"}


def draw_report(report: MergeReport, errors: Mapping[str, float], path: Path) -> None:
    """Draw one PNG."""
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.4), width_ratios=(1, 1, 0.9, 1.5), layout="constrained")
    names = [f"LoRA {i + 1}" for i in range(len(report.tasks))]
    for axis, router, title in ((axes[0], "sum", "plain sum"), (axes[1], "result", "SSR")):
        _heatmap(axis, report.crosstalk(router), names, f"Crosstalk, {title}")
    bars = axes[2].bar([_NAMES[n] for n in errors], list(errors.values()), color=[_COLOURS[n] for n in errors])
    axes[2].bar_label(bars, fmt="%.2f")
    axes[2].set_title("Error on unseen noise")
    axes[2].margins(y=0.15)
    axes[2].set_ylabel("relative error (0 is best)")
    layers = sorted((layer for layer in report.layers if layer.errors), key=lambda layer: layer.errors["result"])
    for router, label, key in (
        ("result", "SSR", "ssr"),
        ("sum", "plain sum", "sum"),
        ("average", "average", "average"),
    ):
        axes[3].plot([layer.errors[router] for layer in layers], label=label, color=_COLOURS[key], marker=".")
    axes[3].set_title("Error by layer, calibration tokens")
    axes[3].set_xlabel("layers, from SSR's best to its worst")
    axes[3].set_ylim(0, 1.3 * max(layer.errors["sum"] for layer in layers))
    axes[3].legend(ncols=3, loc="upper center")
    worst = layers[-1]
    place = (len(layers) - 1, worst.errors["result"])
    axes[3].annotate(str(worst.target), place, (0.98, 0.06), textcoords="axes fraction", ha="right", arrowprops=_ARROW)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _heatmap(axis: Any, matrix: list[list[float]], names: list[str], title: str) -> None:
    axis.imshow(matrix, vmin=0, vmax=1, cmap="cividis")
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.5 else "white")
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), [f"prompt {i + 1}" for i in range(len(names))])
    axis.set_title(title)
    axis.set_xlabel("energy of each LoRA's branch\n(row maximum 1; ideal: only the diagonal)")
