"""Training of the base model, of the LoRAs, and of the judge; everything is cached on disk."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .captions import encode
from .network import DEPTH, WIDTH, Painter
from .pool import base_scene
from .scenes import draw

CACHE = Path(".cache/quality")
Runs = tuple[tuple[int, float], ...]
"""(steps, learning rate) of runs that each end at rate zero."""

BASE_RUNS: Runs = ((5500, 1.5e-3),)
BASE_BATCH = 32
EMPTY_CAPTIONS = 0.1

Batch = tuple[Tensor, Tensor]
"""Pictures (N, 3, SIZE, SIZE) and words (N, LENGTH)."""


def flow_loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity at logit-normal times."""
    pictures, words = batch
    time = torch.randn(len(pictures), generator=generator).sigmoid()
    noise = torch.randn(pictures.shape, generator=generator)
    mixed = time[:, None, None, None] * pictures + (1 - time)[:, None, None, None] * noise
    return (model(mixed, time, words) - (pictures - noise)).square().mean()


def fit(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    batch: Callable[[int], Batch],
    *,
    steps: int,
    rate: float,
    seed: int,
    label: str = "",
) -> None:
    """AdamW with a short warm-up and a cosine to zero."""
    chosen = [p for p in parameters if p.requires_grad]
    optimiser = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    mean = math.nan
    for step in range(steps):
        share = min(1.0, (step + 1) / (0.02 * steps + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate * share
        loss = flow_loss(model, batch(step), generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimiser.step()
        value = float(loss.detach())
        mean = value if math.isnan(mean) else 0.99 * mean + 0.01 * value
        if label and step % 100 == 99:
            print(f"{label}: step {step + 1} of {steps}, loss {mean:.4f}", flush=True)
    model.eval()


def base_batches(seed: int, size: int) -> Callable[[int], Batch]:
    """Endless base scenes."""
    chooser, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def batch(_: int) -> Batch:
        pairs = [base_scene(chooser) for _ in range(size)]
        texts = ["" if chooser.random() < EMPTY_CAPTIONS else text for _, text in pairs]
        return draw([scene for scene, _ in pairs], generator), encode(texts)

    return batch


def base_model(cache: Path = CACHE, runs: Runs = BASE_RUNS, depth: int = DEPTH, width: int = WIDTH) -> Painter:
    """The base model: from the cache, else trained (most of the benchmark's time)."""
    torch.manual_seed(0)
    model = Painter(depth, width)
    for number in range(len(runs)):
        steps, rate = runs[number]
        path = cache / f"base_{'_'.join(str(done) for done, _ in runs[: number + 1])}.safetensors"
        if not path.exists():
            batches = base_batches(1 + number, BASE_BATCH)
            fit(model, model.parameters(), batches, steps=steps, rate=rate, seed=2 + number, label="base model")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), path)
        model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)
