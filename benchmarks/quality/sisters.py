"""Tables of the sister methods: NP-LoRA on subject and style, LoRAs from OSRM's start."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from ssr_core import SSRMerge, SumMerge

from .baselines import ties_merge
from .case import Case
from .methods import Method, engine, layerwise, sampling_of
from .protocols import merged, subject_scores
from .records import Record
from .scores import pictures, success
from .world.building import World
from .world.captions import caption
from .world.judge import STYLE_NAMES, shows


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
    for seed in seeds:
        chooser = random.Random(800 + seed)
        values: dict[str, list[tuple[float, float, float]]] = {}
        for _ in range(pairs):
            subject, style = chooser.choice(list(world.subjects)), chooser.choice(list(world.styles))
            assert subject.subject is not None
            assert style.style is not None
            prompt = caption([subject.prompt], style.style.words)
            case = Case(world.base, [subject, style], seed, (prompt,))
            for name, model in merged(case, methods):
                assert model is not None
                (found,) = pictures(model, [prompt], world.scale.samples, 51 * seed)
                both = success(world.judge, found, [subject.subject.thing], style.style.name)[0]
                content = shows(world.judge.look_at(found), [subject.subject.thing] * len(found), None, any_style=True)
                painted = world.judge.look_at(found).style == STYLE_NAMES.index(style.style.name)
                values.setdefault(name, []).append(
                    (float(content.float().mean()), float(painted.float().mean()), float(both.float().mean()))
                )
        for name, found_values in values.items():
            for i, metric in enumerate(("content", "style", "both")):
                yield Record("subject and style", name, 2, metric, seed, fmean(v[i] for v in found_values))
