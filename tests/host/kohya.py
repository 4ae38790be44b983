"""What a kohya-style trainer does with `network_weights` and `dim_from_weights`, rebuilt from sd-scripts 48d368f.

It takes the layers' names and ranks from the file (what stands before the first dot, the first size of
lora_down), builds a pair of modules and an alpha for each such layer that it adapts itself, and loads
the file with `strict=False`: a wrong shape raises, a wrong name is dropped without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .dialects.naming import native
from .dialects.unets import unet_diffusers

_PREFIX = "diffusion_model."
_BLOCKS = {
    "flux": r"((double|single)_blocks\.|(img|txt|time|vector|guidance)_in)",
    "lumina2": r"(layers|noise_refiner|context_refiner|final_layer)\.",
    "sdxl": r"(input_blocks\.(?!0\.)|middle_block\.|output_blocks\.)",
}


def adapted_layers(family: str, weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Weight shape of every layer that the trainer of a family adapts, by its own name for the layer.

    SD 1.5 has the names of diffusers there, all others those of the original model.
    """
    shapes = {
        name.removeprefix(_PREFIX).removesuffix(".weight"): tuple(value.shape)
        for name, value in weights.items()
        if name.endswith(".weight") and value.ndim > 1
    }
    naming = unet_diffusers if family == "sd15" else native
    blocks = re.compile(_BLOCKS.get(family, ""))
    return {
        f"lora_unet_{entry.name.replace('.', '_')}": shapes[entry.module]
        for entry in naming(shapes)
        if blocks.match(entry.module)
    }


class _Pair(nn.Module):
    def __init__(self, shape: tuple[int, ...], rank: int) -> None:
        super().__init__()
        out, inner, *kernel = shape
        if kernel:
            self.lora_down: nn.Module = nn.Conv2d(inner, rank, tuple(kernel), bias=False)
            self.lora_up: nn.Module = nn.Conv2d(rank, out, (1, 1), bias=False)
        else:
            self.lora_down, self.lora_up = nn.Linear(inner, rank, bias=False), nn.Linear(rank, out, bias=False)
        self.register_buffer("alpha", torch.tensor(0.0))


def start_from(tensors: Mapping[str, Tensor], layers: Mapping[str, tuple[int, ...]]) -> tuple[nn.Module, set[str]]:
    """The network that training starts from, and the names in the file that it drops."""
    ranks = {key.split(".")[0]: value.shape[0] for key, value in tensors.items() if "lora_down" in key}
    network = nn.Module()
    for name, shape in layers.items():
        if name in ranks:
            network.add_module(name, _Pair(shape, ranks[name]))
    told = network.load_state_dict(dict(tensors), strict=False)
    assert not told.missing_keys
    return network, {key.split(".")[0] for key in told.unexpected_keys}
