"""LoRA files with planted conflicts, in the dialects of two trainers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ssr_core import atomic_path, write_safetensors

from .model import StubTransformer, key_map

SIGMA = 1.0


def noise(seed: int, batch: int = 1) -> Tensor:
    """The noise of one pass, (batch, 4, 16, 16)."""
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)).repeat(batch, 1, 1, 1)


@contextmanager
def layer_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inputs of every linear layer and unfolded inputs of every convolution, (N, in), of the last pass."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if isinstance(module, nn.Conv2d):
                x = nn.functional.unfold(x, module.kernel_size, stride=module.stride)
                x = x.transpose(1, 2)
            seen[path] = x.reshape(-1, x.shape[-1])

        return hook

    handles = [
        module.register_forward_pre_hook(keep(path))  # type: ignore[arg-type]
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def weight_of(model: nn.Module, path: str) -> Tensor:
    """The weight of one module."""
    return model.get_parameter(path + ".weight")


def plant_loras(
    model: StubTransformer, prompts: Sequence[str], *, rank: int = 8, size: float = 0.5, seed: int = 1
) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """One LoRA a prompt, all reading the same directions of the layers' inputs, so that they collide.

    Returns:
        For each prompt: module path -> (down (rank, in), up (out, rank)).
    """
    generator = torch.Generator().manual_seed(seed)
    moments: dict[str, Tensor] = {}
    for prompt in prompts:
        with layer_inputs(model) as inputs:
            model(noise(seed + 100), SIGMA, [prompt])
        for path, x in inputs.items():
            moments[path] = moments.get(path, torch.zeros(())) + x.T @ x / x.shape[0]
    loras: list[dict[str, tuple[Tensor, Tensor]]] = []
    for _ in prompts:
        factors = {}
        for path, moment in moments.items():
            values, vectors = torch.linalg.eigh(moment)
            used = min(3 * rank, moment.shape[0])
            directions, energy = vectors[:, -used:], values[-used:].mean()
            down = torch.randn(rank, used, generator=generator) @ directions.T / used**0.5
            out = weight_of(model, path).shape[0]
            up = torch.randn(out, rank, generator=generator) * size / (rank * float(energy) + 1e-6) ** 0.5
            factors[path] = (down, up)
        loras.append(factors)
    return loras


def write_lora(model: StubTransformer, lora: dict[str, tuple[Tensor, Tensor]], path: Path, dialect: str) -> None:
    """Write one LoRA: "kohya" (fused qkv, alpha) or "diffusers" (split q, k, v, no alpha)."""
    tensors: dict[str, Tensor] = {}
    names = key_map(model)
    for module, (down, up) in lora.items():
        kernel = weight_of(model, module).shape[2:]
        down4 = down.reshape(down.shape[0], -1, *kernel) if kernel else down
        if dialect == "kohya":
            base = "lora_unet_" + module.replace(".", "_")
            alpha = down.shape[0] / 2
            tensors[base + ".lora_down.weight"] = down4.contiguous()
            tensors[base + ".lora_up.weight"] = (2 * up).reshape(*up.shape, *(1 for _ in kernel)).contiguous()
            tensors[base + ".alpha"] = torch.tensor(alpha)
            continue
        for base, entry in names.items():
            if base.startswith("transformer.") and entry.target.module_path == module:
                start, length = entry.target.out_slice or (0, up.shape[0])
                rows = up[start : start + length].reshape(length, -1, *(1 for _ in kernel))
                tensors[base + ".lora_A.weight"] = down4.clone().contiguous()
                tensors[base + ".lora_B.weight"] = rows.contiguous().clone()
    with atomic_path(path, overwrite=True) as temporary:
        write_safetensors(temporary, tensors, {"format": "pt"})
