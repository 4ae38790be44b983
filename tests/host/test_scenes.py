"""Joint and neutral prompts against the dense reference, for the model and its text encoder.

What each pass saw is recorded from core's own loaders: each LoRA alone on its prompt, chained ones on
their joint prompt, none of them on the neutral one.
"""

import pytest

from .graphs import Graph
from .loras import family_lora
from .merging import SEED, MergeGraph, Task
from .reference import Recording, routed
from .weights import assert_added, base_weights, dumped, relative_error, shapes_of

KIND = "sd15"
PROMPTS = ("a photo of a red fox", "a watercolour of a heron", "an owl on a stone")
JOINT = "[1, scenes_2] a heron and a fox\na fox, a heron and an owl"
NEUTRAL = "an empty street"
STRENGTHS = (1.0, 0.7, 0.8)
RIDGE = 1e-3
PASSES = {
    PROMPTS[0]: (0,),
    PROMPTS[1]: (1,),
    PROMPTS[2]: (2,),
    "a heron and a fox": (0, 1),
    "a fox, a heron and an owl": (0, 1, 2),
    NEUTRAL: (),
}


@pytest.fixture(scope="module")
def tasks(server, base):
    """Three LoRAs with text-encoder layers; the third lacks half of the modules."""
    graph = Graph()
    graph.dump(graph.add("TinyCLIP", kind=KIND, seed=0), "scenes_clip")
    server.run(graph.prompt).ok()
    text = shapes_of(dumped(base, "scenes_clip"))
    found = []
    for number, strength in enumerate(STRENGTHS, 1):
        include = (lambda module: len(module) % 2 == 0) if number == 3 else (lambda module: True)
        name = f"scenes_{number}"
        file = family_lora(base, KIND, "kohya", 90 + number, name=name, text_encoder=text, include=include)
        found.append(Task(file, strength, 0))
    return found


def record(server, tasks, prompt, acting, prefix):
    """One pass by core's nodes."""
    graph = MergeGraph(server)
    model, clip = graph.checkpoint(KIND), graph.add("TinyCLIP", kind=KIND, seed=0)
    for task in (tasks[index] for index in acting):
        strengths = {"strength_model": task.strength, "strength_clip": task.strength}
        loaded = graph.add("LoraLoader", model=model, clip=clip, lora_name=task.file.name, **strengths)
        model, clip = loaded.out(0), loaded.out(1)
    record_pass(server, graph, model, clip, prompt, prefix)


def record_pass(server, graph, model, clip, prompt, prefix):
    """What MODEL and CLIP read while core samples a prompt."""
    graph.add("RecordTextInputs", clip=clip, text=prompt, prefix=f"{prefix}_text")
    watched = graph.add("RecordInputs", model=model, prefix=prefix)
    sampled = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=SEED),
        guider=graph.add(
            "BasicGuider", model=watched, conditioning=graph.add("CLIPTextEncode", clip=clip, text=prompt)
        ),
        sampler=graph.add("KSamplerSelect", sampler_name="euler"),
        sigmas=graph.first_sigmas(model, 2),
        latent_image=graph.latent(KIND),
    )
    graph.add("SaveLatent", samples=sampled, filename_prefix=f"host/{prefix}")
    server.run(graph.prompt).ok()


def expected(base, tasks, names, suffix):
    recordings = [(Recording(base, f"scenes_{number}{suffix}"), who) for number, who in enumerate(PASSES.values())]
    merged = {}
    for name in names:
        owners = [index for index, task in enumerate(tasks) if name in task.file.truth]
        deltas = [tasks[index].strength * tasks[index].file.truth[name].delta for index in owners]
        shape, flat = deltas[0].shape, [delta.flatten(1) for delta in deltas]
        if len(owners) == 1:
            merged[name] = deltas[0]
            continue
        inputs = [recordings[index][0].rows(name) for index in owners]
        scenes = [
            (recording.rows(name), [place for place, owner in enumerate(owners) if owner in who])
            for recording, who in recordings[len(PROMPTS) :]
        ]
        merged[name] = routed(inputs, flat, RIDGE, scenes=scenes).reshape(shape)
    return merged


def merge_node(graph, tasks, node="SSRMerge", **options):
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
    model = graph.checkpoint(KIND)
    values = {"model": model, "clip": graph.add("TinyCLIP", kind=KIND, seed=0), "latent": graph.latent(KIND)}
    values |= {"ridge": RIDGE, "anchor": "sum", "padding": "include", "sampled_tokens": 0}
    values = {name: value for name, value in (values | options).items() if value is not None}
    return graph.join(node, loras, sigmas=graph.first_sigmas(model, 2), **values)


def test_merges_with_scenes_equal_the_dense_reference(server, base, tasks):
    for number, (prompt, acting) in enumerate(PASSES.items()):
        record(server, tasks, prompt, acting, f"scenes_{number}")
    graph = MergeGraph(server)
    merged = merge_node(graph, tasks, joint_prompts=JOINT, neutral_prompts=NEUTRAL)
    graph.dump(merged, "scenes_model")
    graph.dump(merged.out(1), "scenes_text")
    server.run(graph.prompt).ok()
    models, text = base_weights(base, KIND), dumped(base, "scenes_clip")
    names = {name for task in tasks for name in task.file.truth}
    wanted = expected(base, tasks, names & models.keys(), "")
    assert_added(dumped(base, "scenes_model"), models, wanted, tolerance=1e-3)
    assert_added(dumped(base, "scenes_text"), text, expected(base, tasks, names & text.keys(), "_text"), tolerance=1e-3)
    bare = MergeGraph(server)
    bare.dump(merge_node(bare, tasks), "scenes_bare")
    server.run(bare.prompt).ok()
    without = dumped(base, "scenes_bare")
    moved = [relative_error(wanted[n], without[n].double() - models[n].double()) for n in wanted]
    assert sorted(moved)[-5] > 0.2  # the comparison must be able to fail


def test_a_joint_prompt_of_an_unknown_lora_stops_before_any_pass(server, tasks):
    graph = MergeGraph(server)
    graph.dump(merge_node(graph, tasks, joint_prompts="[nobody, 1] x"), "scenes_none")
    error = server.run(graph.prompt).error
    assert "nobody" in error
    assert "scenes_1" in error


def test_a_joint_prompt_without_clip_stops_before_any_pass(server, tasks):
    """The first LoRA's own pass would have stopped at its own prompt."""
    graph = MergeGraph(server)
    graph.dump(merge_node(graph, tasks, joint_prompts="a fox and an owl", clip=None), "scenes_no_clip")
    assert "the joint prompt 'a fox and an owl' needs a CLIP" in server.run(graph.prompt).error


def test_the_report_says_what_became_of_scenes(server, base, tasks):
    graph = MergeGraph(server)
    merged = merge_node(graph, tasks, joint_prompts=JOINT, neutral_prompts=NEUTRAL, sampled_tokens=64)
    report = graph.add("PreviewAny", source=merged.out(4))
    text = server.run(graph.prompt).ok().text(report)
    assert "error on joint prompts" in text
    assert "effect left on prompts under which no LoRA of the layer acts" in text
