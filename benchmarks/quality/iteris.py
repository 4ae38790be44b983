"""IterIS (Chen et al., CVPR 2025), from its paper's equations, with the settings of the authors' published runs.

    W = sum_i l_i dW_i X_i^T Y_i (sum_i l_i Y_i^T Y_i)^-1,   l_i = |W0 + dW_i|^2 / |(W0 + dW_i) X_i|^2

X_i are a layer's inputs with LoRA i alone, Y_i those with the current merged change in place, on the same noisy
pictures, row by row; the first round has Y = X. Both products get a small multiple of the identity, relative to
their Frobenius norm. No weights but the LoRAs' changes are merged.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .case import Case, Sampling
from .world.loras import reading, with_deltas

ROUNDS, RIDGE = 10, 1e-4
"""Iterations, and the share of the norm on the diagonal: of the authors' settings (6 to 24, 1e-7 to 1e-4)."""

Sums = dict[str, Tensor]


def iteris(case: Case, sampling: Sampling, rounds: int = ROUNDS) -> Sums:
    """Merged changes by module path."""
    passes = [_alone(case, sampling, index) for index in range(len(case.loras))]
    change: Sums | None = None
    for _ in range(rounds):
        change = _round(case, passes, change)
    assert change is not None
    return change


def _round(case: Case, passes: Sequence[_Alone], change: Sums | None) -> Sums:
    merged = None if change is None else with_deltas(case.base, change)
    left: Sums = {}
    right: Sums = {}
    for single, deltas, alone in zip(case.singles, case.deltas, passes, strict=True):
        cross, own = _moments(alone, merged)
        for path, delta in deltas.items():
            weight = single.get_submodule(path).weight
            trust = weight.double().square().sum() / alone.energy[path].clamp_min(1e-12)
            left[path] = left.get(path, 0) + trust * delta.double() @ _regular(cross[path])
            right[path] = right.get(path, 0) + trust * _regular(own[path])
    return {path: torch.linalg.solve(right[path].T, left[path].T).T.float() for path in left}


@dataclass(frozen=True)
class _Alone:
    """One LoRA's passes.

    Attributes:
        calls: What the model was asked at each step: pictures, times, words.
        inputs: What each layer was fed there, (tokens, in) by module path.
        energy: |(W0 + dW) X|^2 of each layer over all steps.
    """

    calls: list[tuple[Tensor, Tensor, Tensor]]
    inputs: list[dict[str, Tensor]]
    energy: Sums


def _alone(case: Case, sampling: Sampling, index: int) -> _Alone:
    """The same in every round, so that it runs once."""
    model, times = case.singles[index], torch.linspace(0, 1, sampling.steps + 1)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    read: list[dict[str, Tensor]] = []
    energy: Sums = {}
    for words, x in case.starts(index, sampling):
        for now, then in itertools.pairwise(times):
            calls.append((x, now.expand(len(x)), words))
            with torch.no_grad(), reading(model) as inputs:
                x = x + (then - now) * model(*calls[-1])
            read.append(dict(inputs))
            for path, rows in inputs.items():
                out = (rows @ model.get_submodule(path).weight.T).square().sum().double()
                energy[path] = energy.get(path, 0) + out
    return _Alone(calls, read, energy)


def _moments(alone: _Alone, merged: nn.Module | None) -> tuple[Sums, Sums]:
    """X^T Y and Y^T Y of every layer, over one LoRA's passes."""
    cross: Sums = {}
    own: Sums = {}
    for call, read in zip(alone.calls, alone.inputs, strict=True):
        met = read
        if merged is not None:
            with torch.no_grad(), reading(merged) as together:
                merged(*call)
            met = dict(together)
        for path, rows in read.items():
            cross[path] = cross.get(path, 0) + (rows.T @ met[path]).double()
            own[path] = own.get(path, 0) + (met[path].T @ met[path]).double()
    return cross, own


def _regular(moments: Tensor) -> Tensor:
    return moments + RIDGE * moments.norm() * torch.eye(len(moments), dtype=moments.dtype)
