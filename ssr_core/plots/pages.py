"""All pictures of one report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from ..report import MergeReport
from .canvas import Canvas
from .crosstalk import draw_crosstalk
from .errors import draw_errors
from .maps import draw_map
from .theme import Theme


def report_pages(report: MergeReport, theme: Theme) -> list[Image.Image]:
    """Crosstalk, errors, map before, map after; what a report has no numbers for is left out.

    Pages are of one size. A report without statistics gets one page that says so.
    """
    pages = []
    if not math.isnan(report.reconstruction_error()):
        if any(len(layer.tasks) == len(report.tasks) > 1 and layer.crosstalk for layer in report.layers):
            pages.append(draw_crosstalk(report, theme))
        pages.append(draw_errors(report, theme))
        pages += [draw_map(report, theme, "interference"), draw_map(report, theme, "error")]
    return pages or [_nothing(theme)]


def _nothing(theme: Theme) -> Image.Image:
    canvas = Canvas(theme)
    canvas.title("Nothing was measured", "This merge has no calibration, or no two LoRAs share a layer.")
    canvas.text(30, 130, "Connect a CALIBRATION, or merge with SSR Merge.", 22)
    return canvas.picture()


def side_by_side(pages: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Pages of one size as one picture."""
    width, height = pages[0].size
    columns = min(columns, len(pages))
    rows = -(-len(pages) // columns)
    whole = Image.new("RGB", (width * columns, height * rows), pages[0].getpixel((0, 0)))
    for index, page in enumerate(pages):
        whole.paste(page, (index % columns * width, index // columns * height))
    return whole
