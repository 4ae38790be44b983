"""A small diffusion transformer of the joint-attention kind (as SD3 and Flux's double blocks).

Text and image have their own q, k, v, projection, MLP and modulation, and attend together. The
modulation comes from the timestep and the pooled text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .captions import LENGTH, WORDS
from .scenes import SIZE

WIDTH, DEPTH, HEADS, PATCH = 128, 5, 4, 4
TOKENS = (SIZE // PATCH) ** 2


class Stream(nn.Module):
    """One modality's half of a block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mod = nn.Linear(width, 6 * width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm_q, self.norm_k = nn.RMSNorm(width // HEADS), nn.RMSNorm(width // HEADS)

    def shifts(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Six (N, 1, width) modulation vectors."""
        return self.mod(functional.silu(vector))[:, None].chunk(6, dim=-1)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (N, heads, T, head width)."""
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, HEADS, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.norm_q(q), self.norm_k(k), v


class Block(nn.Module):
    """Joint attention, then an MLP for each stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.txt, self.img = Stream(width), Stream(width)

    def forward(self, txt: Tensor, img: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """New text and image tokens."""
        streams, tokens = (self.txt, self.img), (txt, img)
        mods = [stream.shifts(vector) for stream in streams]
        parts = [stream.heads(_modulate(x, m[0], m[1])) for stream, x, m in zip(streams, tokens, mods, strict=True)]
        q, k, v = (torch.cat([part[i] for part in parts], dim=2) for i in range(3))
        joint = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = []
        for stream, x, m, a in zip(
            streams, tokens, mods, joint.split([t.shape[1] for t in tokens], dim=1), strict=True
        ):
            y = x + m[2] * stream.proj(a)
            out.append(y + m[5] * stream.down(functional.gelu(stream.up(_modulate(y, m[3], m[4])))))
        return out[0], out[1]


class Painter(nn.Module):
    """Velocity of a rectified flow: picture - noise, from a noisy picture, its time and a caption."""

    def __init__(self, depth: int = DEPTH, width: int = WIDTH) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), width)
        self.txt_place = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.img_place = nn.Parameter(0.02 * torch.randn(TOKENS, width))
        self.txt_in, self.img_in = nn.Linear(width, width), nn.Linear(3 * PATCH**2, width)
        self.time_in = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.pool_in = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.last_mod, self.last = nn.Linear(width, 2 * width), nn.Linear(width, 3 * PATCH**2)
        for block in self.blocks:
            for stream in (block.txt, block.img):
                nn.init.zeros_(stream.mod.weight)
                nn.init.zeros_(stream.mod.bias)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, time: Tensor, words: Tensor) -> Tensor:
        """Velocity, like `x` (N, 3, SIZE, SIZE); time (N,) from 0 (noise) to 1 (picture); words (N, LENGTH)."""
        embedded = self.words(words)
        known = (words > 0).float()[..., None]
        pooled = (embedded * known).sum(1) / known.sum(1).clamp_min(1)
        vector = self.time_in(_waves(time, embedded.shape[-1])) + self.pool_in(pooled)
        txt = self.txt_in(embedded) + self.txt_place
        img = self.img_in(functional.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)) + self.img_place
        for block in self.blocks:
            txt, img = block(txt, img, vector)
        scale, shift = self.last_mod(functional.silu(vector))[:, None].chunk(2, dim=-1)
        patches = self.last(_modulate(img, shift, scale)).transpose(1, 2)
        return functional.pixel_shuffle(patches.unflatten(2, (SIZE // PATCH, SIZE // PATCH)), PATCH)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def _waves(time: Tensor, width: int) -> Tensor:
    rates = torch.exp(-math.log(1000.0) * torch.arange(width // 2, device=time.device) / (width // 2))
    angles = 1000 * time[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def euler(
    model: nn.Module, words: Tensor, noise: Tensor, steps: int, used: int | None = None, guidance: float = 1.0
) -> Iterator[Tensor]:
    """Euler steps from noise to picture; yields what stands after each of the first `used` ones."""
    x, empty = noise, torch.zeros_like(words)
    times = torch.linspace(0, 1, steps + 1)
    for now, then in itertools.islice(itertools.pairwise(times), used):
        at = now.expand(len(x))
        with torch.no_grad():
            velocity = model(x, at, words)
            if guidance != 1.0:
                without = model(x, at, empty)
                velocity = without + guidance * (velocity - without)
        x = x + (then - now) * velocity
        yield x


def sample(model: nn.Module, words: Tensor, noise: Tensor, steps: int = 12, guidance: float = 1.0) -> Tensor:
    """Pictures; guidance 1 evaluates the model once a step."""
    *_, last = euler(model, words, noise, steps, guidance=guidance)
    return last
