"""Saved merges: core's loaders turn them into the very weights that the live MODEL has."""

import re

import pytest
import torch
from safetensors import safe_open

from .loras import family_lora, model_shapes, read_lora
from .merging import PAIRS, MergeGraph, Task, pair
from .weights import assert_added, base_weights, dumped

STYLES = [(case, style) for case in PAIRS for style in ("comfy", "kohya")]
STYLES += [("flux-fused-split", "diffusers"), ("flux-split-split", "diffusers"), ("zimage-fused-split", "diffusers")]


def saved_name(result, node):
    """File name of a save node's path, as LoRA loaders list it."""
    return re.split(r"[\\/]", result.text(node))[-1]


@pytest.mark.parametrize(("case", "style"), STYLES)
def test_core_loader_gives_the_live_weights(server, base, case, style):
    family, tasks = pair(base, case)
    graph = MergeGraph(server)
    merged = graph.merge(family, tasks)
    graph.dump(merged, f"live_{case}_{style}")
    saved = graph.save(merged, f"{case}_{style}", style)
    name = saved_name(server.run(graph.prompt).ok(), saved)
    again = MergeGraph(server)
    model = again.core_lora(again.checkpoint(family), name, 1.0)
    again.sample(family, model)
    again.dump(model, f"loaded_{case}_{style}")
    mark = len(server.log())
    server.run(again.prompt).ok()
    deltas = read_lora(base / "output" / "loras" / name, family, model_shapes(base, family))
    before = base_weights(base, family)
    for prefix in ("live", "loaded"):
        assert_added(dumped(base, f"{prefix}_{case}_{style}"), before, deltas, tolerance=1e-5)
    assert "lora key not loaded" not in server.log(mark) and "NOT LOADED" not in server.log(mark)


@pytest.mark.parametrize("case", PAIRS)
def test_lora_model_output_feeds_cores_nodes(server, base, case):
    family, tasks = pair(base, case)
    graph = MergeGraph(server)
    merged = graph.merge(family, tasks)
    loaded = graph.add(
        "LoraModelLoader", model=graph.checkpoint(family), lora=merged.out(2), strength_model=1.0, bypass=False
    )
    graph.dump(merged, f"direct_{case}")
    graph.dump(loaded, f"by_socket_{case}")
    graph.add("SaveLoRA", lora=merged.out(2), prefix=f"loras/core_{case}")
    mark = len(server.log())
    server.run(graph.prompt).ok()
    core_file = next((base / "output" / "loras").glob(f"core_{case}*.safetensors"))
    deltas = read_lora(core_file, family, model_shapes(base, family))
    for prefix in ("direct", "by_socket"):
        assert_added(dumped(base, f"{prefix}_{case}"), base_weights(base, family), deltas, tolerance=1e-5)
    assert "lora key not loaded" not in server.log(mark)


def test_files_are_numbered_and_never_overwritten(server, base):
    family, tasks = pair(base, "flux-fused-split")
    names = []
    for ridge in (0.01, 0.02):
        graph = MergeGraph(server)
        saved = graph.save(graph.merge(family, tasks, ridge=ridge), "numbered")
        names.append(saved_name(server.run(graph.prompt).ok(), saved))
    assert len(set(names)) == 2
    assert all((base / "output" / "loras" / name).is_file() for name in names)


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32")])
def test_dtype_of_the_merged_factors(server, base, dtype, stored):
    family, tasks = pair(base, "flux-fused-split")
    graph = MergeGraph(server)
    saved = graph.save(graph.merge(family, tasks, dtype=dtype), f"as_{dtype}")
    path = base / "output" / "loras" / saved_name(server.run(graph.prompt).ok(), saved)
    with safe_open(path, "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys() if not name.endswith("alpha")}  # noqa: SIM118
    assert kinds == {stored}


def test_auto_keeps_the_dtype_of_the_files(server, base):
    half = [family_lora(base, "flux", "native", seed, dtype=torch.bfloat16, name=f"half_{seed}") for seed in (90, 91)]
    graph = MergeGraph(server)
    saved = graph.save(graph.merge("flux", [Task(file, 1.0, 1 + i) for i, file in enumerate(half)]), "as_files")
    path = base / "output" / "loras" / saved_name(server.run(graph.prompt).ok(), saved)
    with safe_open(path, "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys() if not name.endswith("alpha")}  # noqa: SIM118
    assert kinds == {"BF16"}


def test_prefix_cannot_leave_the_output_folder(server, base):
    family, tasks = pair(base, "flux-fused-split")
    graph = MergeGraph(server)
    merged = graph.merge(family, tasks)
    graph.pack("SSRSaveLoRA", lora=merged.out(2), filename_prefix="../../outside", key_style="comfy")
    assert server.run(graph.prompt).status == "error"
    assert not list(base.parent.glob("outside*")) and not list(base.glob("outside*"))
