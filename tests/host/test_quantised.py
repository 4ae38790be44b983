"""On quantised bases the merged LoRA acts in full: every layer adds what the saved LoRA says, base untouched."""

import re
import statistics

import pytest
from safetensors.torch import save_file

from .loras import model_shapes
from .merging import PAIRS, MergeGraph, pair
from .quantised import STORED, base_hash, latent_of, load_base, measure, saved_deltas
from .weights import assert_added, base_weights, dumped, facts

CASES = [(case, kind) for case in ("flux-fused-split", "wan21") for kind in STORED]
CASES += [(case, "unscaled_fp8_e4m3fn") for case in ("sdxl-convolutions", "sd15-convolutions")]

# Relative error of the median layer that patched weights must exceed here: about half of what was measured.
LOST_BY_WEIGHTS = {"int8": 0.02, "int8_convrot": 0.01, "packed": 0.0}

# Formats that this CPU multiplies with dequantised weights; the others round their activations too.
IN_FULL = [k for k in STORED if not k.startswith(("int8", "convrot", "asym"))]


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_forward_adds_the_lora_exactly_and_weights_do_not(server, base, case, kind):
    untouched = base_hash(server, case, kind)
    forward = measure(server, base, case, kind, "forward")
    weights = measure(server, base, case, kind, "weights")
    assert forward.errors.keys() == forward.deltas.keys()  # no layer slips by, called by weight or not
    worst = max(forward.errors.items(), key=lambda item: item[1])
    assert worst[1] < 1e-5, worst
    assert not forward.changed and forward.hooks == 0
    assert statistics.median(weights.errors.values()) >= LOST_BY_WEIGHTS.get(kind, 0.05)
    assert forward.base_hash == weights.base_hash == untouched


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("case", ["flux-fused-split", "wan21"])
def test_auto_divides_by_storage(server, base, case, kind):
    """Quantised layers act in the forward pass, the others by weights; both in full."""
    auto = measure(server, base, case, kind, "auto")
    assert max(auto.errors.values()) < 1e-5
    quantised = quantised_layers(server, base, case, kind) & auto.deltas.keys()
    found = re.search(
        r"(\d+) of (\d+) layers of the MODEL are applied in the forward pass \(.*: (\d+) as (.*?)\)", auto.report
    )
    assert found is not None, auto.report
    # rows of one weight (q, k, v) are layers of their own in the report, so it counts no fewer than weights
    assert int(found[1]) == int(found[3]) >= len(quantised) > 0 and found[4] == STORED[kind]
    assert (int(found[1]) == int(found[2])) == (quantised == auto.deltas.keys())


def quantised_layers(server, base, case, kind):
    """Names of the base's quantised weights: known by how the file was made, or by their dtype once loaded."""
    family = PAIRS[case][0]
    if not kind.startswith("unscaled"):
        shapes = model_shapes(base, family).items()
        fits = {name for name, shape in shapes if len(shape) == 2 and all(n % 128 == 0 for n in shape)}
        return {f"diffusion_model.{name}.weight" for name in fits}
    graph = MergeGraph(server)
    graph.dump(load_base(graph, family, kind), f"stored_{case}_{kind}")
    server.run(graph.prompt).ok()
    return {name for name, value in dumped(base, f"stored_{case}_{kind}").items() if value.dtype.itemsize == 1}


@pytest.mark.parametrize("apply", ["auto", None])
def test_a_base_that_is_not_quantised_gets_weights(server, base, apply):
    """`apply` may be missing: prompts from before it existed stay valid."""
    family, tasks = pair(base, "flux-fused-split")
    assert "apply" in server.schemas()["SSRMerge"]["input"]["optional"]
    graph = MergeGraph(server)
    merged = graph.merge(family, tasks, **({} if apply is None else {"apply": apply}))
    assert ("apply" in graph.prompt[merged.id]["inputs"]) == (apply is not None)
    graph.dump(merged, "not_quantised")
    saved = graph.save(merged, "not_quantised")
    text = graph.add("PreviewAny", source=merged.out(4))
    result = server.run(graph.prompt).ok()
    deltas = saved_deltas(base, family, result, saved)
    assert_added(dumped(base, "not_quantised"), base_weights(base, family), deltas, tolerance=1e-5)
    assert "forward pass" not in result.text(text)


def test_forward_leaves_the_weights_alone(server, base):
    family, tasks = pair(base, "flux-fused-split")
    graph = MergeGraph(server)
    dump = graph.dump(graph.merge(family, tasks, apply="forward"), "forward_weights")
    found = facts(server.run(graph.prompt).ok(), dump)
    assert_added(dumped(base, "forward_weights"), base_weights(base, family), {}, tolerance=0.0)
    assert found["lazy_patches"] == found["hooks"] == 0


def test_weights_on_a_quantised_base_are_reported(server, base):
    report = measure(server, base, "flux-fused-split", "float8_e4m3fn", "weights").report
    assert "apply weights rounds the merged LoRA" in report and "float8_e4m3fn" in report


@pytest.mark.parametrize("kind", IN_FULL)
def test_a_whole_sampling_equals_a_dense_float_model(server, base, kind):
    """The twin: float32 weights that are the dequantised ones plus the float64 delta, sampled by core alone."""
    case = "flux-fused-split"
    merged = measure(server, base, case, kind, "forward")
    patched = measure(server, base, case, kind, "weights")
    save_file(dict(merged.deltas), base / "output" / "deltas.safetensors")
    twin, plain = (sample_twin(server, base, case, kind, deltas) for deltas in ("deltas.safetensors", ""))
    effect = (twin - plain).norm()
    assert effect > 0.1 * plain.norm()
    assert (merged.latent - twin).norm() < 1e-4 * effect
    assert kind == "packed" or (patched.latent - twin).norm() > 1e-2 * effect


def sample_twin(server, base, case, kind, deltas):
    family, _ = pair(base, case)
    graph = MergeGraph(server)
    quantised = load_base(graph, family, kind)
    twin = graph.add("TwinModel", plain=graph.checkpoint(family), quantised=quantised, deltas=deltas, salt=kind)
    saved = graph.sample(family, twin)
    return latent_of(base, server.run(graph.prompt).ok(), saved)
