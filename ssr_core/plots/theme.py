"""Colours: a light and a dark theme, both readable with any kind of colour blindness."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Colour = tuple[int, int, int]

# Anchors of cividis (Nunez, Anderton, Renslow 2018): lightness rises evenly, hue goes from blue to yellow.
_CIVIDIS: tuple[Colour, ...] = (
    (0, 34, 78),
    (18, 53, 112),
    (59, 73, 108),
    (87, 93, 109),
    (112, 113, 115),
    (138, 134, 120),
    (165, 156, 116),
    (195, 179, 105),
    (225, 204, 85),
    (254, 232, 56),
)


@dataclass(frozen=True)
class Theme:
    """What a picture is drawn in.

    Attributes:
        paper: Background.
        panel: Background of plots.
        ink: Text.
        faint: Secondary text.
        grid: Grid lines, and cells about which nothing is to be said.
        routers: Colour of each router's bars (Okabe and Ito's palette).
    """

    paper: Colour
    panel: Colour
    ink: Colour
    faint: Colour
    grid: Colour
    routers: Mapping[str, Colour]


LIGHT = Theme(
    (255, 255, 255),
    (246, 247, 249),
    (24, 28, 36),
    (92, 100, 112),
    (214, 218, 224),
    {"result": (0, 114, 178), "sum": (213, 94, 0), "average": (230, 159, 0), "gains": (0, 158, 115)},
)
DARK = Theme(
    (24, 26, 31),
    (33, 36, 43),
    (236, 239, 244),
    (160, 168, 180),
    (62, 67, 78),
    {"result": (86, 180, 233), "sum": (226, 110, 20), "average": (240, 228, 66), "gains": (0, 178, 130)},
)
THEMES: dict[str, Theme] = {"light": LIGHT, "dark": DARK}


def heat(value: float) -> Colour:
    """Cividis at a value; what lies outside of 0 to 1 takes the end's colour."""
    at = min(1.0, max(0.0, value)) * (len(_CIVIDIS) - 1)
    low = min(int(at), len(_CIVIDIS) - 2)
    share = at - low
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(_CIVIDIS[low], _CIVIDIS[low + 1], strict=True))
    return red, green, blue


def luminance(colour: Colour) -> float:
    """Relative luminance (WCAG 2), 0 to 1."""
    red, green, blue = ((c / 255) / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: Colour, other: Colour) -> float:
    """Contrast ratio (WCAG 2), 1 to 21."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever reads better on a colour."""
    black, white = (10, 12, 16), (255, 255, 255)
    return black if contrast(black, colour) > contrast(white, colour) else white
