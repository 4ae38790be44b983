"""Every compared way to merge, under one signature: a case in, dense changes by module path out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ssr_core import (
    AverageMerge,
    GainsMerge,
    MergeMethod,
    NPLoRAMerge,
    PaperMerge,
    SampleOptions,
    SSRMerge,
    SumMerge,
    merge,
)
from ssr_core.scenes import JOINT_WEIGHT, NEUTRAL_WEIGHT

from .baselines import LayerMerge, dare, firm_regmean, knots_ties, least_squares, regmean, ties_merge
from .case import Case, Sampling
from .iteris import iteris
from .world.building import Scale

Method = Callable[[Case], dict[str, Tensor]]


def engine(method: MergeMethod, sampling: Sampling) -> Method:
    """A method of the engine's registry."""

    def run(case: Case) -> dict[str, Tensor]:
        calibration = case.calibration(sampling) if method.needs_calibration else None
        layers = merge(case.tasks, method, calibration, dtype=torch.float32, judge=False).layers
        return {target.module_path: layer.delta(torch.float32) for target, layer in layers.items()}

    return run


def layerwise(one: LayerMerge, sampling: Sampling | None = None) -> Method:
    """A method that sees one layer's changes and, given a sampling, its inputs' second moments."""

    def run(case: Case) -> dict[str, Tensor]:
        deltas = case.deltas
        grams = None if sampling is None else case.input_grams(sampling)
        return {path: one([d[path] for d in deltas], [g[path] for g in grams] if grams else []) for path in deltas[0]}

    return run


def with_joint(one: LayerMerge, sampling: Sampling, weight: float = JOINT_WEIGHT) -> Method:
    """The same with the joint prompts' inputs, on which the sum of all changes is wanted; they count as in SSR."""

    def run(case: Case) -> dict[str, Tensor]:
        deltas, grams, more = case.deltas, case.input_grams(sampling), case.joint_grams(sampling)
        share = weight * len(deltas)

        def merged(path: str) -> Tensor:
            own = [d[path] for d in deltas]
            total = torch.stack(own).sum(0)
            return one([*own, *(total for _ in more)], [*(g[path] for g in grams), *(share * g[path] for g in more)])

        return {path: merged(path) for path in deltas[0]}

    return run


def with_neutral(one: LayerMerge, sampling: Sampling, weight: float = NEUTRAL_WEIGHT) -> Method:
    """The same with neutral prompts' inputs, on which no change is wanted, counting together as much as in SSR."""

    def run(case: Case) -> dict[str, Tensor]:
        deltas, grams, more = case.deltas, case.input_grams(sampling), case.neutral_grams(sampling)
        share = weight * len(deltas) / len(more)

        def merged(path: str) -> Tensor:
            own, none = [d[path] for d in deltas], torch.zeros_like(deltas[0][path])
            return one([*own, *(none for _ in more)], [*(g[path] for g in grams), *(share * g[path] for g in more)])

        return {path: merged(path) for path in deltas[0]}

    return run


def sampling_of(scale: Scale) -> Sampling:
    """What all methods that need data get to see: whole sampling runs."""
    return Sampling(steps=scale.calibration_steps, images=scale.images)


def compared(sampling: Sampling) -> dict[str, Method]:
    """All rows of the tables but the single LoRA."""
    return {
        "average": engine(AverageMerge(), sampling),
        "sum": engine(SumMerge(), sampling),
        "best scalar gains": engine(GainsMerge(), sampling),
        "TIES": layerwise(ties_merge),
        "DARE": layerwise(dare),
        "DARE, scale 0.5": layerwise(partial(dare, scale=0.5)),
        "KnOTS+TIES": layerwise(knots_ties),
        "RegMean": layerwise(regmean, sampling),
        "RegMean, off-diagonals by 0.97": layerwise(firm_regmean, sampling),
        "IterIS": lambda case: iteris(case, sampling),
        "dense least squares": layerwise(least_squares, sampling),
        "SSR (paper)": engine(PaperMerge(), replace(sampling, used=1)),
        "SSR (paper's formula, our data)": engine(PaperMerge(), sampling),
        "SSR (ours, without refinement)": engine(SSRMerge(refine=False), sampling),
        "SSR (ours)": engine(SSRMerge(), sampling),
    }


def told(sampling: Sampling) -> dict[str, Method]:
    """Methods that also see the prompt that shows all of the LoRAs."""
    joint = replace(sampling, joint=True)
    return {
        "RegMean, off-diagonals by 0.97, joint prompt": with_joint(firm_regmean, sampling),
        "RegMean, off-diagonals by 0.97, joint prompt of weight 4": with_joint(firm_regmean, sampling, 4),
        "RegMean, off-diagonals by 0.97, joint prompt of weight 16": with_joint(firm_regmean, sampling, 16),
        "SSR (ours, joint prompt, without refinement)": engine(SSRMerge(refine=False), joint),
        "SSR (ours, joint prompt)": engine(SSRMerge(), joint),
        "SSR (ours, joint prompt of weight 4)": engine(SSRMerge(joint_weight=4), joint),
        "SSR (ours, joint prompt of weight 16)": engine(SSRMerge(joint_weight=16), joint),
        "SSR (ours, joint and four neutral prompts)": engine(SSRMerge(), replace(joint, neutral=4)),
        "SSR (ours, two rounds, joint prompt)": engine(SSRMerge(), replace(joint, rounds=2)),
        "SSR (ours, two rounds, joint prompt of weight 4)": engine(SSRMerge(joint_weight=4), replace(joint, rounds=2)),
    }


def careful(sampling: Sampling) -> dict[str, Method]:
    """Methods that also see prompts that name no LoRA, or the merged model."""
    four, twice = replace(sampling, neutral=4), replace(sampling, rounds=2)
    return {
        "RegMean, four neutral prompts": with_neutral(regmean, four),
        "RegMean, off-diagonals by 0.97, four neutral prompts": with_neutral(firm_regmean, four),
        "SSR (ours, four neutral prompts)": engine(SSRMerge(), four),
        "SSR (ours, two rounds)": engine(SSRMerge(), twice),
        "SSR (ours, two rounds, four neutral prompts)": engine(SSRMerge(), replace(four, rounds=2)),
        "SSR (ours, two rounds, up to 1024 sampled tokens, ridge 0.1)": engine(
            SSRMerge(ridge=0.1), replace(twice, sample=SampleOptions(1024))
        ),
    }


def started(sampling: Sampling) -> dict[str, Method]:
    """What LoRAs from different starts are merged with."""
    every = compared(sampling)
    return {name: every[name] for name in ("sum", "TIES", "SSR (ours)")}


def quick(methods: dict[str, Method]) -> dict[str, Method]:
    """For many LoRAs: IterIS' rounds would take longer than everything else."""
    return {name: method for name, method in methods.items() if name != "IterIS"}


def protecting(sampling: Sampling) -> dict[str, Method]:
    """NP-LoRA for pairs of a subject and a style, over mu and both ways to choose directions."""
    found = {f"NP-LoRA, mu {mu:g}": engine(NPLoRAMerge(mu=mu), sampling) for mu in (0.25, 0.5, 1.0, 4.0)}
    found["NP-LoRA, hard"] = engine(NPLoRAMerge(hard=True), sampling)
    found["NP-LoRA, mu 0.5, half the energy"] = engine(NPLoRAMerge(energy=0.5), sampling)
    found["NP-LoRA, mu 0.5, half the energy, by activations"] = engine(
        NPLoRAMerge(energy=0.5, directions="activations"), sampling
    )
    return found


def protecting_several(sampling: Sampling) -> dict[str, Method]:
    """NP-LoRA for several subjects and a style that comes last: which side is protected, and how much."""
    return {
        "NP-LoRA, style protected, mu 0.5": engine(NPLoRAMerge(), sampling),
        "NP-LoRA, style protected, hard": engine(NPLoRAMerge(hard=True), sampling),
        "NP-LoRA, subjects protected, mu 0.5": engine(NPLoRAMerge(protected=(0, 1)), sampling),
        "NP-LoRA, subjects protected, hard": engine(NPLoRAMerge(protected=(0, 1), hard=True), sampling),
    }
