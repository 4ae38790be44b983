"""Scenes of one or two objects, drawn from distance functions: the only pictures of this world.

An object is a shape with a look; a look is a pattern of two colours, or one plain colour. A style
changes the whole picture. Everything is vectorised over a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 32
REACH = 0.06
"""How far objects stray from their places, in half picture widths."""
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = {
    "red": (0.85, 0.10, 0.15),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.10, 0.25, 0.90),
    "yellow": (0.95, 0.85, 0.10),
    "cyan": (0.10, 0.80, 0.85),
    "black": (0.08, 0.08, 0.08),
}
COLOUR_NAMES = tuple(COLOURS)
PATTERNS = ("plain", "striped", "banded", "dotted")
STYLES = ("negative", "soft", "lined", "outlined", "posterised")


@dataclass(frozen=True)
class Look:
    """What an object is painted with.

    Attributes:
        pattern: One of `PATTERNS`; the second colour of a plain one is ignored.
        first: Main colour.
        second: Colour of the stripes, bands or dots.
    """

    pattern: str
    first: str
    second: str


@dataclass(frozen=True)
class Thing:
    """An object of a scene."""

    shape: str
    look: Look


@dataclass(frozen=True)
class Scene:
    """One object; two side by side; or up to four in a grid, row by row; and a style, if any."""

    things: tuple[Thing, ...]
    style: str | None = None


def draw(scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
    """Pictures of scenes, (N, 3, SIZE, SIZE) in [-1, 1], with random places, sizes and backgrounds."""
    count = len(scenes)
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    shade = 0.75 + 0.25 * torch.rand(count, 1, 1, 1, generator=generator)
    pictures = shade.expand(count, 3, SIZE, SIZE).clone()
    for slot in range(max(len(scene.things) for scene in scenes)):
        rows = [i for i, scene in enumerate(scenes) if len(scene.things) > slot]
        things = [scenes[i].things[slot] for i in rows]
        others = torch.tensor([len(scenes[i].things) for i in rows], dtype=torch.float32)
        random = torch.rand(len(rows), 3, generator=generator) * 2 - 1
        single, grid = others == 1, others > 2
        centre_x = torch.where(single, 0.0, -0.5 + slot % 2) + REACH * random[:, 0]
        centre_y = torch.where(grid, -0.5 + slot // 2, 0.0) + REACH * random[:, 1]
        radius = torch.where(single, 0.75, 0.44) * (1 + 0.03 * random[:, 2])
        u = (x[None] - centre_x[:, None, None]) / radius[:, None, None]
        v = (y[None] - centre_y[:, None, None]) / radius[:, None, None]
        inside = _coverage(things, u, v, radius)
        paint = _paint(things, u, v)
        pictures[rows] = pictures[rows] * (1 - inside) + paint * inside
    return _styled(pictures, [scene.style for scene in scenes]) * 2 - 1


def _coverage(things: Sequence[Thing], u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """(N, 1, SIZE, SIZE): 1 inside the shape, 0 outside, smooth over a pixel."""
    r = (u.square() + v.square()).sqrt()
    distance = {
        "circle": r - 0.95,
        "square": torch.maximum(u.abs(), v.abs()) - 0.82,
        "triangle": torch.maximum(v - 0.75, u.abs() * 0.87 - v * 0.5 - 0.48),
        "cross": torch.minimum(
            torch.maximum(u.abs() - 0.36, v.abs() - 0.95), torch.maximum(u.abs() - 0.95, v.abs() - 0.36)
        ),
        "ring": (r - 0.68).abs() - 0.30,
        "diamond": (u.abs() + v.abs()) - 1.0,
    }
    chosen = torch.stack([distance[thing.shape][i] for i, thing in enumerate(things)])
    pixel = 2 / SIZE / radius[:, None, None]
    return (0.5 - chosen / pixel).clamp(0, 1)[:, None]


def _paint(things: Sequence[Thing], u: Tensor, v: Tensor) -> Tensor:
    """(N, 3, SIZE, SIZE) colours of every point."""
    first = torch.tensor([COLOURS[thing.look.first] for thing in things])[:, :, None, None]
    second = torch.tensor([COLOURS[thing.look.second] for thing in things])[:, :, None, None]
    waves = {
        "plain": torch.zeros_like(u),
        "striped": (torch.sin(u * 6.5) > 0).float(),
        "banded": (torch.sin(v * 6.5 + 1.57) > 0).float(),
        "dotted": ((torch.cos(u * 6.2) + torch.cos(v * 6.2)) > 0.75).float(),
    }
    mix = torch.stack([waves[thing.look.pattern][i] for i, thing in enumerate(things)])[:, None]
    return first * (1 - mix) + second * mix


def _styled(pictures: Tensor, styles: Sequence[str | None]) -> Tensor:
    """Styles change every pixel, background included."""
    for style in STYLES:
        rows = [i for i, one in enumerate(styles) if one == style]
        if rows:
            pictures[rows] = _STYLED[style](pictures[rows])
    return pictures


def _soft(p: Tensor) -> Tensor:
    kernel = torch.ones(3, 1, 5, 5) / 25
    return torch.nn.functional.conv2d(torch.nn.functional.pad(p, (2, 2, 2, 2), "replicate"), kernel, groups=3)


def _lined(p: Tensor) -> Tensor:
    rows = (torch.arange(SIZE) // 2 % 2).float()[None, None, :, None]
    return p * (0.35 + 0.65 * rows)


def _outlined(p: Tensor) -> Tensor:
    grey = p.mean(dim=1, keepdim=True)
    padded = torch.nn.functional.pad(grey, (1, 1, 1, 1), "replicate")
    slope = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]).abs()
    slope = slope + (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]).abs()
    edge = (slope * 2.2).clamp(0, 1)
    return (0.95 * (1 - edge) + 0.15 * edge).expand_as(p) * 0.65 + 0.35 * p


def _posterised(p: Tensor) -> Tensor:
    tint = torch.tensor([1.0, 0.82, 0.55])[None, :, None, None]
    return (p.mean(dim=1, keepdim=True) * 0.7 + 0.3 * p) * tint


_STYLED = {
    "negative": lambda p: 1 - p,
    "soft": _soft,
    "lined": _lined,
    "outlined": _outlined,
    "posterised": _posterised,
}
