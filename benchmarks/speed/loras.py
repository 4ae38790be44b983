"""LoRAs with random factors for every linear layer of the model, as the engine reads them from files."""

from __future__ import annotations

import torch
from torch import nn

from ssr_core import Adapter, LoRALayer, Target, Task

STRENGTH = 0.05
"""A LoRA's output over its layer's, roughly: enough to matter, too little to unsettle a random network."""


def random_tasks(model: nn.Module, count: int, rank: int, dtype: torch.dtype) -> list[Task]:
    """`count` LoRAs of one rank; factors on the CPU, where files are read to."""
    tasks = []
    for index in range(count):
        generator = torch.Generator().manual_seed(1000 + index)
        layers = {}
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                down = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
                up = torch.randn(module.out_features, rank, generator=generator) * (STRENGTH / rank**0.5)
                layers[Target(path)] = LoRALayer(down.to(dtype), up.to(dtype), float(rank))
        name = f"lora{index}"
        tasks.append(Task(Adapter(name, name, layers), prompts=(name,)))
    return tasks
