"""The map of the model: blocks across, kinds of layer down."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from PIL import Image

from ..layout import natural
from ..modelmap import MapCell, model_map, root_mean_square
from ..report import MergeReport
from .canvas import HEIGHT, WIDTH, Canvas
from .theme import Theme, heat, ink_on

Measure = Literal["interference", "error"]
OTHER = "other"
"""Row and column of layers that are in no block."""

_BELOW = "Error of {} on calibration's own tokens, by block and kind of layer; 0: {}"
_TOP, _BOTTOM, _MOST = 104, 122, 1.5


@dataclass
class _Grid:
    """Cells by (row, column), and the columns in groups of one list of blocks each."""

    cells: dict[tuple[str, str], list[MapCell]]
    rows: list[str]
    groups: list[tuple[str, list[str]]]


def draw_map(report: MergeReport, theme: Theme, measure: Measure = "error") -> Image.Image:
    """One colour a cell: yellow where much is wrong, dark blue where nothing is, grey where one LoRA is alone."""
    canvas = Canvas(theme, WIDTH, HEIGHT)
    canvas.title(*_titles(report, measure))
    grid = _grid(model_map(report.layers))
    labels = min(24.0, (HEIGHT - _TOP - _BOTTOM) / max(1, len(grid.rows)) * 0.8)
    label_room = min(230.0, max((canvas.width_of(row, min(labels, 18)) for row in grid.rows), default=0) + 18)
    left, gap = 24 + label_room, 10.0
    columns = sum(len(blocks) for _, blocks in grid.groups)
    wide = min(120.0, (WIDTH - left - 20 - gap * (len(grid.groups) - 1)) / max(1, columns))
    tall = min(44.0, (HEIGHT - _TOP - _BOTTOM) / max(1, len(grid.rows)))
    for index, row in enumerate(grid.rows):
        size = min(labels, 18, tall * 0.8)
        name = canvas.fitted(row, size, label_room - 12)
        canvas.text(left - 10, _TOP + (index + 0.5) * tall, name, size, canvas.theme.faint, "rm")
    x = left
    below = _TOP + len(grid.rows) * tall
    for name, blocks in grid.groups:
        for column, block in enumerate(blocks):
            for index, row in enumerate(grid.rows):
                box = (x + column * wide, _TOP + index * tall, x + (column + 1) * wide, _TOP + (index + 1) * tall)
                _cell(canvas, box, grid.cells.get((row, block), []), measure)
        _column_names(canvas, x, below, wide, name, blocks)
        x += len(blocks) * wide + gap
    _scale(canvas)
    return canvas.picture()


def _titles(report: MergeReport, measure: Measure) -> tuple[str, str]:
    """The heading and the line under it."""
    if measure == "interference":
        return "Where the LoRAs interfere", _BELOW.format("the plain sum", "do not meet")
    heading = "What mode ssr would leave (forecast)" if report.forecast else "What is left after this merge"
    return heading, _BELOW.format("mode ssr" if report.forecast else "this merge", "each as if alone")


def _grid(found: Sequence[MapCell]) -> _Grid:
    cells: dict[tuple[str, str], list[MapCell]] = defaultdict(list)
    kinds: dict[str, None] = {}
    groups: dict[str, dict[str, None]] = {}
    for cell in found:
        row, block = (cell.place.kind, cell.place.block) if cell.place.block else (OTHER, OTHER)
        cells[(row, block)].append(cell)
        kinds[row] = None
        groups.setdefault(block.rsplit(".", 1)[0], {})[block] = None
    # what stands in the same lists of blocks stays together
    order = {name: index for index, name in enumerate(groups)}
    home = {row: min(order[block.rsplit(".", 1)[0]] for r, block in cells if r == row) for row in kinds}
    rows = sorted(kinds, key=lambda row: (row == OTHER, home[row], natural(row)))
    start = _common_start([cell.place.block for cell in found if cell.place.block and cell.place.part == "model"])
    listed = [(name.removeprefix(start), list(blocks)) for name, blocks in groups.items()]
    return _Grid(cells, rows, sorted(listed, key=lambda group: group[0] == OTHER))


def _common_start(blocks: Sequence[str]) -> str:
    """What all lists of blocks begin with, such as `diffusion_model.`; each keeps a word of its own."""
    lists = [block.split(".")[:-2] for block in blocks]
    same = [words[0] for words in takewhile(lambda words: len(set(words)) == 1, zip(*lists, strict=False))]
    return "".join(f"{word}." for word in same)


def _cell(canvas: Canvas, box: tuple[float, float, float, float], cells: Sequence[MapCell], measure: Measure) -> None:
    if not cells:
        return
    x0, y0, x1, y1 = box
    inset = 1.0 if x1 - x0 > 8 else 0.5
    value = root_mean_square([v for v in (getattr(c, measure) for c in cells) if math.isfinite(v)])
    colour = heat(value / _MOST) if math.isfinite(value) else canvas.theme.grid
    canvas.rectangle((x0 + inset, y0 + inset, x1 - inset, y1 - inset), colour, radius=min(3, (x1 - x0) / 6))
    if min((x1 - x0) * 0.5, y1 - y0) >= 20 and math.isfinite(value):
        size = min(20.0, (y1 - y0) * 0.6, (x1 - x0) * 0.3)
        canvas.text((x0 + x1) / 2, (y0 + y1) / 2, f"{value:.2f}", size, ink_on(colour), "mm")
    if any(cell.statuses.get("anchored") for cell in cells):
        canvas.dot(x1 - 0.2 * (x1 - x0), (y0 + y1) / 2, min(x1 - x0, y1 - y0) * 0.18, canvas.theme.ink)


def _column_names(canvas: Canvas, x: float, y: float, wide: float, name: str, blocks: Sequence[str]) -> None:
    every = max(1, math.ceil(24 / wide))
    if name == OTHER:  # its row says so
        return
    for column, block in enumerate(blocks):
        if column % every == 0:
            canvas.text(x + (column + 0.5) * wide, y + 14, block.rsplit(".", 1)[-1], 16, canvas.theme.faint, "mm")
    room = len(blocks) * wide
    words = canvas.fitted(name, 17, max(room, 40))
    canvas.text(x + room / 2, y + 34, words, 17, canvas.theme.faint, "mm")


def _scale(canvas: Canvas) -> None:
    left, top, width = 30.0, HEIGHT - 34, 220.0
    for step in range(int(width)):
        canvas.rectangle((left + step, top, left + step + 1, top + 16), heat(step / width))
    for value in (0.0, 0.5, 1.0, _MOST):
        end = "+" if value == _MOST else ""
        canvas.text(left + value / _MOST * width, top - 11, f"{value:g}{end}", 16, canvas.theme.faint, "mm")
    canvas.rectangle((290, top, 306, top + 16), canvas.theme.grid, radius=2)
    canvas.text(314, top + 8, "one LoRA only: unchanged", 17, canvas.theme.faint)
    canvas.dot(562, top + 8, 5, canvas.theme.ink)
    canvas.text(574, top + 8, "never ran: anchor", 17, canvas.theme.faint)
