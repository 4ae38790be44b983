"""The suite's own formulas, against ComfyUI's loader: what a file of each kind does to the weights."""

import pytest

from .adapters import ADAPTERS, write_adapter
from .dialects import DIALECTS, PRIMARY
from .merging import MergeGraph
from .weights import assert_added, base_weights, dumped

KINDS = [kind for kind in ADAPTERS if kind not in ("reshape", "lokr_tucker", "loose")]
FAMILIES = ("flux", "sdxl", "sd3", "wan21")
CASES = [(family, PRIMARY[family], kind) for family in FAMILIES for kind in KINDS]
CASES += [(family, "diffusers", kind) for family in ("flux", "sd3") for kind in KINDS]


@pytest.mark.parametrize(("family", "dialect", "kind"), CASES)
def test_core_loader_adds_exactly_what_the_file_means(server, base, family, dialect, kind):
    before = base_weights(base, family)
    name = f"formula_{family}_{dialect}_{kind}"
    file = write_adapter(base / "models/loras" / f"{name}.safetensors", before, DIALECTS[family][dialect], kind, 70)
    graph = MergeGraph(server)
    graph.dump(graph.core_lora(graph.checkpoint(family), file.name, 1.0), name)
    mark = len(server.log())
    server.run(graph.prompt).ok()
    assert_added(dumped(base, name), before, file.truth(), tolerance=5e-5)
    assert "ERROR" not in server.log(mark) and "lora key not loaded" not in server.log(mark)


def test_core_cannot_apply_a_tucker_lokr(server, base):
    """Why that kind is not compared with core: torch refuses its Kronecker product, and the weight stays as it was."""
    before = base_weights(base, "sdxl")
    path = base / "models/loras" / "formula_lokr_tucker.safetensors"
    file = write_adapter(path, before, DIALECTS["sdxl"]["kohya"], "lokr_tucker", 71, lambda entry, number: number < 4)
    graph = MergeGraph(server)
    graph.dump(graph.core_lora(graph.checkpoint("sdxl"), file.name, 1.0), "lokr_tucker")
    mark = len(server.log())
    server.run(graph.prompt).ok()
    spatial = {name: delta for name, delta in file.truth().items() if delta.ndim == 4 and delta.shape[-1] > 1}
    seen = dumped(base, "lokr_tucker")
    assert spatial and all(bool((seen[name] == before[name]).all()) for name in spatial)
    assert server.log(mark).count("ERROR lokr") >= len(spatial)


@pytest.mark.parametrize(("family", "applied"), [("krea2", True), ("hidream", True), ("wan21", False), ("sd3", False)])
def test_core_patches_no_loose_parameter_of_a_module_with_children(server, base, family, applied):
    """It takes such patches without a word: Wan's modulation and SD3's table of positions stay as they are."""
    before, name = base_weights(base, family), f"formula_loose_{family}"
    path = base / "models/loras" / f"{name}.safetensors"
    file = write_adapter(path, before, DIALECTS[family]["native"], "loose", 72, lambda entry, number: False)
    graph = MergeGraph(server)
    graph.dump(graph.core_lora(graph.checkpoint(family), file.name, 1.0), name)
    mark = len(server.log())
    server.run(graph.prompt).ok()
    assert file.truth() and "lora key not loaded" not in server.log(mark) and "NOT LOADED" not in server.log(mark)
    assert_added(dumped(base, name), before, file.truth() if applied else {}, tolerance=5e-5)
