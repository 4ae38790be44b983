"""Without conversion, keys that are not low-rank: refused by name, or passed through as ComfyUI applies them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from .loras import family_lora
from .merging import MergeGraph
from .weights import base_weights, dumped, relative_error

FAMILY = "flux"
HIDDEN = 128


def file_with(base, name, extra, layers=("img_in",)):
    """A plain LoRA of a few layers plus tensors of other kinds."""
    plain = family_lora(base, FAMILY, "native", seed=61, name=f"{name}_plain", include=lambda m: m in layers)
    tensors = load_file(plain.path) | extra
    path = base / "models" / "loras" / f"{name}.safetensors"
    save_file(tensors, path)
    return path.name


def rand(seed, *shape):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYER = "diffusion_model.double_blocks.0.img_attn.proj"
KINDS = {
    "loha": {
        f"{LAYER}.hada_w1_a": rand(1, HIDDEN, 4),
        f"{LAYER}.hada_w1_b": rand(2, 4, HIDDEN),
        f"{LAYER}.hada_w2_a": rand(3, HIDDEN, 4),
        f"{LAYER}.hada_w2_b": rand(4, 4, HIDDEN),
    },
    "lokr": {f"{LAYER}.lokr_w1": rand(5, 8, 8), f"{LAYER}.lokr_w2": rand(6, 16, 16)},
    "dora": {
        f"{LAYER}.lora_up.weight": rand(7, HIDDEN, 4),
        f"{LAYER}.lora_down.weight": rand(8, 4, HIDDEN),
        f"{LAYER}.dora_scale": 1 + rand(9, HIDDEN, 1),
    },
    "diff": {f"{LAYER}.diff": rand(10, HIDDEN, HIDDEN)},
    "set_weight": {f"{LAYER}.set_weight": rand(11, HIDDEN, HIDDEN)},
    "bias": {f"{LAYER}.diff_b": rand(12, HIDDEN)},
}


def run(server, name, **options):
    """Merge the file with a plain LoRA that shares the layer."""
    graph = MergeGraph(server)
    other = family_lora(server.base, FAMILY, "native", seed=62, name="other_plain", include=_shares)
    server.schemas(refresh=True)
    entries = [
        graph.pack("SSRLoRA", lora=file, conditioning=graph.conditioning(FAMILY, seed), convert_rank=0)
        for file, seed in ((name, 501), (other.name, 502))
    ]
    merged = graph.join("SSRMerge", entries, model=graph.checkpoint(FAMILY), latent=graph.latent(FAMILY), **options)
    graph.dump(merged, f"adapter_{name}")
    return graph, merged, other


def _shares(module):
    return module in ("img_in", "double_blocks.0.img_attn.proj")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bias"])
def test_refused_by_default_with_the_key(server, base, kind):
    graph, merged, _ = run(server, file_with(base, f"refuse_{kind}", KINDS[kind]))
    result = server.run(graph.prompt)
    assert result.status == "error" and result.error_node == merged.id
    assert f"refuse_{kind}" in result.error and any(key in result.error for key in KINDS[kind])
    assert "pass_through" in result.error


@pytest.mark.parametrize("kind", KINDS)
def test_passed_through_equals_cores_own_loader(server, base, kind):
    name = file_with(base, f"pass_{kind}", KINDS[kind])
    graph, _, other = run(server, name, unsupported="pass_through", mode="sum")
    server.run(graph.prompt).ok()
    chain = MergeGraph(server)
    model = chain.core_lora(chain.checkpoint(FAMILY), name, 1.0)
    chain.dump(chain.core_lora(model, other.name, 1.0), f"chain_{name}")
    server.run(chain.prompt).ok()
    ours, core, before = (dumped(base, f"adapter_{name}"), dumped(base, f"chain_{name}"), base_weights(base, FAMILY))
    for key in before:
        assert relative_error(ours[key].double(), core[key].double()) < 2e-5, key
    changed = f"{LAYER}.{'bias' if kind == 'bias' else 'weight'}"
    assert relative_error(core[changed].double(), before[changed].double()) > 1e-3


def test_a_lora_alone_has_its_biases_during_calibration(server, base):
    """A large bias on the first layer changes what every later layer sees, and so the router there."""
    layers = ("img_in", LAYER.removeprefix("diffusion_model."))
    before, found = base_weights(base, FAMILY)[f"{LAYER}.weight"], {}
    for name, extra in (("none", {}), ("small", rand(3, HIDDEN) * 1e-6), ("large", 30 * rand(4, HIDDEN))):
        tensors = {"diffusion_model.img_in.diff_b": extra} if isinstance(extra, torch.Tensor) else {}
        file = file_with(base, f"bias_{name}", tensors, layers)
        graph, _, _ = run(server, file, mode="ssr")
        server.run(graph.prompt).ok()
        found[name] = dumped(base, f"adapter_{file}")[f"{LAYER}.weight"].double() - before.double()
    assert relative_error(found["small"], found["none"]) < 1e-3
    assert relative_error(found["large"], found["none"]) > 1e-2


def test_factors_without_their_partner_are_an_error_that_names_them(server, base):
    name = file_with(base, "half", {f"{LAYER}.lora_up.weight": rand(1, HIDDEN, 4)})
    graph, _, _ = run(server, name, unsupported="pass_through")
    result = server.run(graph.prompt)
    assert result.status == "error" and "half" in result.error and "img_attn.proj" in result.error
