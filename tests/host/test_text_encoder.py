"""LoRAs with text-encoder layers: CLIP is merged with the model, from prompts."""

import re

import pytest
from safetensors.torch import load_file

from .graphs import Graph
from .loras import family_lora
from .merging import MergeGraph, Task
from .reference import Recording, routed
from .weights import assert_added, dumped, shapes_of

PROMPTS = ("a photo of a red fox", "a watercolour of a heron in the reeds at dawn")
RIDGE = 1e-3


@pytest.fixture(params=["sd15", "sdxl"])
def world(request, server, base):
    """Family, base weights of its tiny CLIP, two LoRAs with text-encoder layers."""
    kind = request.param
    graph = Graph()
    graph.dump(graph.add("TinyCLIP", kind=kind, seed=0), f"te_base_{kind}")
    server.run(graph.prompt).ok()
    before = dumped(base, f"te_base_{kind}")
    tasks = [
        Task(family_lora(base, kind, "kohya", seed, name=f"te_{kind}_{seed}", text_encoder=shapes_of(before)), s, 0)
        for seed, s in ((80, 1.0), (81, 0.7))
    ]
    return kind, before, tasks


def merge_with_prompts(server, world, **options):
    kind, _, tasks = world
    graph = MergeGraph(server)
    loras = [
        graph.pack(
            "SSRLoRA",
            lora=task.file.name,
            strength_model=task.strength,
            strength_clip=task.strength,
            prompts=prompt,
        )
        for task, prompt in zip(tasks, PROMPTS, strict=True)
    ]
    clip = graph.add("TinyCLIP", kind=kind, seed=0)
    values = {"model": graph.checkpoint(kind), "clip": clip, "latent": graph.latent(kind)}
    return graph, graph.join("SSRMerge", loras, **values, **options)


def clip_part(world):
    """Weight names of the text encoder that the LoRAs change."""
    return [name for name in world[2][0].file.truth if name in world[1]]


def test_sum_changes_clip_by_the_ground_truth(server, base, world):
    kind, before, tasks = world
    graph, merged = merge_with_prompts(server, world, mode="sum")
    graph.dump(merged.out(1), f"te_sum_{kind}")
    server.run(graph.prompt).ok()
    expected = {n: sum(task.strength * task.file.truth[n].delta for task in tasks) for n in clip_part(world)}
    assert_added(dumped(base, f"te_sum_{kind}"), before, expected, tolerance=2e-5)


def test_router_of_the_text_encoder_equals_the_reference(server, base, world):
    kind, before, tasks = world
    for index, task in enumerate(tasks):
        alone = Graph()
        loaded = alone.add(
            "LoraLoader",
            model=alone.checkpoint(kind),
            clip=alone.add("TinyCLIP", kind=kind, seed=0),
            lora_name=task.file.name,
            strength_model=task.strength,
            strength_clip=task.strength,
        )
        alone.add("RecordTextInputs", clip=loaded.out(1), text=PROMPTS[index], prefix=f"te_{kind}_{index}")
        server.run(alone.prompt).ok()
    graph, merged = merge_with_prompts(server, world, ridge=RIDGE, anchor="sum", padding="include", sampled_tokens=0)
    graph.dump(merged.out(1), f"te_router_{kind}")
    server.run(graph.prompt).ok()
    recordings = [Recording(base, f"te_{kind}_{index}") for index in range(2)]
    expected = {
        name: routed(
            [recording.rows(name) for recording in recordings],
            [task.strength * task.file.truth[name].delta for task in tasks],
            RIDGE,
        )
        for name in clip_part(world)
    }
    assert_added(dumped(base, f"te_router_{kind}"), before, expected, tolerance=1e-3)


def test_saved_file_carries_the_text_encoder(server, base, world):
    kind, before, _ = world
    graph, merged = merge_with_prompts(server, world)
    saved = graph.save(merged, f"te_{kind}")
    graph.dump(merged.out(1), f"te_live_{kind}")
    result = server.run(graph.prompt).ok()
    name = re.split(r"[\\/]", result.text(saved))[-1]
    again = Graph()
    loaded = again.add(
        "LoraLoader",
        model=again.checkpoint(kind),
        clip=again.add("TinyCLIP", kind=kind, seed=0),
        lora_name=name,
        strength_model=1.0,
        strength_clip=1.0,
    )
    again.dump(loaded.out(1), f"te_loaded_{kind}")
    mark = len(server.log())
    server.run(again.prompt).ok()
    live = dumped(base, f"te_live_{kind}")
    deltas = {n: live[n].double() - before[n].double() for n in clip_part(world)}
    assert_added(dumped(base, f"te_loaded_{kind}"), before, deltas, tolerance=1e-5)
    assert "lora key not loaded" not in server.log(mark)
    assert any(key.startswith(("text_encoders.", "lora_te")) for key in load_file(base / "output" / "loras" / name))


def test_hooks_are_gone_from_the_text_encoder(server, world):
    from .weights import facts

    graph, merged = merge_with_prompts(server, world)
    dump = graph.dump(merged.out(1), "te_hooks", base_only=True)
    assert facts(server.run(graph.prompt).ok(), dump)["hooks"] == 0
