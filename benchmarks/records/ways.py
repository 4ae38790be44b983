"""Ways to keep a layer's second moments in a given number of columns; all in half precision."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ssr_core import InputMoments
from ssr_core.signals.factor import InputFactor, factorise
from ssr_core.signals.recorder import _half

from .world import GramOf, World

Make = Callable[[Tensor, Tensor, Tensor, int, torch.Generator], Tensor]
"""(X (N, d), C (d, d), own rows (r, d), columns, generator) -> F (d, columns), C ~ F F^T."""


def uniform(x: Tensor, c: Tensor, own: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """Tokens drawn alike."""
    chosen = torch.randperm(len(x), generator=generator)[:columns]
    return x[chosen].T * math.sqrt(len(x) / len(chosen))


def _drawn(x: Tensor, weights: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    shares = weights / weights.sum()
    chosen = torch.multinomial(shares, columns, replacement=True, generator=generator)
    return (x[chosen] / (columns * shares[chosen]).sqrt()[:, None]).T


def leverage(x: Tensor, c: Tensor, own: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """Tokens drawn by ridge leverage scores; they need a second pass."""
    ridge = float(c.trace()) / columns * torch.eye(len(c)).to(c)
    return _drawn(x, (x @ torch.linalg.inv(c + ridge) * x).sum(dim=1), columns, generator)


def projection(x: Tensor, c: Tensor, own: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """Random combinations of all tokens."""
    return (torch.randn(columns, len(x), generator=generator).to(x) / math.sqrt(columns) @ x).T


def nystroem(x: Tensor, c: Tensor, own: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """C Omega with a random Omega, as moments.py keeps it for OSRM."""
    omega = torch.randn(len(c), columns, generator=generator).to(c)
    core = omega.T @ c @ omega
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    keep = values > 1e-10 * values[-1]
    return c @ omega @ (vectors[:, keep] / values[keep].sqrt())


@functools.cache
def _eigh(c: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(c)
    return values, vectors


def best(x: Tensor, c: Tensor, own: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """The leading eigenvectors: no sketch of this rank is closer to C; needs C itself."""
    values, vectors = _eigh(c)
    return vectors[:, -columns:] * values[-columns:].clamp_min(0).sqrt()


def engine(x: Tensor, c: Tensor, own: Tensor, columns: int, generator: torch.Generator) -> InputFactor:
    """What a record keeps: the LoRA's own rows and random columns."""
    random = torch.randn(len(c), columns, generator=generator).to(c) / len(c) ** 0.5
    omega = torch.cat([own.T, random], dim=1)
    return factorise(InputMoments(c @ omega, float(c.trace()), float(len(x))), omega, own)


def _as_factor(dense: Tensor, trace: float) -> InputFactor:
    norms = dense.norm(dim=0).clamp_min(1e-300)
    return InputFactor(dense / norms, norms, 0, trace, 1.0)


def gram_of(world: World, make: Make, columns: int, even: bool) -> GramOf:
    """Grams from one way; `even` spreads what is missing over all directions but the LoRA's own."""
    kept: dict[tuple[int, str], InputFactor] = {}

    def gram(task: int, path: str, rows: Tensor, own: Tensor) -> Tensor:
        c = world.moments[task][path]
        if (task, path) not in kept:
            generator = torch.Generator().manual_seed(7 * task + len(path))
            made = make(world.inputs[task][path], c, own, columns, generator)
            factor = made if isinstance(made, InputFactor) else _as_factor(made, float(c.trace()))
            kept[(task, path)] = _half(factor)
        factor = kept[(task, path)]
        if even:
            return factor.gram_of(rows, own)
        seen = rows @ factor.dense
        return seen @ seen.T

    return gram


WAYS: Mapping[str, tuple[Make, bool]] = {
    "tokens, drawn alike": (uniform, False),
    "tokens, by leverage": (leverage, False),
    "random projection over tokens": (projection, False),
    "Nystroem": (nystroem, False),
    "Nystroem, rest even": (nystroem, True),
    "best of this rank, rest even": (best, True),
    "own rows + Nystroem": (engine, False),  # type: ignore[dict-item]
    "own rows + Nystroem, rest even": (engine, True),  # type: ignore[dict-item]
}
"""The last one is the engine's. Those of tokens do not know the trace of C; nothing is spread there."""

CHOSEN = "own rows + Nystroem, rest even"


def curves(world: World, sizes: tuple[int, ...]) -> list[dict[str, object]]:
    """Error over size, for every way."""
    rows: list[dict[str, object]] = []
    for name, (make, even) in WAYS.items():
        for columns in sizes:
            found = world.judge(partial(gram_of(world, make, columns, even)))
            print(f"{name}, {columns} columns", flush=True)
            ratio = found.error / world.exact[0]
            rows.append({"way": name, "columns": columns, "error_ratio": ratio, "router_error": found.router})
    return rows
