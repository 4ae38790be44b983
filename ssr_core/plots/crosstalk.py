"""Crosstalk before and after: whose branch speaks under whose prompt."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ..report import MergeReport
from .canvas import HEIGHT, WIDTH, Canvas, short_name
from .theme import Theme, heat, ink_on

_SIDE = 330
_TOP = 158


def draw_crosstalk(report: MergeReport, theme: Theme) -> Image.Image:
    """Two heatmaps side by side, plain sum and this merge, rows divided by their maximum."""
    canvas = Canvas(theme, WIDTH, HEIGHT)
    told = "Energy of each LoRA's branch (column) under each LoRA's prompt (row). Ideal: only the diagonal."
    canvas.title("Crosstalk", told)
    names = [short_name(name) for name in report.tasks]
    for left, router, title in ((62, "sum", "plain sum"), (444, "result", report.subject)):
        canvas.text(left + _SIDE / 2, 108, title, 24, anchor="mm")
        _heatmap(canvas, left, report.crosstalk(router))
    legend(canvas, names, _TOP + _SIDE + 30)
    return canvas.picture()


def _heatmap(canvas: Canvas, left: float, matrix: Sequence[Sequence[float]]) -> None:
    count = len(matrix)
    cell = _SIDE / count
    gap = 3 if count < 6 else 1.5
    # two decimals where they can be read at half the size, else per cent
    size = min(34.0, cell * 0.36) if count < 6 else min(26.0, cell * 0.5)
    for i, row in enumerate(matrix):
        middle = (i + 0.5) * cell
        canvas.text(left - 10, _TOP + middle, str(i + 1), 21, canvas.theme.faint, "rm")
        canvas.text(left + middle, _TOP - 18, str(i + 1), 21, canvas.theme.faint, "mm")
        for j, value in enumerate(row):
            x, y = left + j * cell, _TOP + i * cell
            canvas.rectangle((x + gap, y + gap, x + cell - gap, y + cell - gap), heat(value), radius=min(6, cell / 8))
            words = f"{value:.2f}" if count < 6 else f"{100 * value:.0f}"
            canvas.text(x + cell / 2, y + cell / 2, words, size, ink_on(heat(value)), "mm")


def legend_lines(count: int) -> int:
    """Lines of a legend of so many names."""
    return -(-count // (1 if count <= 3 else 2 if count <= 6 else 3 if count <= 12 else 5))


def legend(canvas: Canvas, names: Sequence[str], top: float) -> None:
    """Numbers and what they stand for, in as many columns as the page needs."""
    lines = legend_lines(len(names))
    columns = -(-len(names) // lines)
    step = min(26.0, (canvas.height - 16 - top) / lines)
    room = (canvas.width - 60) / columns
    size = min(20.0, step * 0.76)
    for index, name in enumerate(names):
        x, y = 30 + (index // lines) * room, top + (index % lines) * step
        canvas.text(x, y, str(index + 1), size, canvas.theme.faint)
        offset = canvas.width_of("00 ", size)
        canvas.text(x + offset, y, canvas.fitted(name, size, room - offset - 16), size)
