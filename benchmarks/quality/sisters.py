"""Tables of the sister methods: NP-LoRA on subject and style, LoRAs from OSRM's start."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from .case import Case
from .methods import Method
from .protocols import OWN_DISTANCE, merged, own_distance, subject_scores
from .records import Record
from .scores import pictures, success
from .world.building import World
from .world.captions import caption
from .world.judge import STYLE_NAMES, crops, shows
from .world.scenes import Thing

SETS = 4
"""Sets of LoRAs in a run."""


def starts(world: World, methods: Mapping[str, Method], ks: Sequence[int], seeds: Sequence[int]) -> Iterator[Record]:
    """The same subjects, trained from a random down and from OSRM's, under the same merges."""
    for k, seed in itertools.product(ks, seeds):
        for group, kind in ((world.subjects[:k], "ordinary"), (world.osrm[:k], "OSRM")):
            case = Case(world.base, group, seed)
            for name, model in merged(case, methods, single=True):
                for metric, value in subject_scores(world, case, model).items():
                    yield Record("OSRM start", f"{name}, {kind} start", k, metric, seed, value)


def styled(
    world: World, methods: Mapping[str, Method], ks: Sequence[int], seeds: Sequence[int], table: str
) -> Iterator[Record]:
    """Subjects in a style, which is the last LoRA: shares of objects with the right look, style, both."""
    for k, seed in itertools.product(ks, seeds):
        chooser = random.Random(800 + seed)
        values: dict[str, list[dict[str, float]]] = {}
        for _ in range(SETS):
            first = chooser.choice(list(world.subjects))
            subjects = [first, *chooser.sample([one for one in world.subjects if one is not first], k - 2)]
            style = chooser.choice(list(world.styles))
            assert style.style is not None
            prompt = caption([one.prompt for one in subjects], style.style.words)
            case = Case(world.base, [*subjects, style], seed, (prompt,))
            things = [one.subject.thing for one in subjects if one.subject]
            for name, model in merged(case, methods):
                assert model is not None
                (found,) = pictures(model, [prompt], world.scale.samples, 51 * seed)
                scores = _styled_scores(world, found, things, style.style.name)
                values.setdefault(name, []).append(scores | {OWN_DISTANCE: own_distance(case, model)})
        for name, found_values in values.items():
            for metric in found_values[0]:
                yield Record(table, name, k, metric, seed, fmean(one[metric] for one in found_values))


def _styled_scores(world: World, found: Tensor, things: Sequence[Thing], style: str) -> dict[str, float]:
    """Shares of objects with the right look, with the right style, with both."""
    both = success(world.judge, found, things, style).float().mean()
    places = [world.judge.look_at(place) for place in crops(found, len(things))]
    content = [
        shows(seen, [thing] * len(found), any_style=True).float() for seen, thing in zip(places, things, strict=True)
    ]
    painted = [(seen.style == STYLE_NAMES.index(style)).float() for seen in places]
    shares = {"content": torch.stack(content), "style": torch.stack(painted)}
    return {"both": float(both)} | {metric: float(share.mean()) for metric, share in shares.items()}
