"""Reconstruction error of each LoRA and of all, by router."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from ..report import ROUTERS, MergeReport
from .canvas import HEIGHT, WIDTH, Canvas, short_name
from .crosstalk import legend, legend_lines
from .theme import Theme

NAMES = {"sum": "plain sum", "average": "average", "gains": "best gains"}
_LEFT, _RIGHT, _TOP = 74, 20, 146


@dataclass(frozen=True)
class Axis:
    """A vertical axis from 0.

    Attributes:
        most: Value at its top.
        top: Pixel of that.
        bottom: Pixel of 0.
    """

    most: float
    top: float
    bottom: float

    def at(self, value: float) -> float:
        """Pixel of a value."""
        return self.bottom - min(value, self.most) / self.most * (self.bottom - self.top)

    def draw(self, canvas: Canvas, left: float, right: float) -> None:
        """Grid lines with numbers, and a dashed one at 1."""
        step = next(s for s in (0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0, 1e9) if self.most / s <= 5)
        ticks = [n * step for n in range(int(self.most / step + 1e-9) + 1)]
        for value in ticks:
            y = self.at(value)
            canvas.line((left, y, right, y), canvas.theme.grid)
            canvas.text(left - 10, y, f"{value:.2f}".rstrip("0").rstrip("."), 19, canvas.theme.faint, "rm")
        if self.most >= 1:
            canvas.line((left, self.at(1), right, self.at(1)), canvas.theme.faint, 1.5, dashed=True)


def axis_for(values: Sequence[float], top: float, bottom: float) -> Axis:
    """An axis that holds all values, at most up to 3: worse is not told apart."""
    finite = [value for value in values if math.isfinite(value)]
    return Axis(min(3.0, max(0.1, 1.12 * max(finite, default=1.0))), top, bottom)


def draw_errors(report: MergeReport, theme: Theme) -> Image.Image:
    """A group of bars for all LoRAs and for each: solid up to the held-out error, a notch at calibration's own."""
    canvas = Canvas(theme, WIDTH, HEIGHT)
    held = not math.isnan(report.reconstruction_error(held_out=True))
    told = "bar: held-out tokens, notch: calibration's own" if held else "on calibration's own tokens"
    canvas.title("Reconstruction error", f"0: as if alone, 1: as if the LoRA were off; {told}")
    _router_legend(canvas, {"result": report.subject, **NAMES})
    tasks: list[int | None] = [None, *range(len(report.tasks))]
    if len(report.tasks) == 1:
        tasks = [None]
    bars = {(g, r): report.reconstruction_error(r, held_out=held, task=t) for g, t in enumerate(tasks) for r in ROUTERS}
    bottom = HEIGHT - 66 - 26 * min(legend_lines(len(report.tasks)), 4)
    axis = axis_for(list(bars.values()), _TOP, bottom)
    axis.draw(canvas, _LEFT, WIDTH - _RIGHT)
    width = (WIDTH - _LEFT - _RIGHT) / len(tasks)
    bar = width * 0.84 / len(ROUTERS)
    places = {(g, r): _LEFT + (g + 0.08) * width + i * bar for g in range(len(tasks)) for i, r in enumerate(ROUTERS)}
    for (group, router), x in places.items():
        notch = report.reconstruction_error(router, task=tasks[group]) if held else math.nan
        _bar(canvas, axis, (x, bar), bars[(group, router)], notch, router)
    for (group, router), x in places.items():
        if router == "result" or bar > 34:
            _value(canvas, axis, (x, bar), bars[(group, router)])
    for group, task in enumerate(tasks):
        middle = _LEFT + (group + 0.5) * width
        canvas.text(middle, bottom + 18, "all" if task is None else str(task + 1), 21, anchor="mm")
    legend(canvas, [short_name(name) for name in report.tasks], bottom + 52)
    return canvas.picture()


def _bar(canvas: Canvas, axis: Axis, place: tuple[float, float], value: float, notch: float, router: str) -> None:
    if math.isnan(value):
        return
    x, width = place
    inner = (x + width * 0.06, x + width * 0.94)
    canvas.rectangle((inner[0], axis.at(value), inner[1], axis.bottom), canvas.theme.routers[router], radius=2)
    if value > axis.most:
        canvas.cut_across((inner[0], axis.top + 9, inner[1], axis.top + 9))
    if math.isfinite(notch) and axis.bottom - axis.at(notch) > 3:
        canvas.line((inner[0], axis.at(notch), inner[1], axis.at(notch)), canvas.theme.paper, 3)


def _value(canvas: Canvas, axis: Axis, place: tuple[float, float], value: float) -> None:
    if math.isfinite(value):
        x, width = place
        size = min(20.0, max(13.0, width * 0.44))
        canvas.text(x + width / 2, max(axis.at(value), axis.top) - 11, f"{value:.2f}", size, anchor="mm")


def _router_legend(canvas: Canvas, names: Mapping[str, str]) -> None:
    x = 30.0
    for router in ROUTERS:
        canvas.rectangle((x, 100, x + 18, 118), canvas.theme.routers[router], radius=3)
        canvas.text(x + 26, 110, names[router], 20)
        x += 26 + canvas.width_of(names[router], 20) + 28
