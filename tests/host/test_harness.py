"""The harness itself, with ComfyUI's own nodes only: tiny models, dialects, probes, server."""

import pytest
import torch
from safetensors.torch import load_file

from .adapters.files import loose_parameters
from .graphs import FAMILIES, Graph
from .loras import family_lora, model_shapes, read_lora
from .weights import assert_added, base_weights, dumped, facts, shapes_of

CASES = [(family, dialect) for family in FAMILIES for dialect in ("kohya", "native")]
CASES += [(family, "diffusers") for family in ("flux", "zimage", "sd3")]


@pytest.mark.parametrize(("family", "dialect"), CASES)
def test_core_loader_adds_exactly_the_ground_truth(server, base, family, dialect):
    lora = family_lora(base, family, dialect, seed=3)
    graph = Graph()
    model = graph.core_lora(graph.checkpoint(family), lora.name, 0.7)
    graph.sample(family, model)
    dump = graph.dump(model, f"harness_{family}_{dialect}")
    mark = len(server.log())
    result = server.run(graph.prompt).ok()
    assert_added(
        dumped(base, f"harness_{family}_{dialect}"),
        base_weights(base, family),
        {name: 0.7 * part.delta for name, part in lora.truth.items()},
        tolerance=1e-5,
    )
    assert facts(result, dump)["hooks"] == facts(result, dump)["lazy_patches"] == 0
    assert "NOT LOADED" not in server.log(mark) and "lora key not loaded" not in server.log(mark)


def test_base_hash_survives_a_patch(server, base):
    lora = family_lora(base, "flux", "kohya", seed=5)
    hashes = set()
    for strength in (0.0, 1.0):
        graph = Graph()
        dump = graph.dump(graph.core_lora(graph.checkpoint("flux"), lora.name, strength), "hash", base_only=True)
        hashes.add(facts(server.run(graph.prompt).ok(), dump)["base_hash"])
    assert len(hashes) == 1


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "flux", "zimage"])
def test_tiny_text_encoder_drives_the_tiny_model(server, kind):
    graph = Graph()
    clip = graph.add("TinyCLIP", kind=kind, seed=0)
    texts = [graph.add("CLIPTextEncode", clip=clip, text=text) for text in ("a red fox", "")]
    latent = graph.add(
        "KSampler",
        model=graph.checkpoint(kind),
        positive=texts[0],
        negative=texts[1],
        latent_image=graph.latent(kind),
        seed=1,
        steps=1,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    graph.add("SaveLatent", samples=latent, filename_prefix="host/clip")
    server.run(graph.prompt).ok()


def test_results_tell_executed_from_cached(server):
    graph = Graph()
    cond = graph.conditioning("flux", 77)
    show = graph.add("PreviewAny", source=cond)
    first = server.run(graph.prompt).ok()
    again = server.run(graph.prompt).ok()
    assert set(first.executed) == {cond.id, show.id} and not first.cached
    assert not again.executed and again.cached == {cond.id, show.id}


def test_errors_and_rejections_are_told_apart(server):
    graph = Graph()
    broken = graph.add("MakeStack", entries="not json")
    graph.add("PreviewAny", source=broken)
    failed = server.run(graph.prompt)
    assert (failed.status, failed.error_node) == ("error", broken.id) and "Expecting value" in failed.error
    refused = server.run({"1": {"class_type": "UNETLoader", "inputs": {"unet_name": "no", "weight_dtype": "default"}}})
    assert refused.status == "rejected"


def test_interrupt_stops_a_running_sampler(server):
    graph = Graph()
    graph.sample("flux", graph.checkpoint("flux"), seed=9, steps=2000)
    prompt = server.submit(graph.prompt)
    server.wait_event(prompt, lambda kind, _: kind == "progress")
    server.interrupt()
    assert server.wait(prompt, timeout=30).status == "interrupted"


LOOSE = {
    "zimage": {"x_pad_token", "cap_pad_token"},
    "sd3": {"pos_embed"},
    "hidream": {f"{kind}_stream_blocks.0.block.ff_i.gate.weight" for kind in ("double", "single")},
    "krea2": {"last.modulation.lin"},
    "wan21": {"blocks.0.modulation", "blocks.1.modulation", "head.modulation"},
    "wan22": {"blocks.0.modulation", "blocks.1.modulation", "head.modulation"},
    "ltxv": {"scale_shift_table", "transformer_blocks.0.scale_shift_table", "transformer_blocks.1.scale_shift_table"},
    "anima": {"llm_adapter.embed.weight"},
}
"""Matrices that are used without a call of a linear layer or convolution, so that no hook sees their input."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_but_the_loose_ones_is_a_layer_that_runs(server, base, family):
    graph = Graph()
    graph.sample(family, graph.add("RecordInputs", model=graph.checkpoint(family), prefix=f"recorded_{family}"))
    server.run(graph.prompt).ok()
    inputs = load_file(base / "output" / "probes" / f"recorded_{family}.safetensors")
    weights = base_weights(base, family)
    loose = {f"diffusion_model.{name}" for name in LOOSE.get(family, ())}
    assert set(loose_parameters(weights)) == loose
    assert inputs.keys() == {name for name, weight in weights.items() if weight.ndim >= 2} - loose


def test_lora_model_socket_equals_the_file(server, base):
    lora = family_lora(base, "flux", "diffusers", seed=8)
    graph = Graph()
    loaded = graph.add("LoraModelFromFile", name=lora.name)
    model = graph.add("LoraModelLoader", model=graph.checkpoint("flux"), lora=loaded, strength_model=-0.5, bypass=False)
    graph.dump(model, "lora_model")
    server.run(graph.prompt).ok()
    deltas = {name: -0.5 * part.delta for name, part in lora.truth.items()}
    assert_added(dumped(base, "lora_model"), base_weights(base, "flux"), deltas, tolerance=1e-5)


@pytest.mark.parametrize(("family", "dialect"), CASES)
def test_independent_reader_inverts_the_writer(server, base, family, dialect):
    lora = family_lora(base, family, dialect, seed=4, dtype=torch.bfloat16)
    found = read_lora(lora.path, family, model_shapes(base, family))
    assert found.keys() == lora.truth.keys()
    assert all(torch.equal(found[name], part.delta) for name, part in lora.truth.items())


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_text_encoder_keys_load(server, base, kind):
    graph = Graph()
    clip = graph.add("TinyCLIP", kind=kind, seed=0)
    graph.dump(clip, f"clip_base_{kind}")
    server.run(graph.prompt).ok()
    before = dumped(base, f"clip_base_{kind}")
    lora = family_lora(base, kind, "kohya", seed=6, name=f"te_{kind}", text_encoder=shapes_of(before))
    both = graph.add(
        "LoraLoader",
        model=graph.checkpoint(kind),
        clip=clip,
        lora_name=lora.name,
        strength_model=1.0,
        strength_clip=0.4,
    )
    graph.dump(both.out(1), f"clip_patched_{kind}")
    mark = len(server.log())
    server.run(graph.prompt).ok()
    deltas = {name: 0.4 * part.delta for name, part in lora.truth.items() if name in before}
    assert len(deltas) >= 18
    assert_added(dumped(base, f"clip_patched_{kind}"), before, deltas, tolerance=1e-5)
    assert "lora key not loaded" not in server.log(mark)
