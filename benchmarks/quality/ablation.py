"""What each choice of SSR does: one choice changed at a time, on the preservation protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ssr_core import ANCHORS, PaperMerge, SampleOptions, SSRMerge

from .case import Case, Sampling
from .methods import Method, engine, sampling_of
from .protocols import preservation
from .records import Record
from .world.building import World

FEW = 64
"""Sampled tokens where something else is varied: a sixteenth of the solve's time."""


def variants(sampling: Sampling) -> dict[str, Method]:
    """Solve settings, from one calibration."""
    few = replace(sampling, sample=SampleOptions(FEW))
    found: dict[str, Method] = {}
    for tokens in (None, 16, 64, 256):
        sample = None if tokens is None else SampleOptions(tokens)
        found[f"{tokens or 'no'} sampled tokens"] = engine(SSRMerge(), replace(sampling, sample=sample))
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
    sampling = replace(sampling, sample=SampleOptions(FEW))
    for steps, used in ((1, None), (2, None), (4, None), (8, 1), (8, 2), (8, None)):
        text = f"{steps} steps" + (f", first {used}" if used else "")
        found[text] = engine(own, replace(sampling, steps=steps, used=used))
    for images in (1, 2):
        found[f"{images} x 64 image tokens a step"] = engine(own, replace(sampling, images=images))
    found["other noise for each LoRA"] = engine(own, replace(sampling, noise="other"))
    return found


def ablation(world: World, seeds: Sequence[int]) -> Iterator[Record]:
    """Solve settings."""
    yield from preservation(
        world, variants(sampling_of(world)), world.scale.ablation_ks, seeds, table="ablation: solve"
    )


def steps_and_tokens(world: World, seeds: Sequence[int]) -> Iterator[Record]:
    """What calibration sees (Appendix G)."""
    yield from preservation(
        world, data(sampling_of(world)), world.scale.ablation_ks, seeds, table="ablation: calibration data"
    )


WORDINGS = ("{}; photo", "{}; nice picture of", "{}; drawing of")


def worded(texts: Sequence[str], sampling: Sampling) -> Method:
    """The default, calibrated on other words than those that it is judged by."""

    def run(case: Case) -> dict[str, object]:
        prompts = tuple(tuple(text.format(one.prompt) for text in texts) for one in case.loras)
        return engine(SSRMerge(), replace(sampling, prompts=prompts, sample=SampleOptions(FEW)))(case)

    return run


def wording(world: World, seeds: Sequence[int]) -> Iterator[Record]:
    """Prompt wording and several prompts (Tables 9 and 10); the deviation over seeds stands in every table."""
    beside = "{}, red circle"
    methods = {text.format("[V] noun"): worded((text,), sampling_of(world)) for text in ("{}", *WORDINGS, beside)}
    methods["three wordings"] = worded(WORDINGS, sampling_of(world))
    methods["alone and beside another object"] = worded(("{}", beside), sampling_of(world))
    yield from preservation(world, methods, world.scale.ablation_ks, seeds, table="calibration prompts")
