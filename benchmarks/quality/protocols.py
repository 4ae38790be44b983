"""The paper's protocols, transposed to the world of drawings."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from torch import nn

from .case import Case
from .methods import Method
from .records import Record
from .scores import Reference, pictures, reference, similarity, success
from .world.building import World
from .world.captions import caption, scene_caption
from .world.judge import STYLE_NAMES
from .world.loras import with_deltas
from .world.pool import base_scene
from .world.scenes import Scene

SINGLE = "single LoRA"
OWN_DISTANCE = "function distance on each one's own prompt"


Models = Iterator[tuple[str, nn.Module | None]]


def preservation(
    world: World, methods: Mapping[str, Method], ks: Sequence[int], seeds: Sequence[int], table: str = "preservation"
) -> Iterator[Record]:
    """Each subject's prompt on the merged model (Tables 1 and 5), and prompts that name no subject."""
    for k in ks:
        for seed in seeds:
            case = Case(world.base, random.Random(100 * k + seed).sample(list(world.subjects), k), seed)
            for name, model in merged(case, methods, single=True):
                for metric, value in subject_scores(world, case, model).items():
                    yield Record(table, name, k, metric, seed, value)
                if model is not None:
                    for metric, value in _generic(world, case, model).items():
                        yield Record(f"{table}: generic prompts", name, k, metric, seed, value)


def merged(case: Case, methods: Mapping[str, Method], single: bool = False) -> Models:
    """The model under every method; None stands for each LoRA alone."""
    if single:
        yield SINGLE, None
    for name, method in methods.items():
        yield name, with_deltas(case.base, method(case))


def subject_scores(world: World, case: Case, model: nn.Module | None) -> dict[str, float]:
    """Success, similarity and function distance on each LoRA's own prompt; None stands for each LoRA alone."""
    shown, alike, off = [], [], []
    prompts, seed = [one.prompt for one in case.loras], 31 * case.seed
    if model is not None:
        found = pictures(model, prompts, world.scale.samples, seed)
    else:
        found = [
            pictures(case.singles[i], [prompt], world.scale.samples, seed + i)[0] for i, prompt in enumerate(prompts)
        ]
    for index, (one, seen) in enumerate(zip(case.loras, found, strict=True)):
        assert one.subject is not None
        shown.append(float(success(world.judge, seen, [one.subject.thing]).float().mean()))
        alike.append(similarity(world.judge, seen, one.subject.thing))
        if model is not None:
            off.append(_own(case, index).distance(model))
    values = {"success": fmean(shown), "similarity": fmean(alike)}
    return values | ({"function distance": fmean(off)} if off else {})


def generic_scenes(seed: int, count: int, numbers: Sequence[int] = (1, 2)) -> list[Scene]:
    """Scenes that no LoRA is about."""
    chooser = random.Random(9000 + seed)
    found: list[Scene] = []
    while len(found) < count:
        scene, text = base_scene(chooser)
        if len(scene.things) in numbers and text == scene_caption(scene):
            found.append(scene)
    return found


def _generic(world: World, case: Case, model: nn.Module) -> dict[str, float]:
    """Success on generic prompts, and how far the model moved there, over the LoRAs' mean effect on their own."""
    shown, moved = [], []
    scenes = generic_scenes(case.seed, world.scale.generic)
    for scene, seen in zip(scenes, pictures(model, [scene_caption(one) for one in scenes], 2, 500), strict=True):
        shown.append(float(success(world.judge, seen, scene.things).all(0).float().mean()))
    for number, scene in enumerate(scenes[:4]):
        moved.append(_of_base(case, number, scene_caption(scene)).difference(model))
    effect = [_own(case, index).effect for index in range(len(case.loras))]
    return {"success": fmean(shown), "leak": fmean(moved) / fmean(effect)}


def _own(case: Case, index: int) -> Reference:
    """What a LoRA alone does on its prompt."""
    prompt = case.loras[index].prompt
    make = lambda: reference(case.singles[index], case.base, prompt, 77 + case.seed)  # noqa: E731
    return case.once(("own", index), make)  # type: ignore[return-value]


def own_distance(case: Case, model: nn.Module) -> float:
    """Mean function distance to each LoRA alone, on its own prompt."""
    return fmean(_own(case, index).distance(model) for index in range(len(case.loras)))


def _of_base(case: Case, number: int, prompt: str) -> Reference:
    """What the base model does on a generic prompt."""
    make = lambda: reference(case.base, case.base, prompt, number, 2)  # noqa: E731
    return case.once(("base", number), make)  # type: ignore[return-value]


def composition(
    world: World, methods: Mapping[str, Method], ks: Sequence[int], seeds: Sequence[int]
) -> Iterator[Record]:
    """Two to four subjects in one picture (Table 3), in the order of the joint prompt and in the other one."""
    for k, seed in itertools.product(ks, seeds):
        chooser = random.Random(300 * k + seed)
        chosen = chooser.sample(list(world.subjects), k)
        prompt, turned = caption([one.prompt for one in chosen]), caption([one.prompt for one in reversed(chosen)])
        case = Case(world.base, chosen, seed, (prompt,))
        things = [one.subject.thing for one in chosen if one.subject]
        for name, model in merged(case, methods):
            assert model is not None
            found, other = (pictures(model, [text], 2 * world.scale.samples, 41 * seed)[0] for text in (prompt, turned))
            right = success(world.judge, found, things).float()
            right_other = success(world.judge, other, things[::-1]).float()
            yield Record("composition", name, k, "objects right", seed, float(right.mean()))
            yield Record("composition", name, k, "all right", seed, float((right.amin(0)).mean()))
            yield Record("composition", name, k, "objects right, other order", seed, float(right_other.mean()))
            yield Record("composition", name, k, OWN_DISTANCE, seed, own_distance(case, model))


def baseline(world: World, methods: Mapping[str, Method], ks: Sequence[int], seeds: Sequence[int]) -> Iterator[Record]:
    """What the comparison rests on: the base follows prompts, and each LoRA shows its subject or style.

    It compares nothing, so that it takes no notice of methods, numbers of LoRAs and seeds.
    """
    for number in range(1, 5):
        scenes = generic_scenes(0, 2 * world.scale.generic, (number,))
        found = pictures(world.base, [scene_caption(scene) for scene in scenes], 4, 900)
        right = [
            float(success(world.judge, seen, scene.things).float().mean())
            for scene, seen in zip(scenes, found, strict=True)
        ]
        yield Record("the base model", "objects as the prompt says", number, "success", 0, fmean(right))
    for one in world.subjects:
        assert one.subject is not None
        model = Case(world.base, [one], 0).singles[0]
        (found,) = pictures(model, [one.prompt], 4 * world.scale.samples, 17)
        yield Record(
            "single LoRAs",
            "subject",
            1,
            "success",
            one.subject.index,
            float(success(world.judge, found, [one.subject.thing]).float().mean()),
        )
    for one in world.styles:
        assert one.style is not None
        model = Case(world.base, [one], 0).singles[0]
        (found,) = pictures(model, [caption(["red circle"], one.style.words)], 4 * world.scale.samples, 17)
        seen = world.judge.look_at(found).style == STYLE_NAMES.index(one.style.name)
        yield Record("single LoRAs", "style", 1, "success", one.style.index, float(seen.float().mean()))
