"""IterIS (Chen et al., CVPR 2025), from its paper's equations, with the settings of the authors' published runs.

    W = sum_i l_i dW_i X_i^T Y_i (sum_i l_i Y_i^T Y_i)^-1,   l_i = |W0 + dW_i|^2 / |(W0 + dW_i) X_i|^2

X_i are a layer's inputs with LoRA i alone, Y_i those with the current merged change in place, on the same noisy
pictures, row by row; the first round has Y = X. Both products get a small multiple of the identity, relative to
their Frobenius norm. No weights but the LoRAs' changes are merged.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from .case import Case, Sampling
from .world.loras import reading, with_deltas

ROUNDS, RIDGE = 10, 1e-4
"""Iterations, and the share of the norm on the diagonal: of the authors' settings (6 to 24, 1e-7 to 1e-4)."""

Sums = dict[str, Tensor]


def iteris(case: Case, sampling: Sampling, rounds: int = ROUNDS) -> Sums:
    """Merged changes by module path."""
    change: Sums | None = None
    for _ in range(rounds):
        change = _round(case, sampling, change)
    assert change is not None
    return change


def _round(case: Case, sampling: Sampling, change: Sums | None) -> Sums:
    merged = None if change is None else with_deltas(case.base, change)
    left: Sums = {}
    right: Sums = {}
    for index, (single, deltas) in enumerate(zip(case.singles, case.deltas, strict=True)):
        cross, own, energy = _moments(case, sampling, index, single, merged)
        for path, delta in deltas.items():
            weight = single.get_submodule(path).weight
            trust = weight.double().square().sum() / energy[path].clamp_min(1e-12)
            left[path] = left.get(path, 0) + trust * delta.double() @ _regular(cross[path])
            right[path] = right.get(path, 0) + trust * _regular(own[path])
    return {path: torch.linalg.solve(right[path].T, left[path].T).T.float() for path in left}


def _moments(
    case: Case, sampling: Sampling, index: int, single: nn.Module, merged: nn.Module | None
) -> tuple[Sums, Sums, Sums]:
    """X^T Y, Y^T Y and |(W0 + dW) X|^2 of every layer, over one LoRA's passes."""
    cross: Sums = {}
    own: Sums = {}
    energy: Sums = {}
    for words, noise in case.starts(index, sampling):
        x, times = noise, torch.linspace(0, 1, sampling.steps + 1)
        for now, then in itertools.pairwise(times):
            at = now.expand(len(x))
            with torch.no_grad():
                with reading(single) as alone:
                    velocity = single(x, at, words)
                    read = dict(alone)
                if merged is not None:
                    with reading(merged) as together:
                        merged(x, at, words)
                        met = dict(together)
                else:
                    met = read
            for path, rows in read.items():
                weight = single.get_submodule(path).weight
                cross[path] = cross.get(path, 0) + (rows.T @ met[path]).double()
                own[path] = own.get(path, 0) + (met[path].T @ met[path]).double()
                energy[path] = energy.get(path, 0) + (rows @ weight.T).square().sum().double()
            x = x + (then - now) * velocity
    return cross, own, energy


def _regular(moments: Tensor) -> Tensor:
    return moments + RIDGE * moments.norm() * torch.eye(len(moments), dtype=moments.dtype)
