"""NP-LoRA Merge on real models: what each layer adds while KSampler runs, against the dense formula."""

from itertools import pairwise

import pytest
import torch
from safetensors import safe_open

from .adapter_files import adapter_file, changed_weights
from .graphs import Graph
from .loras import family_lora
from .merging import MergeGraph, Task, pair, record, summed
from .quantised import compare_layers, load_base, saved_deltas
from .reference import Recording, null_projected
from .weights import assert_added, base_weights, dumped, relative_error, shapes_of

FLUX = "flux-fused-split"


def expected_deltas(contents, style, share, inputs=None, **options):
    """The dense formula for every weight, row range by row range."""
    merged = {}
    for name in {name for task in (*contents, style) for name in task.file.truth}:
        owners = [task for task in (*contents, style) if name in task.file.truth]
        shape = owners[0].file.truth[name].delta.shape
        edges = {
            edge for task in owners for start, rows in task.file.truth[name].spans for edge in (start, start + rows)
        }
        scaled = [task.strength * task.file.truth[name].delta.flatten(1) for task in owners if task is not style]
        guard = torch.zeros(shape, dtype=torch.float64).flatten(1)
        if style in owners:
            guard = style.strength * style.file.truth[name].delta.flatten(1)
        whole = torch.zeros_like(guard)
        for start, end in pairwise(sorted(edges)):
            rows = slice(start, end)
            seen = None if inputs is None or not scaled else inputs.rows(name)  # a layer of one LoRA is passed through
            parts = [one[rows] for one in scaled] or [torch.zeros_like(guard[rows])]
            whole[rows] = null_projected(parts, guard[rows], share, inputs=seen, **options)
        merged[name] = whole.reshape(shape)
    return merged


def sampled_errors(server, base, graph, family, kind, merged, prefix, deltas):
    """Run the graph through KSampler; worst error of what a layer adds to the base's output on its own input."""
    recorded = graph.add("RecordLayers", model=merged, prefix=prefix)
    graph.sample(family, recorded)
    result = server.run(graph.prompt).ok()
    after = MergeGraph(server)
    after.add("ReplayLayers", model=load_base(after, family, kind), prefix=prefix)
    server.run(after.prompt).ok()
    errors, changed = compare_layers(base / "output" / "probes", prefix, deltas)
    assert not changed and errors.keys() == deltas.keys()
    return result, max(errors.values())


def far(deltas, others):
    """How far two sets of deltas are apart, in the layer where they differ most."""
    return max(relative_error(others[name], delta) for name, delta in deltas.items())


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("case", [FLUX, "lumina2", "zimage-fused-split", "sdxl-convolutions"])
def test_sampling_and_the_saved_file_equal_the_dense_formula(server, base, case, hard):
    family, (content, style) = pair(base, case)
    expected = expected_deltas([content], style, 1.0 if hard else 0.6 / 1.6)
    assert far(expected, summed([content, style])) > 0.05  # the comparison must be able to fail
    graph = MergeGraph(server)
    merged = graph.np_lora(family, [content], style, mu=0.6, hard=hard, dtype="float32")
    saved = graph.save(merged, f"np_{case}_{hard}")
    report = graph.add("PreviewAny", source=merged.out(3))
    result, worst = sampled_errors(server, base, graph, family, None, merged, f"np_{case}_{hard}", expected)
    assert worst < 2e-5
    stored = saved_deltas(base, family, result, saved)
    assert stored.keys() == expected.keys() and far(expected, stored) < 1e-5
    text = result.text(report)
    assert f"Protected: {style.file.name}. Kept out of its directions: {content.file.name}." in text
    assert "protected directions:" in text and "energy removed:" in text


def test_on_a_quantised_base_it_acts_in_the_forward_pass(server, base):
    family, (content, style) = pair(base, FLUX)
    expected = expected_deltas([content], style, 1.0)
    graph = MergeGraph(server)
    model = load_base(graph, family, "float8_e4m3fn")
    merged = graph.np_lora(family, [content], style, model=model, hard=True, dtype="float32")
    report = graph.add("PreviewAny", source=merged.out(3))
    result, worst = sampled_errors(server, base, graph, family, "float8_e4m3fn", merged, "np_fp8", expected)
    assert worst < 2e-5 and "applied in the forward pass" in result.text(report)


def test_several_contents_and_the_other_side(server, base):
    family, (content, style) = pair(base, FLUX)
    second = Task(family_lora(base, family, "native", seed=23), 0.7, 503)
    graph = MergeGraph(server)
    model = graph.checkpoint(family)
    graph.dump(graph.np_lora(family, [content, second], style, model=model, mu=1.0, max_directions=2), "np_contents")
    graph.dump(graph.np_lora(family, [style], content, model=model, mu=1.0), "np_there")
    graph.dump(graph.np_lora(family, [content], style, model=model, mu=1.0, protect="content"), "np_other_side")
    server.run(graph.prompt).ok()
    before = base_weights(base, family)
    contents = expected_deltas([content, second], style, 0.5, count=2)
    assert_added(dumped(base, "np_contents"), before, contents, tolerance=2e-5)
    other = expected_deltas([style], content, 0.5)
    assert_added(dumped(base, "np_other_side"), before, other, tolerance=2e-5)
    assert_added(dumped(base, "np_there"), before, other, tolerance=2e-5)


def test_mu_zero_is_the_sum(server, base):
    family, tasks = pair(base, FLUX)
    graph = MergeGraph(server)
    graph.dump(graph.np_lora(family, tasks[:1], tasks[1], mu=0.0), "np_sum")
    server.run(graph.prompt).ok()
    assert_added(dumped(base, "np_sum"), base_weights(base, family), summed(tasks), tolerance=2e-5)


def test_text_encoder(server, base):
    kind = "sd15"
    graph = Graph()
    graph.dump(graph.add("TinyCLIP", kind=kind, seed=0), "np_te_base")
    server.run(graph.prompt).ok()
    before = dumped(base, "np_te_base")
    content, style = (
        Task(family_lora(base, kind, "kohya", seed, name=f"np_te_{seed}", text_encoder=shapes_of(before)), strength, 0)
        for seed, strength in ((83, 1.0), (84, 0.7))
    )
    graph = MergeGraph(server)
    clip = graph.add("TinyCLIP", kind=kind, seed=0)
    graph.dump(graph.np_lora(kind, [content], style, clip=clip, hard=True).out(1), "np_te")
    server.run(graph.prompt).ok()
    expected = {n: d for n, d in expected_deltas([content], style, 1.0).items() if n in before}
    assert expected and far(expected, summed([content, style])) > 0.1
    assert_added(dumped(base, "np_te"), before, expected, tolerance=2e-5)


@pytest.mark.parametrize("case", ["zimage-fused-split", "sdxl-convolutions"])
def test_directions_by_activations_equal_the_dense_choice(server, base, case):
    """The style's inputs are recorded from core's own nodes."""
    family, (content, style) = pair(base, case)
    record(server, family, style, 1, f"np_use_{case}")
    graph = MergeGraph(server)
    model = graph.checkpoint(family)
    loras = [graph.lora(family, task) for task in (content, style)]
    sigmas = graph.first_sigmas(model, 1)
    values = {"model": model, "latent": graph.latent(family), "sigmas": sigmas}
    calibration = graph.join("SSRCalibrate", loras, **values)
    options = {"content": loras[0], "style": loras[1], "model": model, "calibration": calibration, "hard": True}
    by_use = graph.pack("SSRNPLoRAMerge", options, directions="activations", max_directions=1)
    graph.dump(by_use, f"np_use_{case}_merged")
    report = graph.add("PreviewAny", source=by_use.out(3))
    text = server.run(graph.prompt).ok().text(report)
    recording = Recording(base, f"np_use_{case}")
    expected = expected_deltas([content], style, 1.0, inputs=recording, count=1)
    assert_added(dumped(base, f"np_use_{case}_merged"), base_weights(base, family), expected, tolerance=1e-3)
    assert far(expected, expected_deltas([content], style, 1.0, count=1)) > 0.05
    assert "activations" in text and "Reconstruction error" in text


def test_a_converted_style_is_protected_like_a_plain_one(server, base):
    """LoHa goes through the same loading path; its row space is that of its exact change."""
    family, kind = "flux", "loha"
    name = adapter_file(base, family, kind)
    alone = Graph()
    alone.dump(alone.core_lora(alone.checkpoint(family), name, 1.0), "np_loha")
    server.run(alone.prompt).ok()
    before = base_weights(base, family)
    paths = {n.removeprefix("diffusion_model.").removesuffix(".weight") for n in changed_weights(family)}
    content = Task(family_lora(base, family, "native", 85, name="np_plain", include=paths.__contains__), 1.0, 0)
    server.schemas(refresh=True)
    graph = MergeGraph(server)
    style = graph.pack("SSRLoRA", lora=name, convert_rank=1024, convert_error=1e-6)
    values = {"model": graph.checkpoint(family), "content": graph.bare_lora(content), "style": style}
    graph.dump(graph.pack("SSRNPLoRAMerge", values, hard=True, max_directions=2, dtype="float32"), "np_converted")
    server.run(graph.prompt).ok()
    for weight in changed_weights(family):
        loha = dumped(base, "np_loha")[weight].double() - before[weight].double()
        expected = content.file.truth[weight].delta + loha
        rows = loha.flatten(1).any(dim=1)  # of a fused layer the style may have some
        parts = content.file.truth[weight].delta.flatten(1)[rows], loha.flatten(1)[rows]
        expected[rows] = null_projected([parts[0]], parts[1], 1.0, count=2).reshape(expected[rows].shape)
        found = dumped(base, "np_converted")[weight].double() - before[weight].double()
        assert relative_error(found, expected) < 1e-4, weight


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"content": {"enabled": False}}, "content has no LoRA"),
        ({"style": {"strength_model": 0.0}}, "style has no LoRA"),
        ({"node": {"directions": "activations"}}, "no CALIBRATION is connected"),
    ],
)
def test_what_is_missing_is_named(server, base, change, word):
    family, (content, style) = pair(base, FLUX)
    graph = MergeGraph(server)
    sides = {
        side: graph.bare_lora(task, **change.get(side, {})) for side, task in (("content", content), ("style", style))
    }
    values = {"model": graph.checkpoint(family)} | sides | change.get("node", {})
    graph.dump(graph.pack("SSRNPLoRAMerge", values), "np_refused")
    result = server.run(graph.prompt)
    assert result.status == "error" and word in result.error and "What to do" in result.error


def test_ssr_merge_reaches_it_by_mode_and_needs_two(server, base):
    family, tasks = pair(base, FLUX)
    graph = MergeGraph(server)
    graph.dump(graph.merge(family, tasks, mode="np_lora"), "np_mode")
    server.run(graph.prompt).ok()
    expected = expected_deltas(tasks[:1], tasks[1], 1 / 3)
    assert_added(dumped(base, "np_mode"), base_weights(base, family), expected, tolerance=2e-5)
    alone = MergeGraph(server)
    alone.dump(alone.merge(family, tasks[:1], mode="np_lora"), "np_alone")
    result = server.run(alone.prompt)
    assert result.status == "error" and "at least two LoRAs" in result.error


def test_the_metadata_says_how_it_was_made(server, base):
    family, (content, style) = pair(base, FLUX)
    graph = MergeGraph(server)
    saved = graph.save(graph.np_lora(family, [content], style, mu=0.75, energy=0.5), "np_meta")
    path = server.run(graph.prompt).ok().text(saved)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert '"method":"np_lora"' in metadata["ssr_merge"].replace(" ", "")
    assert '"mu":0.75' in metadata["ssr_merge"].replace(" ", "")
    assert '"protected":[1]' in metadata["ssr_merge"].replace(" ", "")
