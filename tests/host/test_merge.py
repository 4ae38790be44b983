"""SSR Merge on real models: the weights that a sampler sees, against ground truth that owes it nothing."""

import re

import pytest

from .loras import model_shapes, read_lora
from .merging import PAIRS, MergeGraph, averaged, pair, summed
from .weights import assert_added, base_weights, dumped, facts, relative_error

cases = pytest.mark.parametrize("case", PAIRS)


@cases
def test_merged_model_samples_and_equals_the_saved_factors(server, base, case):
    family, tasks = pair(base, case)
    graph = MergeGraph(server)
    merged = graph.merge(family, tasks)
    graph.sample(family, merged)
    dump = graph.dump(merged, f"ssr_{case}")
    saved = graph.save(merged, f"factors_{case}")
    result = server.run(graph.prompt).ok()
    path = base / "output" / "loras" / re.split(r"[\\/]", result.text(saved))[-1]
    deltas = read_lora(path, family, model_shapes(base, family))
    assert deltas.keys() == summed(tasks).keys()
    assert_added(dumped(base, f"ssr_{case}"), base_weights(base, family), deltas, tolerance=1e-5)
    assert facts(result, dump)["hooks"] == 0


@cases
@pytest.mark.parametrize(("mode", "expected"), [("sum", summed), ("average", averaged)])
def test_linear_modes_equal_the_ground_truth(server, base, case, mode, expected):
    family, tasks = pair(base, case)
    graph = MergeGraph(server)
    graph.dump(graph.merge(family, tasks, mode=mode), f"{mode}_{case}")
    server.run(graph.prompt).ok()
    assert_added(dumped(base, f"{mode}_{case}"), base_weights(base, family), expected(tasks), tolerance=2e-5)


def test_one_lora_alone_is_left_as_it_is(server, base):
    family, (task, _) = pair(base, "flux-fused-split")
    graph = MergeGraph(server)
    graph.dump(graph.merge(family, [task]), "alone")
    server.run(graph.prompt).ok()
    assert_added(dumped(base, "alone"), base_weights(base, family), task.scaled(), tolerance=1e-5)


def test_order_of_the_loras_does_not_matter(server, base):
    family, tasks = pair(base, "flux-fused-split")
    for name, order in (("there", tasks), ("back", tasks[::-1])):
        graph = MergeGraph(server)
        graph.dump(graph.merge(family, order), name)
        server.run(graph.prompt).ok()
    before = base_weights(base, family)
    there = {name: dumped(base, "there")[name].double() - before[name].double() for name in summed(tasks)}
    assert_added(dumped(base, "back"), before, there, tolerance=1e-4)


def test_loras_that_are_already_on_the_model_stay(server, base):
    family, tasks = pair(base, "flux-fused-split")
    graph = MergeGraph(server)
    loaded = graph.core_lora(graph.checkpoint(family), tasks[0].file.name, 0.5)
    graph.dump(graph.merge(family, tasks, model=loaded, mode="sum"), "on_top")
    server.run(graph.prompt).ok()
    expected = summed(tasks)
    for name, part in tasks[0].file.truth.items():
        expected[name] = expected[name] + 0.5 * part.delta
    assert_added(dumped(base, "on_top"), base_weights(base, family), expected, tolerance=2e-5)


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_base_stored_in_fp8_is_calibrated_and_merged(server, base, weight_dtype):
    family, tasks = pair(base, "flux-fused-split")
    graph = MergeGraph(server)
    model = graph.add("UNETLoader", unet_name=f"tiny_{family}.safetensors", weight_dtype=weight_dtype)
    merged = graph.merge(family, tasks, model=model)
    graph.sample(family, merged)
    saved = graph.save(merged, f"on_{weight_dtype}")
    result = server.run(graph.prompt).ok()
    path = base / "output" / "loras" / re.split(r"[\\/]", result.text(saved))[-1]
    deltas = read_lora(path, family, model_shapes(base, family))
    exact = MergeGraph(server)
    exact.dump(exact.merge(family, tasks), "on_float32")
    server.run(exact.prompt).ok()
    seen, before = dumped(base, "on_float32"), base_weights(base, family)
    errors = [relative_error(delta, seen[name].double() - before[name].double()) for name, delta in deltas.items()]
    assert sorted(errors)[len(errors) // 2] < 0.2  # inputs differ by fp8 rounding of the base, no more
