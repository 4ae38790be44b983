"""An independent judge of pictures: a small convolutional network trained on drawings, never on samples.

It says shape, pattern, both colours and style of one object; an identity counts as shown if all of
these are right. Its last features serve as an embedding, as DINO's do in the paper.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .pool import random_look
from .scenes import COLOUR_NAMES, PATTERNS, SHAPES, SIZE, STYLES, Look, Scene, Thing, draw
from .training import CACHE

STEPS, BATCH = 2500, 64
STYLE_NAMES = (None, *STYLES)
_UNORDERED = ("striped", "banded")


class Verdict(NamedTuple):
    """What the judge sees: one entry for each picture."""

    shape: Tensor
    pattern: Tensor
    colours: Tensor
    style: Tensor
    features: Tensor


class Judge(nn.Module):
    """Five answers from one body."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (SIZE // 16) ** 2, 128), nn.SiLU())
        sizes = (len(SHAPES), len(PATTERNS), len(COLOUR_NAMES), len(COLOUR_NAMES), len(STYLE_NAMES))
        self.heads = nn.ModuleList([nn.Linear(128, size) for size in sizes])

    def forward(self, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features (N, 128) and the logits of every head."""
        features = self.body(pictures)
        return features, [head(features) for head in self.heads]

    @torch.no_grad()
    def look_at(self, pictures: Tensor) -> Verdict:
        """Most likely answers."""
        features, logits = self(pictures.clamp(-1, 1))
        shape, pattern, first, second, style = (one.argmax(1) for one in logits)
        return Verdict(shape, pattern, torch.stack([first, second], 1), style, functional.normalize(features, dim=1))


def shows(verdict: Verdict, things: Sequence[Thing], style: str | None = None, *, any_style: bool = False) -> Tensor:
    """(N,) bool: shape, pattern, colours and (unless `any_style`) style are all those wanted."""
    right = []
    for i, thing in enumerate(things):
        pattern = PATTERNS[int(verdict.pattern[i])]
        first, second = (COLOUR_NAMES[int(c)] for c in verdict.colours[i])
        look = thing.look
        colours = first == look.first and (look.pattern == "plain" or second == look.second)
        if look.pattern in _UNORDERED:
            colours = {first, second} == {look.first, look.second}
        same_style = any_style or STYLE_NAMES[int(verdict.style[i])] == style
        right.append(
            SHAPES[int(verdict.shape[i])] == thing.shape and pattern == look.pattern and colours and same_style
        )
    return torch.tensor(right)


def crops(pictures: Tensor, count: int) -> list[Tensor]:
    """The places of a scene's objects, each enlarged to a picture of its own."""
    if count == 1:
        return [pictures]
    half = SIZE // 2
    top = [SIZE // 4] * 2 if count == 2 else [0, 0, half, half]
    corners = [(top[i], half * (i % 2)) for i in range(count)]
    return [
        functional.interpolate(pictures[:, :, y : y + half, x : x + half], size=(SIZE, SIZE), mode="bilinear")
        for y, x in corners
    ]


def _examples(chooser: random.Random, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """Objects alone and cropped out of larger scenes, in all styles and none, slightly blurred or noisy."""
    pictures, things, styles = [], [], []
    for count in (1, 2, 4):
        scenes = []
        for _ in range(BATCH // 4 if count > 1 else BATCH // 2):
            group = tuple(_thing(chooser) for _ in range(count))
            style = chooser.choice(STYLES) if chooser.random() < 0.4 else None
            scenes.append(Scene(group, style))
        which = chooser.randrange(count)
        pictures.append(crops(draw(scenes, generator), count)[which])
        things += [scene.things[which] for scene in scenes]
        styles += [scene.style for scene in scenes]
    batch = _ragged(torch.cat(pictures), generator)
    batch = batch + 0.08 * torch.rand(len(batch), 1, 1, 1, generator=generator) * torch.randn(
        batch.shape, generator=generator
    )
    answers = [
        [SHAPES.index(t.shape) for t in things],
        [PATTERNS.index(t.look.pattern) for t in things],
        [COLOUR_NAMES.index(_colours(t.look)[0]) for t in things],
        [COLOUR_NAMES.index(_colours(t.look)[1]) for t in things],
        [STYLE_NAMES.index(style) for style in styles],
    ]
    return batch, [torch.tensor(one) for one in answers]


def _ragged(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Edges as a painter's unsteady hand leaves them: every pixel is read from up to two pixels away."""
    count = len(pictures)
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    strength = 2 * torch.rand(count, 1, 1, 1, generator=generator) * 2 / SIZE
    coarse = torch.randn(count, 2, SIZE // 2, SIZE // 2, generator=generator)
    shift = functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear").permute(0, 2, 3, 1) * strength
    grid = torch.stack([x, y], dim=-1)[None] + shift.clamp(-4 / SIZE, 4 / SIZE)
    return functional.grid_sample(pictures, grid, mode="nearest", padding_mode="border", align_corners=False)


def _thing(chooser: random.Random) -> Thing:
    return Thing(chooser.choice(SHAPES), random_look(chooser))


def _colours(look: Look) -> tuple[str, str]:
    """What the judge is to answer; stripes have no first colour, so theirs are named in one order."""
    if look.pattern == "plain":
        return look.first, look.first
    pair = (look.first, look.second)
    return (min(pair), max(pair)) if look.pattern in _UNORDERED else pair


def judge(cache: Path = CACHE, steps: int = STEPS) -> Judge:
    """The judge: from the cache, else trained."""
    torch.manual_seed(1)
    model = Judge()
    path = cache / f"judge_{steps}.safetensors"
    if not path.exists():
        chooser, generator = random.Random(77), torch.Generator().manual_seed(77)
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
        for step in range(steps):
            pictures, answers = _examples(chooser, generator)
            _, logits = model(pictures)
            loss = sum(functional.cross_entropy(one, answer) for one, answer in zip(logits, answers, strict=True))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if step % 200 == 199:
                print(f"judge: step {step + 1} of {steps}, loss {float(loss.detach()):.3f}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)
