"""What each choice of SSR does: one choice changed at a time, on the preservation protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from ssr_core import ANCHORS, PaperMerge, SampleOptions, SSRMerge
from ssr_core.words import number_of

from .baselines import dare, firm_regmean, knots_ties, regmean, ties_merge
from .case import Case, Sampling
from .methods import Method, engine, layerwise

FEW = 64
"""Sampled tokens where anchors are varied."""


def solve(sampling: Sampling) -> dict[str, Method]:
    """Solve settings."""
    few = replace(sampling, sample=SampleOptions(FEW))
    found: dict[str, Method] = {}
    for tokens in (None, 16, 64, 256):
        sample = None if tokens is None else SampleOptions(tokens)
        found[f"{tokens or 'no'} sampled tokens"] = engine(SSRMerge(), replace(sampling, sample=sample))
    for tokens in (256, 16):
        for ridge in (0.001, 0.1, 0.3, 1.0):
            method = engine(SSRMerge(ridge=ridge), replace(sampling, sample=SampleOptions(tokens)))
            found[f"{tokens} sampled tokens, ridge {ridge:g}"] = method
    for least in (1.0, 0.01):
        found[f"256 sampled tokens, least ridge {least:g}"] = engine(SSRMerge(refine_ridge=least), sampling)
    found["zero anchor, 64 sampled tokens"] = engine(SSRMerge(anchor="zero"), few)
    found["average anchor, 64 sampled tokens"] = engine(SSRMerge(anchor="average"), few)
    for anchor in ANCHORS:
        for ridge in (0.1, 0.01, 0.001):
            found[f"anchor {anchor}, ridge {ridge:g}, not refined"] = engine(
                SSRMerge(anchor=anchor, ridge=ridge, refine=False), sampling
            )
    found["not balanced, not refined"] = engine(SSRMerge(balance=False, refine=False), sampling)
    found["paper (no canonical coordinates, absolute ridge)"] = engine(PaperMerge(), sampling)
    return found


def data(sampling: Sampling) -> dict[str, Method]:
    """Steps, how many of them are used, pictures, noise."""
    own, found = SSRMerge(), {}
    for steps, used in ((1, None), (2, None), (4, None), (8, 1), (8, 2), (8, None)):
        text = number_of(steps, "step") + (f", first {used}" if used else "")
        found[text] = engine(own, replace(sampling, steps=steps, used=used))
    for images in (1, 2):
        found[f"{images} x 64 image tokens a step"] = engine(own, replace(sampling, images=images))
    found["other noise for each LoRA"] = engine(own, replace(sampling, noise="other"))
    found["16 x 64 image tokens a step"] = engine(own, replace(sampling, images=16))
    for tokens in (512, 1024):
        found[f"{tokens} sampled tokens"] = engine(own, replace(sampling, sample=SampleOptions(tokens)))
    for steps, rounds in ((8, 2), (4, 2), (4, 3), (2, 2)):
        found[f"{steps} steps, {rounds} rounds"] = engine(own, replace(sampling, steps=steps, rounds=rounds))
    for rounds, tokens in ((2, 256), (2, 128), (4, 256), (4, 64)):
        shared = replace(sampling, steps=4, rounds=rounds, shared=True, sample=SampleOptions(tokens))
        found[f"4 steps, shared by {rounds} rounds, {tokens} sampled tokens in each"] = engine(own, shared)
    half = replace(sampling, steps=4, rounds=2, sample=SampleOptions(128))
    found["4 steps, 2 rounds, 128 sampled tokens in each"] = engine(own, half)
    return found


def neutral(sampling: Sampling) -> dict[str, Method]:
    """How many neutral prompts, and how much they count."""
    found = {"none": engine(SSRMerge(), sampling)}
    for number, weights in ((1, (0.05, 0.2)), (4, (0.02, 0.05, 0.2, 1.0)), (8, (0.02, 0.05, 0.2))):
        for weight in weights:
            method = engine(SSRMerge(neutral_weight=weight), replace(sampling, neutral=number))
            found[f"{number} of weight {weight:g}"] = method
    return found


def scales(sampling: Sampling) -> dict[str, Method]:
    """The settings of other methods: how much of their merge is added, and RegMean's off-diagonals."""
    found: dict[str, Method] = {}
    for scale in (1.0, 1.5):
        found[f"TIES, density 0.2, scale {scale:g}"] = layerwise(partial(ties_merge, scale=scale, density=0.2))
    for scale in (0.2, 0.5):
        found[f"DARE, density 0.2, scale {scale:g}"] = layerwise(partial(dare, scale=scale, density=0.2))
    for scale in (0.5, 1.0, 1.5, 2.0):
        found[f"TIES, scale {scale:g}"] = layerwise(partial(ties_merge, scale=scale))
        found[f"KnOTS+TIES, scale {scale:g}"] = layerwise(partial(knots_ties, scale=scale))
    for scale in (0.2, 0.35, 0.5, 1.0):
        found[f"DARE, scale {scale:g}"] = layerwise(partial(dare, scale=scale))
    for kept in (0.5, 0.9, 0.97, 0.99):
        found[f"RegMean, off-diagonals by {kept:g}"] = layerwise(partial(regmean, kept=kept), sampling)
    return found


WORDINGS = ("{}; photo", "{}; nice picture of", "{}; drawing of")


WORDED: dict[str, Callable[[Sampling], Method]] = {
    "": lambda sampling: engine(SSRMerge(), sampling),
    " (four neutral prompts)": lambda sampling: engine(SSRMerge(), replace(sampling, neutral=4)),
    " (least ridge 0.01)": lambda sampling: engine(SSRMerge(refine_ridge=0.01), sampling),
    " (without refinement)": lambda sampling: engine(SSRMerge(refine=False), sampling),
    " (RegMean, off-diagonals by 0.97)": lambda sampling: layerwise(firm_regmean, sampling),
}
"""What is calibrated on other words, by what its rows are called."""


def worded(texts: Sequence[str], sampling: Sampling, method: Callable[[Sampling], Method]) -> Method:
    """A method, calibrated on other words than those that it is judged by."""

    def run(case: Case) -> dict[str, Tensor]:
        prompts = tuple(tuple(text.format(one.prompt) for text in texts) for one in case.loras)
        return method(replace(sampling, prompts=prompts))(case)

    return run


def wording(sampling: Sampling) -> dict[str, Method]:
    """Prompt wording and several prompts (Tables 9 and 10); the deviation over seeds stands in every table."""
    beside, other = "{}, red circle", "{}; nice picture of"
    methods: dict[str, Method] = {}
    for name, method in WORDED.items():
        for text in ("{}", *((other,) if name else WORDINGS), beside):
            methods[text.format("[V] noun") + name] = worded((text,), sampling, method)
    ours = WORDED[""]
    methods["three wordings"] = worded(WORDINGS, sampling, ours)
    methods["alone and beside another object"] = worded(("{}", beside), sampling, ours)
    return methods
