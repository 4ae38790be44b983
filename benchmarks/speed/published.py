"""The authors' published algorithm, followed literally from its description.

For each LoRA: the base weights are copied back from a clone of the whole state dict and the LoRA's dense
delta is added to every weight; in each hook call `z = down x`, its Gram and the guide's rows are
computed and copied to the host, where float64 sums take them. Then layer by layer
`Rt = (Q/N) (G/N + 1e-4 I)^-1` with a general solver in float64, absorbed into the ups.
One reload a task and one at the end; the authors' code reloads twice a task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ssr_core import LoRALayer, Task

RIDGE = 1e-4


@dataclass
class _Sums:
    """One layer's statistics on the host."""

    down: Tensor
    up: Tensor
    gram: Tensor
    guide: Tensor
    tokens: int = 0


@dataclass(frozen=True)
class Published:
    """What it gives.

    Attributes:
        routers: (R, R) float64 by module path.
        factors: (down, up Rt) by module path.
    """

    routers: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def published_merge(model: nn.Module, tasks: Sequence[Task], run: Callable[[int], object]) -> Published:
    """Calibrate and merge.

    Args:
        model: Its weights change during the run and are back afterwards.
        tasks: LoRAs that all act on the same whole linear layers.
        run: Runs the model on task i's input.
    """
    original = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
    sums = _empty_sums(tasks)
    try:
        for index, task in enumerate(tasks):
            model.load_state_dict(original)
            for target, layer in task.adapter.layers.items():
                weight = model.get_parameter(target.module_path + ".weight")
                weight.add_(layer.scale * (layer.up.to(weight) @ layer.down.to(weight)))
            handles = [
                model.get_submodule(path).register_forward_pre_hook(_hook(one, _rows(tasks, path, index)))
                for path, one in sums.items()
            ]
            run(index)
            for handle in handles:
                handle.remove()
    finally:
        model.load_state_dict(original)
    return _solved(sums)


def _layers(tasks: Sequence[Task], path: str) -> list[LoRALayer]:
    return [layer for task in tasks for target, layer in task.adapter.layers.items() if target.module_path == path]


def _rows(tasks: Sequence[Task], path: str, index: int) -> slice:
    ranks = [layer.rank for layer in _layers(tasks, path)]
    return slice(sum(ranks[:index]), sum(ranks[: index + 1]))


def _empty_sums(tasks: Sequence[Task]) -> dict[str, _Sums]:
    sums = {}
    for target in tasks[0].adapter.layers:
        layers = _layers(tasks, target.module_path)
        down = torch.cat([layer.down for layer in layers])
        up = torch.cat([layer.up * layer.scale for layer in layers], dim=1)
        zero = torch.zeros(len(down), len(down), dtype=torch.float64)
        sums[target.module_path] = _Sums(down, up, zero, zero.clone())
    return sums


def _hook(one: _Sums, rows: slice) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].flatten(0, -2)
        z = x @ one.down.to(x).T
        one.gram += (z.T @ z).to("cpu", torch.float64)
        one.guide[rows] += (z[:, rows].T @ z).to("cpu", torch.float64)
        one.tokens += len(x)

    return hook


def _solved(sums: dict[str, _Sums]) -> Published:
    result = Published()
    for path, one in sums.items():
        size = len(one.down)
        left = one.gram / one.tokens + RIDGE * torch.eye(size, dtype=torch.float64)
        router = torch.linalg.solve(left.T, (one.guide / one.tokens).T).T
        result.routers[path] = router
        result.factors[path] = (one.down, (one.up.to(torch.float64) @ router).to(one.up.dtype))
    return result
