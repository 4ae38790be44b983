"""A page to draw on: twice the size while drawing, so that edges come out smooth."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from .theme import Colour, Theme

WIDTH, HEIGHT = 800, 600
"""Of every page, in pixels; a batch of them has one size."""

_SCALE = 2
_MISSING = "\uffff"
"""A character that no font has: its picture is that of every missing one."""

Anchor = Literal["lm", "mm", "rm", "la", "ma", "ra"]
Box = tuple[float, float, float, float]


class Canvas:
    """One page; lengths are pixels of the finished picture.

    Args:
        theme: Its colours.
        width: Of the finished picture.
        height: Of the finished picture.
    """

    def __init__(self, theme: Theme, width: int = WIDTH, height: int = HEIGHT) -> None:
        self.theme, self.width, self.height = theme, width, height
        self._image = Image.new("RGB", (width * _SCALE, height * _SCALE), theme.paper)
        self._draw = ImageDraw.Draw(self._image)
        self._fonts: dict[int, ImageFont.FreeTypeFont] = {}

    def picture(self) -> Image.Image:
        """The finished page."""
        return self._image.resize((self.width, self.height), Image.Resampling.LANCZOS)

    def rectangle(self, box: Box, colour: Colour, *, radius: float = 0, outline: bool = False) -> None:
        """A filled rectangle, or its border."""
        scaled = [value * _SCALE for value in box]
        fill = None if outline else colour
        self._draw.rounded_rectangle(
            scaled, radius * _SCALE, fill=fill, outline=colour if outline else None, width=_SCALE * 2
        )

    def line(self, box: Box, colour: Colour, width: float = 1, *, dashed: bool = False) -> None:
        """A straight line from one point to the other."""
        x0, y0, x1, y1 = (value * _SCALE for value in box)
        pieces = 1 if not dashed else max(1, round(max(abs(x1 - x0), abs(y1 - y0)) / (12 * _SCALE)))
        for piece in range(pieces):
            start, end = piece / pieces, (piece + (0.55 if dashed else 1)) / pieces
            ends = [x0 + (x1 - x0) * start, y0 + (y1 - y0) * start, x0 + (x1 - x0) * end, y0 + (y1 - y0) * end]
            self._draw.line(ends, colour, round(width * _SCALE))

    def cut_across(self, box: Box) -> None:
        """A break of two slanting lines across a bar that is longer than its axis; the box is the line between them."""
        x0, y0, x1, y1 = box
        upright = abs(x1 - x0) < abs(y1 - y0)
        for shift in (-4, 4):
            if upright:
                self.line((x0 + shift - 3, y0, x1 + shift + 3, y1), self.theme.paper, 3)
            else:
                self.line((x0, y0 + shift + 3, x1, y1 + shift - 3), self.theme.paper, 3)

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """A filled circle."""
        self._draw.ellipse([v * _SCALE for v in (x - radius, y - radius, x + radius, y + radius)], colour)

    def text(
        self, x: float, y: float, words: str, size: float, colour: Colour | None = None, anchor: Anchor = "lm"
    ) -> None:
        """One line of text; characters that the font lacks become question marks."""
        known = "".join(c if self._has(c) else "?" for c in words)
        self._draw.text((x * _SCALE, y * _SCALE), known, colour or self.theme.ink, self._font(size), anchor)

    def width_of(self, words: str, size: float) -> float:
        """Width of one line."""
        return self._font(size).getlength(words) / _SCALE

    def fitted(self, words: str, size: float, room: float) -> str:
        """The words, with dots in their middle where they are wider than the room."""
        if self.width_of(words, size) <= room:
            return words
        for kept in range(len(words) - 1, 1, -1):
            short = words[: (kept + 1) // 2] + "…" + words[len(words) - kept // 2 :]
            if self.width_of(short, size) <= room:
                return short
        return words[:1]

    def size_for(self, words: str, size: float, room: float, least: float = 11) -> float:
        """The size at which words fit into the room, at most `size`."""
        width = self.width_of(words, size)
        return size if width <= room else max(least, size * room / width)

    def title(self, words: str, below: str = "") -> None:
        """The page's heading and one line under it."""
        self.text(30, 38, words, 32)
        if below:
            self.text(30, 74, below, self.size_for(below, 19, self.width - 60), self.theme.faint)

    def _font(self, size: float) -> ImageFont.FreeTypeFont:
        pixels = round(size * _SCALE)
        if pixels not in self._fonts:
            font = ImageFont.load_default(pixels)
            assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow is built with FreeType wherever ComfyUI runs
            self._fonts[pixels] = font
        return self._fonts[pixels]

    @cached_property
    def _blank(self) -> bytes:
        return bytes(self._font(12).getmask(_MISSING))

    def _has(self, character: str) -> bool:
        return character.isspace() or bytes(self._font(12).getmask(character)) != self._blank


def short_name(name: str) -> str:
    """A LoRA's name as pictures show it: without folders and ending."""
    return name.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".safetensors")
