"""IterIS (Chen et al., CVPR 2025), written from the paper's equations: dense least squares, iterated.

    W = sum_i l_i (dW_i X_i Y_i^T) (sum_i l_i Y_i Y_i^T)^-1,   l_i = 1 / |dW_i X_i|^2

X_i are a layer's inputs with LoRA i alone, Y_i those with the current merged change in place. Here W
is the merged change, on the same noise and prompts; Gram off-diagonals are scaled as in RegMean. The
first round has Y = X.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Case, Sampling
from .world.loras import reading, with_deltas

ROUNDS, KEPT = 3, 0.9
"""Iterations, and the share of the off-diagonals that the regularisation keeps."""


def iteris(case: Case, sampling: Sampling, rounds: int = ROUNDS) -> dict[str, Tensor]:
    """Merged changes by module path."""
    change: dict[str, Tensor] | None = None
    for _ in range(rounds):
        change = _round(case, sampling, change)
    assert change is not None
    return change


def _round(case: Case, sampling: Sampling, change: dict[str, Tensor] | None) -> dict[str, Tensor]:
    merged = None if change is None else with_deltas(case.base, change)
    left: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    for index, (single, deltas) in enumerate(zip(case.singles, case.deltas, strict=True)):
        wanted: dict[str, Tensor] = {}
        grams: dict[str, Tensor] = {}
        energy: dict[str, Tensor] = {}
        with reading(single) as alone, reading(merged or single) as together:
            runs = case.passes(single, index, sampling)
            others = iter(()) if merged is None else case.passes(merged, index, sampling)
            for _ in runs:
                next(others, None)
                for path, delta in deltas.items():
                    y, output = together[path], alone[path] @ delta.T
                    wanted[path] = wanted.get(path, 0) + (output.T @ y).double()
                    grams[path] = grams.get(path, 0) + (y.T @ y).double()
                    energy[path] = energy.get(path, 0) + output.square().sum().double()
        for path in deltas:
            weight = 1 / energy[path].clamp_min(1e-12)
            small = KEPT * grams[path] + (1 - KEPT) * torch.diag(grams[path].diagonal())
            left[path] = left.get(path, 0) + weight * wanted[path]
            right[path] = right.get(path, 0) + weight * small
    return {
        path: torch.linalg.solve(right[path], left[path].T).T.float()
        if _regular(right[path])
        else (left[path] @ torch.linalg.pinv(right[path], hermitian=True)).float()
        for path in left
    }


def _regular(gram: Tensor) -> bool:
    values = torch.linalg.eigvalsh(gram)
    return bool(values[0] > 1e-10 * values[-1])
