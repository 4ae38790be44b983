"""Solve and absorb: layers per second against sequential `torch.linalg.solve`, and the cost's exponents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssr_core import GramStats, LayerStack, SSRMerge, build_stacks
from ssr_core.router import solve

from .loras import random_tasks
from .timing import Spread, by_turns

RIDGE = 1e-4


def measure_solve(d: int, count: int, rank: int, layers: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """One configuration: `layers` linear layers of d inputs and outputs, statistics of 4 R random tokens a task.

    `median` is the engine's `merge` of stacks (canonical problem, batched Cholesky, absorbed ups) over the
    sequential general solver that also absorbs; `solver_alone` leaves out all but the factorisation and
    the triangular solves on both sides.
    """
    with torch.device("meta"):
        model = nn.ModuleDict({f"layer{index}": nn.Linear(d, d) for index in range(layers)})
    stacks = build_stacks(random_tasks(model, count, rank, torch.float32))
    stats = [_statistics(stack, seed) for seed, stack in enumerate(stacks)]
    grams = [one.gram.to(device, torch.float64) for one in stats]
    ups = [torch.cat([block.up for block in stack.blocks], dim=1).to(device, torch.float64) for stack in stacks]
    terms = [_terms(gram, rank, float(one.tokens.sum())) for gram, one in zip(grams, stats, strict=True)]
    q, g = (torch.stack(parts) for parts in zip(*terms, strict=True))
    mu = torch.full((layers,), RIDGE, dtype=torch.float64, device=device)
    anchor = torch.zeros_like(q)
    runs = {
        "engine": lambda: SSRMerge().merge(stacks, stats, device),
        "sequential": lambda: [_sequential(*one) for one in zip(stats, ups, [rank] * layers, strict=True)],
        "batched": lambda: solve(q, g, anchor, mu),
        "general": lambda: [_general(*one) for one in zip(q, g, strict=True)],
    }
    runs["engine"]()  # makes the coordinates, which calibration has made already in a real merge
    times = by_turns(runs, repeats, device)

    def over(one: str, other: str) -> Spread:
        return Spread.of([a / b for a, b in zip(times[one], times[other], strict=True)])

    return {
        "d": d,
        "K": count,
        "r": rank,
        "layers": layers,
        **over("engine", "sequential").json(),
        "solver_alone": over("batched", "general").json()["median"],
        **{
            f"{name}_layers_per_second": float(f"{layers / Spread.of(found).median:.4g}")
            for name, found in times.items()
        },
    }


def exponent(rows: Sequence[dict[str, Any]], name: str, **fixed: int) -> float:
    """Slope of log seconds a layer over log R by least squares, over the rows with these values."""
    kept = [row for row in rows if all(row[key] == value for key, value in fixed.items())]
    x = [math.log(row["K"] * row["r"]) for row in kept]
    y = [-math.log(row[f"{name}_layers_per_second"]) for row in kept]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def _statistics(stack: LayerStack, seed: int) -> GramStats:
    generator, size, count = torch.Generator().manual_seed(seed), sum(stack.basis_ranks), len(stack.blocks)
    grams = []
    for _ in range(count):
        z = torch.randn(4 * size, size, generator=generator) + torch.randn(size, generator=generator)
        grams.append(z.T @ z)
    tokens = torch.full((count,), 4.0 * size, dtype=torch.float64)
    return GramStats(torch.stack(grams), tokens, torch.zeros(count, dtype=torch.int64), stack.basis_ranks)


def _terms(gram: Tensor, rank: int, tokens: float) -> tuple[Tensor, Tensor]:
    """Q / N and G / N."""
    q = torch.cat([one[k * rank : (k + 1) * rank] for k, one in enumerate(gram)])
    return q / tokens, gram.sum(dim=0) / tokens


def _general(q: Tensor, g: Tensor) -> Tensor:
    eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
    router: Tensor = torch.linalg.solve((g + RIDGE * eye).T, q.T).T
    return router


def _sequential(stats: GramStats, up: Tensor, rank: int) -> Tensor:
    """One layer as the published algorithm solves and absorbs it."""
    gram = stats.gram.to(up.device, torch.float64)
    return up @ _general(*_terms(gram, rank, float(stats.tokens.sum())))
