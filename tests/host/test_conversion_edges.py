"""Converted adapters on fp8 weights and on text encoders, and files that are malformed."""

import random
import time

import pytest
import torch
from perturbations import KINDS

from .adapter_files import ConversionGraph, adapter_file, adapter_tensors, change_errors, changed_weights, write_lora
from .graphs import Graph
from .loras import read_lora
from .test_conversion import other_file
from .test_interrupt import state_of
from .test_save import saved_name
from .weights import base_weights, dumped, relative_error, shapes_of

FAMILY = "flux"
LAYER = "diffusion_model.double_blocks.0.img_attn.proj"


def fp8_model(graph):
    return graph.add("UNETLoader", unet_name=f"tiny_{FAMILY}.safetensors", weight_dtype="fp8_e4m3fn")


def packed_values(weight):
    """What PackedLoader's layers multiply with: groups of 32 values as int8 with one float16 scale."""
    groups = weight.reshape(-1, 32)
    scale = (groups.abs().amax(1, keepdim=True) / 127).half().float()
    return (scale * (groups / scale).round().clamp(-127, 127)).reshape(weight.shape)


@pytest.mark.parametrize("storage", ["fp8", "packed"])
def test_a_dora_on_quantised_weights_is_relative_to_what_they_mean(server, base, storage):
    """From the definition: rows of W + BA, scaled by m over the norm of W's rows, less W."""
    generator = torch.Generator().manual_seed(4)
    up, down = (0.3 * torch.randn(size, generator=generator) for size in ((128, 4), (4, 128)))
    scale = 1 + 0.1 * torch.randn(128, 1, generator=generator)
    tensors = {f"{LAYER}.lora_up.weight": up, f"{LAYER}.lora_down.weight": down, f"{LAYER}.dora_scale": scale}
    file = write_lora(base, f"dora_on_{storage}.safetensors", tensors)
    graph = ConversionGraph(server, FAMILY)
    model = fp8_model(graph) if storage == "fp8" else graph.add("PackedLoader", family=FAMILY)
    merged = graph.of((file, 1.0), model=model, mode="sum", dtype="float32")
    saved = graph.save(merged, f"dora_on_{storage}")
    name = saved_name(server.run(graph.prompt).ok(), saved)
    stored = base_weights(base, FAMILY)[f"{LAYER}.weight"]
    w = (stored.to(torch.float8_e4m3fn) if storage == "fp8" else packed_values(stored)).double()
    ba = up.double() @ down.double()
    expected = (w + ba) * scale.double() / w.norm(dim=1, keepdim=True) - w
    deltas = read_lora(base / "output" / "loras" / name, FAMILY, {LAYER.removeprefix("diffusion_model."): (128, 128)})
    assert relative_error(deltas[f"{LAYER}.weight"], expected) < 1e-5
    exact = (stored + ba) * scale.double() / stored.double().norm(dim=1, keepdim=True) - stored
    assert relative_error(exact, expected) > 1e-4, "quantised weights would not show"


@pytest.mark.parametrize("kind", ["loha", "oft"])
def test_on_fp8_weights_the_model_is_cores(server, base, kind):
    """But for the few values that the host's rounding to fp8 pushes over an edge."""
    files = (adapter_file(base, FAMILY, kind), 0.7), (other_file(base, FAMILY), 0.8)
    ours, core = ConversionGraph(server, FAMILY), ConversionGraph(server, FAMILY)
    ours.dump(ours.of(*files, mode="sum", apply="weights", model=fp8_model(ours)), "conv_ours")
    core.dump(core.chain(*files, model=fp8_model(core)), "conv_core")
    server.run(ours.prompt).ok()
    server.run(core.prompt).ok()
    a, b = dumped(base, "conv_ours"), dumped(base, "conv_core")
    for name in changed_weights(FAMILY):
        assert a[name].dtype == torch.float8_e4m3fn
        assert float((a[name].float() != b[name].float()).float().mean()) < 1e-3, name


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("kind", ["loha", "dora", "oft"])
def test_text_encoders(server, base, kind, strength):
    graph = Graph()
    graph.dump(graph.add("TinyCLIP", kind="sd15", seed=0), "conv_te_base")
    server.run(graph.prompt).ok()
    before, rng = dumped(base, "conv_te_base"), random.Random(kind)
    path = "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {name + suffix: 2 * value for suffix, value in KINDS[kind](rng, shapes_of(before)[path]).items()}
    tensors |= {key: v for key, v in adapter_tensors(base, "sd15", kind).items() if "proj_in" in key}
    file = write_lora(base, f"te_{kind}.safetensors", tensors)
    server.schemas(refresh=True)
    ours, core = ConversionGraph(server, "sd15"), ConversionGraph(server, "sd15")
    values = {"strength_model": 0.5, "strength_clip": strength, "prompts": "a fox"} | ours.convert
    clip = ours.add("TinyCLIP", kind="sd15", seed=0)
    merged = ours.join(
        "SSRMerge", [ours.pack("SSRLoRA", lora=file, **values)], model=ours.checkpoint("sd15"), clip=clip
    )
    ours.dump(merged.out(1), "conv_ours")
    clip = core.add("TinyCLIP", kind="sd15", seed=0)
    values = {"lora_name": file, "strength_model": 0.5, "strength_clip": strength}
    loaded = core.add("LoraLoader", model=core.checkpoint("sd15"), clip=clip, **values)
    core.dump(loaded.out(1), "conv_core")
    server.run(ours.prompt).ok()
    server.run(core.prompt).ok()
    errors = change_errors(dumped(base, "conv_ours"), dumped(base, "conv_core"), before)
    assert set(errors) == {f"{path}.weight"} and max(errors.values()) < 1e-5


def ones(*shape):
    return torch.full(shape, 0.1)


MALFORMED = {
    "loha without partner": {"hada_w1_a": ones(128, 2), "hada_w1_b": ones(2, 128), "hada_w2_a": ones(128, 2)},
    "loha of another width": {
        **{f"hada_w{i}_a": ones(128, 2) for i in (1, 2)},
        "hada_w1_b": ones(2, 96),
        "hada_w2_b": ones(2, 96),
    },
    "loha of 400 GB": {
        **{f"hada_w{i}_a": ones(60000, 1) for i in (1, 2)},
        **{f"hada_w{i}_b": ones(1, 60000) for i in (1, 2)},
    },
    "loha core alone": {"hada_t1": ones(2, 2, 3, 3)},
    "lokr without partner": {"lokr_w1": ones(8, 8), "lokr_w2_a": ones(16, 2)},
    "lokr of another size": {"lokr_w1": ones(8, 8), "lokr_w2": ones(16, 12)},
    "lokr of 100 GB": {"lokr_w1_a": ones(60000, 1), "lokr_w1_b": ones(1, 60000), "lokr_w2": ones(8, 8)},
    "lokr with a core it cannot use": {"lokr_w1": ones(8, 8), "lokr_w2": ones(16, 16), "lokr_t1": ones(2, 2)},
    "glora without partner": {"a1.weight": ones(128, 2), "a2.weight": ones(2, 128), "b1.weight": ones(128, 2)},
    "glora of no known order": {
        **{f"{n}.weight": ones(5, 7) for n in ("a1", "a2", "b1", "b2")},
        "alpha": torch.tensor(1.0),
    },
    "oft blocks": {"oft_blocks": ones(7, 8, 8)},
    "oft blocks that are no squares": {"oft_blocks": ones(16, 8, 4)},
    "oft rescale alone": {"rescale": ones(128, 1)},
    "boft blocks": {"oft_blocks": ones(2, 3, 4, 4), "alpha": torch.tensor(0.0)},
    "boft of five dimensions": {"oft_blocks": ones(1, 1, 2, 4, 4)},
    "dora scale": {"lora_up.weight": ones(128, 2), "lora_down.weight": ones(2, 128), "dora_scale": ones(77, 1)},
    "dora of another rank": {
        "lora_up.weight": ones(128, 2),
        "lora_down.weight": ones(3, 128),
        "dora_scale": ones(128, 1),
    },
    "difference": {"diff": ones(128, 64)},
    "new value": {"set_weight": ones(64, 64)},
    "nan": {"lokr_w1": ones(8, 8) * torch.nan, "lokr_w2": ones(16, 16)},
    "overflow": {"lokr_w1": ones(8, 8) * 1e30, "lokr_w2": ones(16, 16) * 1e30},
    "alpha": {"lokr_w1": ones(8, 8), "lokr_w2": ones(16, 16), "alpha": torch.ones(3)},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_by_name(server, base, name):
    tensors = {f"{LAYER}.{suffix}": value for suffix, value in MALFORMED[name].items()}
    file = write_lora(base, f"malformed_{name.replace(' ', '_')}.safetensors", tensors)
    before = state_of(server, FAMILY, f"malformed_before_{name}")
    graph = ConversionGraph(server, FAMILY)
    graph.sample(FAMILY, graph.of((file, 1.0), (other_file(base, FAMILY), 0.8)))
    start = time.monotonic()
    result = server.run(graph.prompt)
    assert result.status == "error" and "SSR-Merge: " in result.error, result
    assert file in result.error and "double_blocks.0.img_attn.proj" in result.error and time.monotonic() - start < 20
    assert state_of(server, FAMILY, f"malformed_after_{name}") == before
