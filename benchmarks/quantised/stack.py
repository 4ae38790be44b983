"""A stack of wide layers as ComfyUI builds them, on its own: the time that forward application adds to a pass.

Weight patches cost nothing once they are in the weights, so the pass without the LoRA stands for them.
Needs ComfyUI importable.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from ssr_core import ForwardLoRA, LoRALayer, Target

RANK, REPEATS = 32, 7


class Blocks(nn.Module):
    """Attention-free transformer blocks: qkv, projection, MLP up and down."""

    def __init__(self, operations: Any, width: int, depth: int) -> None:
        super().__init__()
        sizes = ((width, 3 * width), (3 * width, width), (width, 4 * width), (4 * width, width))
        self.layers = nn.ModuleList(
            operations.Linear(i, o, bias=False, dtype=torch.float32, device="cpu")
            for _ in range(depth)
            for i, o in sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def build(kind: str, width: int, depth: int) -> Blocks:
    """Random weights of unit gain in one of ComfyUI's formats."""
    import comfy.ops
    import comfy.quant_ops as quant

    if kind == "float32":
        blocks = Blocks(comfy.ops.disable_weight_init, width, depth)
        for layer in blocks.layers:
            layer.weight = nn.Parameter(_random(layer), requires_grad=False)
        return blocks
    if kind == "unscaled_fp8_e4m3fn":
        blocks = Blocks(comfy.ops.manual_cast, width, depth)
        for layer in blocks.layers:
            layer.weight = nn.Parameter(_random(layer).to(torch.float8_e4m3fn), requires_grad=False)
        return blocks
    blocks = Blocks(comfy.ops.mixed_precision_ops({}, torch.float32, disabled=_DISABLED), width, depth)
    settings = {"convrot": True, "per_channel": True} if kind == "int8_convrot" else {}
    name = {"int8": "int8_tensorwise", "int8_convrot": "int8_tensorwise"}.get(kind, kind)
    layout = quant.QUANT_ALGOS[name]["comfy_tensor_layout"]
    for layer in blocks.layers:
        scale = {"scale": "recalculate"} if name.startswith("float8") else {}
        packed = quant.QuantizedTensor.from_float(_random(layer), layout, **scale, **settings)
        layer.weight, layer.layout_type, layer.quant_format = nn.Parameter(packed, requires_grad=False), layout, name
        layer._full_precision_mm = name in _DISABLED
    return blocks


_DISABLED = frozenset({"float8_e4m3fn", "mxfp8", "nvfp4"})
"""What a CPU cannot multiply natively; the host then dequantises, as it does on older GPUs."""


def _random(layer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(layer.in_features + layer.out_features)
    return torch.randn(layer.out_features, layer.in_features, generator=generator) / layer.in_features**0.5


def overhead(kind: str, width: int, depth: int, tokens: int) -> dict[str, Any]:
    """Median CPU time of a pass with the LoRA in the forward pass over one without it, by turns."""
    blocks = build(kind, width, depth)
    layers = {
        Target(f"layers.{i}"): LoRALayer(
            torch.randn(RANK, m.in_features) / 1e3, torch.randn(m.out_features, RANK) / 1e3
        )
        for i, m in enumerate(blocks.layers)
    }
    lora, x = ForwardLoRA(layers), torch.randn(1, tokens, width)
    plain, added = [], []
    blocks(x)
    for _ in range(REPEATS):
        plain.append(_seconds(blocks, x))
        with lora.attached(blocks, x.device, x.dtype):
            added.append(_seconds(blocks, x))
    without, with_lora = statistics.median(plain), statistics.median(added)
    return {
        "kind": kind,
        "width": width,
        "tokens": tokens,
        "rank": RANK,
        "seconds": {"weights": without, "forward": with_lora},
        "ratio": with_lora / without,
        "arithmetic": 1
        + sum(RANK * (m.in_features + m.out_features) for m in blocks.layers)
        / sum(m.in_features * m.out_features for m in blocks.layers),
    }


def _seconds(blocks: Blocks, x: Tensor) -> float:
    start = time.thread_time()
    blocks(x)
    return time.thread_time() - start
