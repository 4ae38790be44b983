"""A stub of a text-conditioned diffusion transformer, in the shape of the real ones.

Joint text-image attention with a fused qkv on the image side and split q, k, v on the text side,
modulation by timestep and pooled text, an MLP, a convolution as patch embedding. Weights are random:
what matters here is that layer inputs depend on the prompt the way they do in a real network.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssr_core import KeyMap, KeyTarget, Target

TEXT_LENGTH = 16


def embed_text(prompt: str, width: int, length: int = TEXT_LENGTH) -> Tensor:
    """(length, width): one random but fixed vector a word, zeros as padding."""
    rows = torch.zeros(length, width)
    for index, word in enumerate(prompt.lower().split()[:length]):
        generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
        rows[index] = torch.randn(width, generator=generator)
    return rows


class Block(nn.Module):
    """One joint block."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(d, 4 * d)
        self.qkv = nn.Linear(d, 3 * d)
        self.txt_q, self.txt_k, self.txt_v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.proj, self.txt_proj = nn.Linear(d, d), nn.Linear(d, d)
        self.mlp_in, self.mlp_out = nn.Linear(d, 3 * d), nn.Linear(3 * d, d)

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate, mlp_gate = self.modulation(condition)[:, None].chunk(4, dim=-1)
        x = nn.functional.layer_norm(image, image.shape[-1:]) * (1 + scale) + shift
        t = nn.functional.layer_norm(text, text.shape[-1:])
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = torch.cat([self.txt_q(t), q], dim=1)
        k = torch.cat([self.txt_k(t), k], dim=1)
        v = torch.cat([self.txt_v(t), v], dim=1)
        b, n, d = q.shape
        q, k, v = (a.view(b, n, self.heads, -1).transpose(1, 2) for a in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        length = text.shape[1]
        text = text + self.txt_proj(mixed[:, :length])
        image = image + (1 + gate) * self.proj(mixed[:, length:])
        x = nn.functional.layer_norm(image, image.shape[-1:]) * (1 + scale) + shift
        return image + (1 + mlp_gate) * self.mlp_out(nn.functional.gelu(self.mlp_in(x))), text


class StubTransformer(nn.Module):
    """Noise (B, 4, 16, 16), sigma and prompts in, a prediction of the same shape out."""

    def __init__(
        self, d: int = 96, depth: int = 3, heads: int = 4, seed: int = 0, text_length: int = TEXT_LENGTH
    ) -> None:
        super().__init__()
        self.text_length = text_length
        generator = torch.Generator().manual_seed(seed)
        self.d = d
        self.patch = nn.Conv2d(4, d, 2, stride=2)
        self.time_in, self.pooled_in, self.txt_in = nn.Linear(16, d), nn.Linear(d, d), nn.Linear(d, d)
        self.position = nn.Parameter(torch.zeros(1, 64, d))
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(depth))
        self.final = nn.Linear(d, 16)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 2500
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
                if name == "position":
                    parameter.mul_(3)
        self.requires_grad_(False)

    def forward(self, noise: Tensor, sigma: float, prompts: Sequence[str]) -> Tensor:
        words = torch.stack([embed_text(prompt, self.d, self.text_length) for prompt in prompts]).to(noise)
        angles = sigma * 2.0 ** torch.arange(8).to(noise)
        condition = self.time_in(torch.cat([angles.sin(), angles.cos()]).expand(len(prompts), 16))
        condition = nn.functional.silu(condition + self.pooled_in(words.sum(dim=1) / 2))
        image = self.patch(noise).flatten(2).transpose(1, 2) + self.position
        text = self.txt_in(words)
        for block in self.blocks:
            image, text = block(image, text, condition)
        out = self.final(nn.functional.layer_norm(image, image.shape[-1:]))
        return nn.functional.pixel_shuffle(out.transpose(1, 2).unflatten(2, (8, 8)), 2)


def key_map(model: nn.Module) -> KeyMap:
    """Names that LoRA files use for the stub: kohya, ComfyUI's own, diffusers with split q, k, v."""
    names: dict[str, KeyTarget] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        shape = tuple(module.weight.shape)
        whole = KeyTarget(Target(path), shape)
        names["lora_unet_" + path.replace(".", "_")] = whole
        names["diffusion_model." + path] = whole
        if path.endswith(".qkv"):
            rows = shape[0] // 3
            for index, letter in enumerate("qkv"):
                part = KeyTarget(Target(path, (index * rows, rows)), shape)
                names[f"transformer.{path.removesuffix('qkv')}to_{letter}"] = part
        else:
            names["transformer." + path] = whole
    return names
