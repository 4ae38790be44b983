"""How well a merged model keeps what each LoRA does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .world.captions import encode
from .world.judge import Judge, crops, shows
from .world.network import euler, sample
from .world.scenes import SIZE, Scene, Thing, draw

STEPS = 8


def pictures(model: nn.Module, prompts: Sequence[str], count: int, seed: int) -> list[Tensor]:
    """Samples of each prompt (count, 3, SIZE, SIZE); prompt i has the noise of `seed + i`."""
    noises = [
        torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed + i))
        for i in range(len(prompts))
    ]
    words = encode(prompts).repeat_interleave(count, dim=0)
    return list(sample(model, words, torch.cat(noises), STEPS).split(count))


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


@dataclass(frozen=True)
class Reference:
    """What one model does along its own samples of a prompt, for others to be compared with.

    Attributes:
        asked: Pictures (N, 3, SIZE, SIZE), times (N,) and words (N, LENGTH) on the way from noise to picture.
        velocity: (N, 3, SIZE, SIZE), the model's answers.
        effect: Root mean square difference of these from the base model's answers.
    """

    asked: tuple[Tensor, Tensor, Tensor]
    velocity: Tensor
    effect: float

    @torch.no_grad()
    def difference(self, model: nn.Module) -> float:
        """Root mean square difference of another model's answers."""
        return float((model(*self.asked) - self.velocity).square().mean().sqrt())

    def distance(self, model: nn.Module) -> float:
        """The difference over the model's own effect: 0 is the same function, 1 is as far as the base."""
        return self.difference(model) / self.effect


@torch.no_grad()
def reference(model: nn.Module, base: nn.Module, prompt: str, seed: int, count: int = 4) -> Reference:
    """Sample a prompt `count` times, and keep what was asked of the model on the way."""
    words = encode([prompt] * count)
    x = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    seen = [x, *euler(model, words, x, STEPS)][:-1]
    times = torch.linspace(0, 1, STEPS + 1)[:-1].repeat_interleave(count)
    asked = (torch.cat(seen), times, words.repeat(STEPS, 1))
    velocity = model(*asked)
    return Reference(asked, velocity, float((base(*asked) - velocity).square().mean().sqrt()))
