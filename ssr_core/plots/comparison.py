"""Methods side by side: a bar each."""

from __future__ import annotations

import math

from PIL import Image

from ..compare import Comparison
from .canvas import HEIGHT, WIDTH, Canvas
from .theme import Theme

_TOP, _MOST = 132, 1.5


def draw_comparison(comparison: Comparison, theme: Theme, chosen: int) -> Image.Image:
    """One line for each method: the error that methods are ranked by, with a notch at that on calibration's tokens."""
    canvas = Canvas(theme, WIDTH, HEIGHT)
    told = "bar: held-out tokens, notch: calibration's own" if comparison.held else "on calibration's tokens"
    canvas.title("Methods compared", f"Reconstruction error, 0: as if alone, 1: as if the LoRA were off; {told}")
    scores = [comparison.score(index) for index in range(len(comparison.rows))]
    count = len(comparison.rows)
    tall = min(64.0, (HEIGHT - _TOP - 40) / count)
    size = min(23.0, tall * 0.55)
    room = min(300.0, max(canvas.width_of(row.label, size) for row in comparison.rows) + 62)
    finite = [score for score in scores if math.isfinite(score)]
    best = comparison.best if finite else -1
    left, right = 24 + room, WIDTH - 96 - canvas.width_of(" best", size)
    most = min(_MOST, max([0.2, *finite]) * 1.05)
    for value in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5):
        if value <= most:
            x = left + value / most * (right - left)
            canvas.line((x, _TOP - 8, x, _TOP + count * tall), theme.grid)
            canvas.text(x, _TOP - 22, f"{value:g}", 18, theme.faint, "mm")
    for index, row in enumerate(comparison.rows):
        y = _TOP + (index + 0.5) * tall
        if index == chosen:
            canvas.rectangle((16, y - tall / 2 + 1, WIDTH - 16, y + tall / 2 - 1), theme.panel, radius=8)
            canvas.rectangle((16, y - tall / 2 + 1, WIDTH - 16, y + tall / 2 - 1), theme.faint, radius=8, outline=True)
        canvas.text(30, y, str(index + 1), size, theme.faint)
        canvas.text(62, y, canvas.fitted(row.label, size, room - 50), size)
        if row.refused:
            canvas.text(left + 6, y, "not applicable, see the table", size * 0.8, theme.faint)
            continue
        if not math.isfinite(scores[index]):
            canvas.text(left + 6, y, "not measured", size * 0.75, theme.faint)
            continue
        end = left + min(scores[index], most) / most * (right - left)
        colour = theme.routers["result"] if index == chosen else theme.faint
        canvas.rectangle((left, y - tall * 0.3, end, y + tall * 0.3), colour, radius=3)
        if scores[index] > most:
            canvas.cut_across((end - 14, y - tall * 0.3, end - 14, y + tall * 0.3))
        if comparison.held and row.error < most:
            x = left + row.error / most * (right - left)
            canvas.line((x, y - tall * 0.3, x, y + tall * 0.3), theme.paper, 3)
        canvas.text(min(end, right) + 10, y, f"{scores[index]:.3f}" + (" best" if index == best else ""), size)
    canvas.text(30, HEIGHT - 22, f"best: smallest {comparison.ranked_by}; framed: the merge in use", 17, theme.faint)
    return canvas.picture()
