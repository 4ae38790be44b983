"""Quantised layers that hooks do not reach: patched, rounded, and named in the report."""

import torch
from safetensors.torch import load_file, save_file

from .loras import family_lora
from .merging import MergeGraph

GATE = "diffusion_model.double_stream_blocks.0.block.ff_i.gate"


def test_a_quantised_layer_out_of_reach_is_named(server, base):
    plain = family_lora(base, "hidream", "native", seed=81, name="gate_plain", include=lambda m: "attn1.to_q" in m)
    checkpoint = load_file(base / "models" / "diffusion_models" / "tiny_hidream.safetensors")
    out, width = checkpoint[GATE.removeprefix("diffusion_model.") + ".weight"].shape
    factors = {f"{GATE}.lora_B.weight": 0.1 * torch.ones(out, 2), f"{GATE}.lora_A.weight": 0.1 * torch.ones(2, width)}
    save_file(dict(plain.tensors) | factors, base / "models" / "loras" / "gate.safetensors")
    server.schemas(refresh=True)
    graph = MergeGraph(server)
    model = graph.add("UNETLoader", unet_name="tiny_hidream.safetensors", weight_dtype="fp8_e4m3fn")
    lora = graph.pack("SSRLoRA", lora="gate.safetensors", conditioning=graph.conditioning("hidream", 501))
    merged = graph.join("SSRMerge", [lora], model=model, latent=graph.latent("hidream"))
    report = graph.add("PreviewAny", source=merged.out(4))
    text = server.run(graph.prompt).ok().text(report)
    assert "applied in the forward pass" in text
    assert "Out of the hooks' reach, patched and rounded: 1 quantised layer," in text and GATE in text
