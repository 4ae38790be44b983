"""Input that cannot work: the message says what, in which file and where; input that can must work."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from .loras import family_lora
from .merging import MergeGraph, pair
from .weights import assert_added, base_weights, dumped

FAMILY, CASE = "flux", "flux-fused-split"


def write(base, name, tensors):
    save_file(tensors, base / "models" / "loras" / name)
    return name


def merge_of(server, base, *names, **options):
    """SSR Merge of these files and a good one; returns the graph."""
    _, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    loras = [
        graph.pack("SSRLoRA", lora=name, conditioning=graph.conditioning(FAMILY, 40 + index))
        for index, name in enumerate(names)
    ]
    loras.append(graph.lora(FAMILY, tasks[1]))
    values = {"model": graph.checkpoint(FAMILY), "latent": graph.latent(FAMILY)} | options
    graph.sample(FAMILY, graph.join("SSRMerge", loras, **values))
    return graph


def refusal(server, graph):
    result = server.run(graph.prompt)
    assert result.status in ("error", "rejected"), result
    return result.error


def test_lora_for_another_model(server, base):
    other = family_lora(base, "sd15", "native", seed=70, name="for_sd15")
    message = refusal(server, merge_of(server, base, other.name))
    assert other.name in message and "base model" in message


def test_truncated_file(server, base):
    good = family_lora(base, FAMILY, "kohya", seed=71, name="whole")
    cut = good.path.with_name("cut.safetensors")
    cut.write_bytes(good.path.read_bytes()[:5000])
    assert cut.name in refusal(server, merge_of(server, base, cut.name))


def test_empty_file(server, base):
    empty = base / "models" / "loras" / "empty.safetensors"
    empty.write_bytes(b"")
    assert empty.name in refusal(server, merge_of(server, base, empty.name))


class _Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("container", ["pickle", "zip"])
def test_pickle_in_disguise_is_not_opened(server, base, container):
    marker = base / f"executed_{container}"
    path = base / "models" / "loras" / f"disguised_{container}.safetensors"
    with path.open("wb") as file:
        if container == "pickle":
            pickle.dump(_Payload(marker), file)
        else:
            torch.save(_Payload(marker), file)
    message = refusal(server, merge_of(server, base, path.name))
    assert path.name in message and "pickle" in message
    assert not marker.exists()


@pytest.mark.parametrize("length", [0x280, 0x680, 0x4B50])
def test_no_safetensors_header_is_taken_for_a_pickle_or_a_zip(server, base, length):
    """A file starts with its header's length: one in 32 starts with pickle's first byte, some with PK."""
    lora = family_lora(base, FAMILY, "native", seed=76, name="source_of_header", include=lambda m: m == "img_in")
    path = lora.path.with_name(f"header_{length}.safetensors")
    for pad in range(length):
        save_file(lora.tensors, path, metadata={"pad": "x" * pad})
        if int.from_bytes(path.read_bytes()[:8], "little") >= length:
            break
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    server.run(merge_of(server, base, path.name).prompt).ok()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_tensor(server, base, value):
    lora = family_lora(base, FAMILY, "native", seed=72, name="source_of_nan")
    key = "diffusion_model.double_blocks.1.img_mlp.0.lora_B.weight"
    damaged = lora.tensors[key].clone()
    damaged[0, 0] = value
    name = write(base, f"not_finite_{value}.safetensors", {**lora.tensors, key: damaged})
    message = refusal(server, merge_of(server, base, name))
    assert name in message and "double_blocks.1.img_mlp.0" in message


def test_wrong_shape(server, base):
    lora = family_lora(base, FAMILY, "native", seed=73, name="source_of_shape")
    key = "diffusion_model.double_blocks.1.img_mlp.0.lora_A.weight"
    name = write(base, "misshapen.safetensors", {**lora.tensors, key: torch.randn(4, 100)})
    message = refusal(server, merge_of(server, base, name))
    assert name in message and "double_blocks.1.img_mlp.0" in message


def test_up_without_down(server, base):
    lora = family_lora(base, FAMILY, "native", seed=74, name="source_of_half")
    key = "diffusion_model.double_blocks.1.img_mlp.0.lora_A.weight"
    name = write(base, "half.safetensors", {k: v for k, v in lora.tensors.items() if k != key})
    result = server.run(merge_of(server, base, name).prompt)
    if result.status == "success":
        pytest.fail("half a layer was dropped without an error")
    assert name in result.error and "double_blocks.1.img_mlp.0" in result.error


@pytest.mark.parametrize("rows", [7, 0])
def test_a_dora_that_does_not_fit_is_refused_by_name(server, base, rows):
    """ComfyUI only logs an error and leaves the weight as it was."""
    lora = family_lora(base, FAMILY, "native", seed=75, name="source_of_dora")
    name = "diffusion_model.double_blocks.1.img_mlp.0"
    dora = write(base, f"dora_{rows}.safetensors", {**lora.tensors, name + ".dora_scale": torch.ones(rows, 1)})
    message = refusal(server, merge_of(server, base, dora))
    assert dora in message and "double_blocks.1.img_mlp.0" in message and "DoRA" in message


def test_nothing_enabled(server, base):
    _, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    loras = [graph.lora(FAMILY, task, enabled=False) for task in tasks]
    graph.sample(FAMILY, graph.join("SSRMerge", loras, model=graph.checkpoint(FAMILY)))
    assert "no LoRA is enabled" in refusal(server, graph)


def test_no_file_chosen(server, base):
    graph = merge_of(server, base, "None")
    assert "no LoRA" in refusal(server, graph)


def test_prompts_without_clip_or_conditioning(server, base):
    _, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    loras = [graph.pack("SSRLoRA", lora=task.file.name, prompts="a fox") for task in tasks]
    graph.sample(FAMILY, graph.join("SSRMerge", loras, model=graph.checkpoint(FAMILY)))
    message = refusal(server, graph)
    assert tasks[0].file.name in message and "CLIP" in message


def test_equal_prompts_are_warned_about(server, base):
    _, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    loras = [graph.pack("SSRLoRA", lora=task.file.name, prompts="a fox") for task in tasks]
    clip = graph.add("TinyCLIP", kind=FAMILY, seed=0)
    merged = graph.join("SSRMerge", loras, model=graph.checkpoint(FAMILY), clip=clip, latent=graph.latent(FAMILY))
    report = graph.add("PreviewAny", source=merged.out(4))
    text = server.run(graph.prompt).ok().text(report)
    assert "same prompt" in text and all(task.file.name in text for task in tasks)


def test_memory_budget_is_named_before_anything_runs(server, base):
    family, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    graph.sample(family, graph.merge(family, tasks, memory_budget_gb=1e-6))
    assert "GiB" in refusal(server, graph)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_smallest_and_largest_seed(server, base, seed):
    family, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    graph.sample(family, graph.merge(family, tasks, seed=seed))
    server.run(graph.prompt).ok()


def test_strength_zero_is_the_same_as_absent(server, base):
    family, (task, other) = pair(base, CASE)
    graph = MergeGraph(server)
    loras = [graph.lora(family, task), graph.lora(family, other, strength_model=0.0, strength_clip=0.0)]
    graph.dump(graph.join("SSRMerge", loras, model=graph.checkpoint(family)), "zero")
    server.run(graph.prompt).ok()
    assert_added(dumped(base, "zero"), base_weights(base, family), task.scaled(), tolerance=1e-5)


def test_negative_strength_subtracts(server, base):
    family, (task, other) = pair(base, CASE)
    graph = MergeGraph(server)
    loras = [graph.lora(family, task), graph.lora(family, other, strength_model=-0.5)]
    graph.dump(graph.join("SSRMerge", loras, model=graph.checkpoint(family), mode="sum"), "negative")
    server.run(graph.prompt).ok()
    expected = task.scaled()
    for name, part in other.file.truth.items():
        expected[name] = expected.get(name, 0) - 0.5 * part.delta
    assert_added(dumped(base, "negative"), base_weights(base, family), expected, tolerance=2e-5)
