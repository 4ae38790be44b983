"""LoRAs trained from OSRM's analytic down instead of a random one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ssr_core import InputMoments, Target
from ssr_core.osrm import analytic_down, layer_generator

from .captions import encode
from .loras import RANK, STEPS, Trained, lora, reading, subject_scenes
from .network import Painter
from .pool import Subject
from .scenes import draw
from .training import CACHE

PICTURES = 100
"""Drawings of each other subject that the start is made from, as in the paper."""


def osrm_lora(
    base: Painter, who: Subject, group: Sequence[Subject], cache: Path = CACHE, steps: int = STEPS
) -> Trained:
    """A subject's LoRA that starts in what the base model's inputs on the rest of the group excite least."""
    others = [one for one in group if one.index != who.index]
    name = f"osrm_{who.index}_of_{'_'.join(str(one.index) for one in group)}"

    def start() -> dict[str, Tensor]:
        found = {}
        for path, total in _moments(base, others).items():
            moments = InputMoments(total, float(total.trace()), 1.0)
            generator = layer_generator(who.index, Target(path))
            found[path] = analytic_down(moments, RANK, generator).to(torch.float32)
        return found

    return lora(base, who, cache, steps, name=name, start=start)


@torch.no_grad()
def _moments(base: Painter, others: Sequence[Subject]) -> dict[str, Tensor]:
    """(in, in) of every layer: means over each drawing's tokens, at random times."""
    sums: dict[str, Tensor] = {}
    for subject in others:
        generator = torch.Generator().manual_seed(subject.index)
        scenes = (subject_scenes(subject, 400 + subject.index) * PICTURES)[:PICTURES]
        pictures, words = draw([scene for scene, _ in scenes], generator), encode([text for _, text in scenes])
        time = torch.rand(PICTURES, generator=generator)
        noise = torch.randn(pictures.shape, generator=generator)
        part = time[:, None, None, None]
        with reading(base) as inputs:
            base(part * pictures + (1 - part) * noise, time, words)
            for path, x in inputs.items():
                means = x.unflatten(0, (PICTURES, -1)).mean(dim=1).double()
                sums[path] = sums.get(path, 0) + means.T @ means
    return sums
