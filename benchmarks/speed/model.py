"""A diffusion transformer's shape with random weights: what the engine's speed depends on, and nothing else.

Joint blocks have an image and a text stream with weights of their own and attend together; single
blocks have one stream. Every linear layer is separate (q, k, v, proj, MLP to 4 d and back), so each is
a target of its own. `frames` cuts attention into windows, as video models with spatial attention do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

MLP = 4
HEAD = 128
LINEARS = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "proj": (1, 1), "up": (1, MLP), "down": (MLP, 1)}
"""Inputs and outputs of a stream's layers, in units of d."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of what it is fed.

    Attributes:
        d: Width; heads have 128 dimensions, or all d of them where d is smaller.
        double: Number of joint blocks (two streams).
        single: Number of blocks with one stream over all tokens.
        image: Image tokens.
        text: Text tokens.
        frames: Windows of equal size that attention stays within; 1 is joint attention over all tokens.
    """

    d: int
    double: int
    single: int
    image: int
    text: int
    frames: int = 1

    @property
    def tokens(self) -> int:
        """N, of both streams together."""
        return self.image + self.text


class Stream(nn.Module):
    """Attention and MLP layers of one stream."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj, self.up, self.down = (
            nn.Linear(inputs * d, outputs * d) for inputs, outputs in LINEARS.values()
        )

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the normalised stream, (B, N, d) each."""
        x = nn.functional.layer_norm(x, x.shape[-1:])
        return self.q(x), self.k(x), self.v(x)

    def rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows attention."""
        x = x + self.proj(mixed)
        hidden = self.up(nn.functional.layer_norm(x, x.shape[-1:]))
        return x + self.down(nn.functional.gelu(hidden, approximate="tanh"))


def attend(q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
    """Attention of (B, N, d) tokens within each of `frames` windows."""
    b, n, d = q.shape
    size = min(d, HEAD)
    q, k, v = (x.view(b * frames, n // frames, d // size, size).transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)


class SpeedModel(nn.Module):
    """`shape.double` joint blocks, then `shape.single` single ones."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        with torch.device("meta"):
            self.image = nn.ModuleList(Stream(shape.d) for _ in range(shape.double))
            self.text = nn.ModuleList(Stream(shape.d) for _ in range(shape.double if shape.text else 0))
            self.both = nn.ModuleList(Stream(shape.d) for _ in range(shape.single))
        self.to_empty(device=device).to(dtype)
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                bound = 0.0 if parameter.ndim == 1 else (3 / parameter.shape[1]) ** 0.5
                parameter.uniform_(-bound, bound, generator=generator)
        self.requires_grad_(False)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, image, d) and (B, text, d) in, all tokens (B, N, d) out."""
        length = text.shape[1]
        for index, one in enumerate(self.image):
            q, k, v = one.qkv(image)
            if length:
                before = self.text[index].qkv(text)
                q, k, v = (torch.cat(pair, dim=1) for pair in zip(before, (q, k, v), strict=True))
            mixed = attend(q, k, v, self.shape.frames)
            if length:
                text = self.text[index].rest(text, mixed[:, :length])
            image = one.rest(image, mixed[:, length:])
        x = torch.cat([text, image], dim=1)
        for one in self.both:
            q, k, v = one.qkv(x)
            x = one.rest(x, attend(q, k, v, self.shape.frames))
        return x


def inputs(shape: Shape, task: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One task's image tokens (the same noise for all) and text tokens (its own prompt)."""
    noise, prompt = torch.Generator(device).manual_seed(1), torch.Generator(device).manual_seed(100 + task)
    image = torch.randn(1, shape.image, shape.d, generator=noise, device=device)
    text = torch.randn(1, shape.text, shape.d, generator=prompt, device=device)
    return image.to(dtype), text.to(dtype)
