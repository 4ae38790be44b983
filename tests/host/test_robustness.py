"""Models and inputs that make naive calibrations wrong in silence."""

import pytest
from safetensors.torch import load_file

from .merging import MergeGraph, pair
from .test_save import saved_name
from .weights import assert_added, base_weights, dumped, relative_error

CASE = "flux-fused-split"


def merged_weights(server, base, prefix, wrap=None, **options):
    """Weights of a merge on a wrapped model."""
    family, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    model = graph.checkpoint(family)
    merged = graph.merge(family, tasks, model=wrap(graph, model) if wrap else model, **options)
    graph.dump(merged, prefix)
    server.run(graph.prompt).ok()
    return dumped(base, prefix)


def test_step_skipping_caches_on_the_model_do_not_thin_out_the_calibration(server, base):
    plain = merged_weights(server, base, "cache_plain", steps=6)
    before = base_weights(base, "flux")
    deltas = {
        name: plain[name].double() - before[name].double() for name in before if (plain[name] != before[name]).any()
    }

    def eager(graph, model):
        settings = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
        return graph.add("EasyCache", model=model, **settings)

    assert_added(merged_weights(server, base, "cache_easy", eager, steps=6), before, deltas, tolerance=1e-4)


@pytest.mark.parametrize("sigmas", ["1.0, 0.5, 0.0, 0.7, 0.0", "0.0, 0.5, 0.0"])
def test_sigmas_with_a_zero_in_the_middle_are_refused(server, base, sigmas):
    family, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    values = graph.add("ManualSigmas", sigmas=sigmas)
    graph.sample(family, graph.merge(family, tasks, sigmas=values))
    result = server.run(graph.prompt)
    assert result.status == "error" and "SIGMAS" in result.error


def test_a_lora_that_is_on_the_model_already_stays_and_is_not_merged(server, base):
    family, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    model = graph.core_lora(graph.checkpoint(family), tasks[0].file.name, 0.5)
    graph.dump(graph.merge(family, tasks, model=model, mode="sum"), "context_lora")
    server.run(graph.prompt).ok()
    context = {name: 0.5 * part.delta for name, part in tasks[0].file.truth.items()}
    expected = dict(context)
    for task in tasks:
        for name, delta in task.scaled().items():
            expected[name] = expected[name] + delta if name in expected else delta
    assert_added(dumped(base, "context_lora"), base_weights(base, family), expected, tolerance=2e-5)


def test_a_context_lora_changes_what_calibration_sees(server, base):
    _, tasks = pair(base, CASE)

    def context(graph, model):
        return graph.core_lora(model, tasks[0].file.name, 2.0)

    plain, other = merged_weights(server, base, "context_off"), merged_weights(server, base, "context_on", context)
    name = "diffusion_model.double_blocks.0.img_mlp.2.weight"
    shift = 2.0 * tasks[0].file.truth[name].delta
    assert relative_error(other[name].double() - shift, plain[name].double()) > 1e-4


@pytest.mark.parametrize("case", ["flux-fused-split", "sd15-convolutions"])
def test_calibration_on_offloaded_layers_gives_the_same_merge(server, base, case):
    family, tasks = pair(base, case)
    found = []
    for offloaded in (False, True):
        graph = MergeGraph(server)
        model = graph.checkpoint(family)
        merged = graph.merge(family, tasks, model=graph.add("LowMemoryModel", model=model) if offloaded else model)
        saved = graph.save(merged, f"offloaded_{family}_{offloaded}")
        result = server.run(graph.prompt).ok()
        found.append(load_file(base / "output" / "loras" / saved_name(result, saved)))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        if value.norm() > 0:
            assert relative_error(found[1][name], value) < 1e-5, name
