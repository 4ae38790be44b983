"""SSR Compress: its MODEL is what its file loads to, its size is what was asked for, its refusals say what to do."""

import re

import pytest
from safetensors.torch import load_file

from .loras import model_shapes, read_lora
from .merging import PAIRS, MergeGraph, pair
from .weights import assert_added, base_weights, dumped


def graph_of(server, case, base, **options):
    family, tasks = pair(base, case)
    graph = MergeGraph(server)
    merged = graph.merge(family, tasks)
    values = {"model": graph.checkpoint(family), "lora": merged.out(2), "calibration": merged.out(3)} | options
    return family, graph, merged, graph.pack("SSRCompress", values)


def tensor_bytes(path):
    """Bytes of all factors."""
    tensors = load_file(path)
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if not name.endswith("alpha"))


@pytest.mark.parametrize("case", PAIRS)
def test_the_file_loads_to_the_live_model_and_has_its_size(server, base, case):
    family, graph, merged, small = graph_of(server, case, base, limit="share", share=0.6)
    saved, whole = graph.save(small, f"small_{case}"), graph.save(merged, f"whole_{case}")
    graph.dump(small, f"small_{case}")
    result = server.run(graph.prompt).ok()
    files = [base / "output" / "loras" / re.split(r"[\\/]", result.text(node))[-1] for node in (saved, whole)]
    deltas = read_lora(files[0], family, model_shapes(base, family))
    assert_added(dumped(base, f"small_{case}"), base_weights(base, family), deltas, tolerance=1e-5)
    sizes = [tensor_bytes(file) for file in files]
    assert 0.5 * sizes[1] < sizes[0] <= 0.6 * sizes[1]
    text = result.text(small)
    said = [float(number) for number in re.search(r"([\d.]+) of ([\d.]+) MB", text).groups()]
    assert said == pytest.approx([size / 1e6 for size in sizes], abs=0.006)
    assert "measured on" in text and "only one LoRA has the layer" in text


@pytest.mark.parametrize("style", ["comfy", "diffusers"])
def test_a_budget_in_megabytes_is_that_of_the_file_in_its_names(server, base, style):
    """Fused layers of Flux take more bytes under diffusers' names."""
    _, graph, _, small = graph_of(server, "flux-fused-split", base, limit="megabytes", megabytes=0.3, key_style=style)
    saved = graph.save(small, f"small_{style}", style)
    result = server.run(graph.prompt).ok()
    size = tensor_bytes(base / "output" / "loras" / re.split(r"[\\/]", result.text(saved))[-1])
    assert 0.28e6 < size <= 0.3e6
    assert ("in diffusers names" in result.text(small)) == (style == "diffusers")


def test_without_calibration_weights_decide_and_the_report_says_so(server, base):
    _, graph, _, small = graph_of(server, "flux-fused-split", base, limit="rank", rank=3)
    del graph.prompt[small.id]["inputs"]["calibration"]
    graph.save(small, "by_weights")
    text = server.run(graph.prompt).ok().text(small)
    assert "no calibration" in text and "| outputs |" not in text


def test_a_lora_model_of_somebody_else_is_refused(server, base):
    family, tasks = pair(base, "flux-fused-split")
    graph = MergeGraph(server)
    foreign = graph.add("LoraModelFromFile", name=tasks[0].file.name)
    small = graph.pack("SSRCompress", model=graph.checkpoint(family), lora=foreign)
    graph.save(small, "foreign")
    result = server.run(graph.prompt)
    assert result.status == "error" and "does not come from SSR-Merge" in result.error


def test_a_budget_that_is_too_small_says_what_it_takes(server, base):
    _, graph, _, small = graph_of(server, "flux-fused-split", base, limit="megabytes", megabytes=0.001)
    graph.save(small, "too_small")
    result = server.run(graph.prompt)
    assert result.status == "error" and "rank 1 in every layer takes" in result.error
