"""How well a merged model keeps what each LoRA does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .world.captions import encode
from .world.judge import Judge, crops, shows
from .world.network import euler, sample
from .world.scenes import SIZE, Scene, Thing, draw

STEPS = 12


def pictures(model: nn.Module, prompt: str, count: int, seed: int) -> Tensor:
    """Samples (count, 3, SIZE, SIZE) of one prompt; equal seeds have equal noise."""
    noise = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return sample(model, encode([prompt] * count), noise, STEPS)


def success(judge: Judge, found: Tensor, things: Sequence[Thing], style: str | None = None) -> Tensor:
    """(objects, N) bool: which objects are shown as they should be."""
    places = crops(found, len(things))
    return torch.stack(
        [shows(judge.look_at(place), [thing] * len(found), style) for thing, place in zip(things, places, strict=True)]
    )


def similarity(judge: Judge, found: Tensor, thing: Thing, style: str | None = None) -> float:
    """Mean cosine between the judge's features of samples and of drawings."""
    drawn = draw([Scene((thing,), style)] * 16, torch.Generator().manual_seed(3))
    centre = functional.normalize(judge.look_at(drawn).features.mean(0), dim=0)
    return float((judge.look_at(found).features @ centre).mean())


def along(model: nn.Module, prompt: str, seed: int, count: int = 8) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(pictures, times, words) that a model is asked about while it samples a prompt."""
    words = encode([prompt] * count)
    x = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(0, 1, STEPS + 1)
    for now, then in zip(times[:-1], euler(model, words, x, STEPS), strict=True):
        yield x, now.expand(count), words
        x = then


@torch.no_grad()
def function_distance(merged: nn.Module, single: nn.Module, base: nn.Module, prompt: str, seed: int) -> float:
    """Distance of two velocity fields over the single LoRA's own effect, along the single LoRA's samples."""
    off = effect = 0.0
    for state in along(single, prompt, seed):
        wanted = single(*state)
        off += float((merged(*state) - wanted).square().sum())
        effect += float((base(*state) - wanted).square().sum())
    return (off / effect) ** 0.5


@torch.no_grad()
def velocity_change(model: nn.Module, base: nn.Module, prompt: str, seed: int) -> float:
    """Root mean square difference of two velocity fields along the base's samples."""
    squares = [float((model(*state) - base(*state)).square().mean()) for state in along(base, prompt, seed)]
    return fmean(squares) ** 0.5
