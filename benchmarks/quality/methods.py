"""Every compared way to merge, under one signature: a case in, dense changes by module path out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ssr_core import AverageMerge, GainsMerge, MergeMethod, PaperMerge, SSRMerge, SumMerge, merge

from .baselines import LayerMerge, dare, knots_ties, regmean, ties_merge
from .case import Case, Sampling
from .iteris import iteris

Method = Callable[[Case], dict[str, Tensor]]


def engine(method: MergeMethod, sampling: Sampling) -> Method:
    """A method of the engine's registry."""

    def run(case: Case) -> dict[str, Tensor]:
        calibration = case.calibration(sampling) if method.needs_calibration else None
        layers = merge(case.tasks, method, calibration, dtype=torch.float32).layers
        return {target.module_path: layer.delta(torch.float32) for target, layer in layers.items()}

    return run


def layerwise(one: LayerMerge, sampling: Sampling) -> Method:
    """A method that sees one layer's changes and, maybe, its inputs' second moments."""

    def run(case: Case) -> dict[str, Tensor]:
        deltas = case.deltas
        grams = case.input_grams(sampling) if one is regmean else None
        return {path: one([d[path] for d in deltas], [g[path] for g in grams] if grams else []) for path in deltas[0]}

    return run


def compared(sampling: Sampling) -> dict[str, Method]:
    """All rows of the tables but the single LoRA."""
    return {
        "average": engine(AverageMerge(), sampling),
        "sum": engine(SumMerge(), sampling),
        "gains": engine(GainsMerge(), sampling),
        "TIES": layerwise(ties_merge, sampling),
        "DARE": layerwise(dare, sampling),
        "KnOTS+TIES": layerwise(knots_ties, sampling),
        "RegMean": layerwise(regmean, sampling),
        "IterIS": lambda case: iteris(case, sampling),
        "SSR (paper)": engine(PaperMerge(), sampling),
        "SSR": engine(SSRMerge(), sampling),
    }
