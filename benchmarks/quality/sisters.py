"""Tables of the sister methods: NP-LoRA on subject and style, LoRAs from OSRM's start."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from ssr_core import SSRMerge, SumMerge

from .baselines import ties_merge
from .case import Case
from .methods import Method, engine, layerwise, sampling_of
from .protocols import merged, subject_scores
from .records import Record
from .scores import pictures, success
from .world.building import World
from .world.captions import caption
from .world.judge import STYLE_NAMES, crops, shows
from .world.scenes import Thing


def starts(world: World, seeds: Sequence[int]) -> Iterator[Record]:
    """The same subjects, trained from a random down and from OSRM's, under the same merges."""
    sampling = sampling_of(world)
    methods = {
        "sum": engine(SumMerge(), sampling),
        "TIES": layerwise(ties_merge, sampling),
        "SSR (ours)": engine(SSRMerge(), sampling),
    }
    for group, kind in ((world.subjects[: len(world.osrm)], "ordinary"), (world.osrm, "OSRM")):
        for seed in seeds:
            case = Case(world.base, group, seed)
            for name, model in merged(case, methods, single=True):
                for metric, value in subject_scores(world, case, model).items():
                    yield Record("OSRM start", f"{name}, {kind} start", len(group), metric, seed, value)


def styled(world: World, methods: Mapping[str, Method], seeds: Sequence[int], pairs: int = 4) -> Iterator[Record]:
    """A subject in a style: content, style, both."""
    return _styled(world, methods, seeds, pairs, 1, "subject and style")


def crowd_styled(world: World, methods: Mapping[str, Method], seeds: Sequence[int], sets: int = 3) -> Iterator[Record]:
    """Two subjects in a style; the scores are shares of objects."""
    return _styled(world, methods, seeds, sets, 2, "two subjects and a style")


def _styled(
    world: World, methods: Mapping[str, Method], seeds: Sequence[int], sets: int, contents: int, table: str
) -> Iterator[Record]:
    for seed in seeds:
        chooser = random.Random(800 + seed)
        values: dict[str, list[tuple[float, float, float]]] = {}
        for _ in range(sets):
            first = chooser.choice(list(world.subjects))
            subjects = [first, *chooser.sample([one for one in world.subjects if one is not first], contents - 1)]
            style = chooser.choice(list(world.styles))
            assert style.style is not None
            prompt = caption([one.prompt for one in subjects], style.style.words)
            case = Case(world.base, [*subjects, style], seed, (prompt,))
            things = [one.subject.thing for one in subjects if one.subject]
            for name, model in merged(case, methods):
                assert model is not None
                (found,) = pictures(model, [prompt], world.scale.samples, 51 * seed)
                values.setdefault(name, []).append(_styled_scores(world, found, things, style.style.name))
        for name, found_values in values.items():
            for i, metric in enumerate(("content", "style", "both")):
                yield Record(table, name, contents + 1, metric, seed, fmean(v[i] for v in found_values))


def _styled_scores(world: World, found: Tensor, things: Sequence[Thing], style: str) -> tuple[float, float, float]:
    """Shares of objects with the right look, with the right style, with both."""
    both = success(world.judge, found, things, style).float().mean()
    places = [world.judge.look_at(place) for place in crops(found, len(things))]
    content = [
        shows(seen, [thing] * len(found), any_style=True).float() for seen, thing in zip(places, things, strict=True)
    ]
    painted = [(seen.style == STYLE_NAMES.index(style)).float() for seen in places]
    return float(torch.stack(content).mean()), float(torch.stack(painted).mean()), float(both)
