"""OSRM Init through the real server, against dense references on inputs recorded by core's nodes."""

import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .kohya import adapted_layers, start_from
from .merging import MergeGraph
from .osrm import DOWN, FAMILIES, UP, downs, init, init_file, record, train, trained_file, write_lora_file
from .quantised import latent_of
from .reference import Recording
from .weights import base_weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("features", ["tokens", "means"])
def test_init_is_orthogonal_to_the_top_directions_of_the_others(server, base, family, features):
    seeds = (601, 602)
    for seed in seeds:
        record(server, family, seed, f"osrm_{family}_{seed}")
    graph = MergeGraph(server)
    node = init(graph, family, seeds, f"init_{family}_{features}", features=features, exact_limit=4096)
    tensors = load_file(init_file(server.run(graph.prompt).ok(), node))
    found, checked = downs(tensors), 0
    recordings = [Recording(base, f"osrm_{family}_{seed}") for seed in seeds]
    assert len(found) > 15 and not any(value.any() for name, value in tensors.items() if "lora_up" in name)
    for name, down in found.items():
        assert float((down @ down.T - torch.eye(4)).abs().max()) < 1e-5
        rows = [one.rows(name) for one in recordings]
        if features == "means":
            rows = [one.mean(dim=0, keepdim=True) for one in rows]
        stacked = torch.cat([one / len(one) ** 0.5 for one in rows])
        _, values, right = torch.linalg.svd(stacked, full_matrices=True)
        energy = torch.zeros(len(right)).double()
        energy[: len(values)] = values.square()
        seen, least = float((stacked @ down.T).square().sum()), float(energy[-4:].sum())
        assert seen - least < 1e-5 * float(energy.sum()), name
        top = right[: min(len(right) - 4, int((energy > 1e-3 * energy[0]).sum()))]
        assert float((down @ top.T).abs().max()) < 0.05, name
        checked += 1
    assert checked == len(found)


@pytest.mark.parametrize("features", ["tokens", "means"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_from_the_start_with_cores_trainer(server, base, family, features):
    """From the Init file and from core's own start, the same training; compared at equal effect on its own task."""
    own, others, tag = 701, (601, 602), f"{family}_{features}"
    graph = MergeGraph(server)
    start = init(graph, family, others, f"start_{tag}", features=features)
    train(graph, family, own, start, f"osrm_{tag}", steps=8)
    path = init_file(server.run(graph.prompt).ok(), start)
    graph = MergeGraph(server)
    train(graph, family, own, "[None]", f"ordinary_{tag}", steps=8)
    server.run(graph.prompt).ok()
    before, trained = downs(load_file(path)), trained_file(base, f"osrm_{tag}")
    after = downs(trained)
    cosines = [float((before[n] * after[n]).sum() / before[n].norm() / after[n].norm()) for n in before]
    ups = [trained[name.removesuffix(".weight") + UP] for name in before]
    assert min(cosines) > 0.98  # it starts from the file's rows and stays close to them
    assert sum(bool(up.any()) for up in ups) > 0.9 * len(before)
    effects = {}
    for kind, tensors in (("osrm", trained), ("ordinary", trained_file(base, f"ordinary_{tag}"))):
        only = {key: value for key, value in tensors.items() if module_of(key) in before}
        name = write_lora_file(base, f"{kind}_{tag}.safetensors", only)
        server.schemas(refresh=True)
        effects[kind] = effects_on_others(server, base, family, name, own, others)
    print(f"\neffect on the others {tag}: {effects}")
    least = 0.9 if features == "tokens" else 1.0  # means of two prompts say little about single tokens
    for osrm, ordinary in zip(effects["osrm"], effects["ordinary"], strict=True):
        assert osrm < least * ordinary


def module_of(key):
    """The host's weight name of a key with comfy names."""
    return re.sub(r"\.(lora_(up|down)\.weight|alpha)$", "", key) + ".weight"


def effects_on_others(server, base, family, name, own, others, strength=0.2):
    """How far a LoRA moves the others' samples, over how far it moves its own."""
    graph, nodes = MergeGraph(server), {}
    for seed in (own, *others):
        plain = graph.checkpoint(family)
        nodes[seed] = [sampled(graph, family, model, seed) for model in (plain, graph.core_lora(plain, name, strength))]
    result = server.run(graph.prompt).ok()
    moved = {}
    for seed, pair in nodes.items():
        before, after = (latent_of(base, result, node) for node in pair)
        moved[seed] = float((after - before).norm())
    return [moved[seed] / moved[own] for seed in others]


def sampled(graph, family, model, seed):
    latent = graph.add(
        "KSampler",
        model=model,
        positive=graph.conditioning(family, seed),
        negative=graph.conditioning(family, 100),
        latent_image=graph.latent(family),
        seed=7,
        steps=1,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    return graph.add("SaveLatent", samples=latent, filename_prefix="host/osrm")


def test_kohya_names_are_those_of_kohyas_trainers(server, base):
    graph = MergeGraph(server)
    seeds = (601,)
    comfy = init(graph, "sd15", seeds, "names_comfy")
    kohya = init(graph, "sd15", seeds, "names_kohya", key_style="kohya", alpha=2.0)
    flux = init(graph, "flux", seeds, "names_flux", key_style="kohya")
    result = server.run(graph.prompt).ok()
    first, second, third = (load_file(init_file(result, node)) for node in (comfy, kohya, flux))
    pairs = {
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": "lora_unet_down_blocks_0_attentions_0_"
        "transformer_blocks_0_attn1_to_q",
        "diffusion_model.input_blocks.1.1.proj_in": "lora_unet_down_blocks_0_attentions_0_proj_in",
        "diffusion_model.input_blocks.1.0.in_layers.2": "lora_unet_down_blocks_0_resnets_0_conv1",
    }
    for ours, theirs in pairs.items():
        down = second[theirs + DOWN]
        assert torch.equal(down.flatten(1), first[ours + DOWN]) and float(second[theirs + ".alpha"]) == 2.0
        assert first[ours + DOWN].ndim == 2
    assert second[pairs["diffusion_model.input_blocks.1.1.proj_in"] + DOWN].ndim == 4
    assert len(first) == len(second)
    assert "lora_unet_double_blocks_0_img_attn_qkv" + DOWN in third
    with safe_open(init_file(result, kohya), "pt") as file:
        assert file.metadata()["ss_network_dim"] == "4" and file.metadata()["ss_network_alpha"] == "2"


@pytest.mark.parametrize(
    ("family", "beside"),
    [
        ("sd15", {"conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2"}),
        ("sdxl", {"input_blocks_0_0", "out_2", *(f"{n}_{i}" for n in ("time_embed", "label_emb_0") for i in (0, 2))}),
        ("flux", {"final_layer_linear", "final_layer_adaLN_modulation_1"}),
        ("lumina2", {"x_embedder", "cap_embedder_1", "t_embedder_mlp_0", "t_embedder_mlp_2"}),
    ],
)
def test_a_kohya_style_trainer_starts_from_the_file(server, base, family, beside):
    """Every layer that it adapts takes down, up and alpha from the file; the rest stand around its blocks."""
    graph = MergeGraph(server)
    node = init(graph, family, (601,), f"network_weights_{family}", key_style="kohya", alpha=2.0)
    tensors = load_file(init_file(server.run(graph.prompt).ok(), node))
    layers = adapted_layers(family, base_weights(base, family))
    network, dropped = start_from(tensors, layers)
    assert len(layers) > 15 and {name for name, _ in network.named_children()} == set(layers)
    for name, pair in network.named_children():
        down = pair.lora_down.weight.detach().flatten(1)
        assert float((down @ down.T - torch.eye(4)).abs().max()) < 1e-5, name
        assert float(pair.alpha) == 2.0 and not pair.lora_up.weight.any(), name
    assert dropped == {f"lora_unet_{name}" for name in beside}


def test_prompts_and_the_text_encoder(server, base):
    graph = MergeGraph(server)
    clip = graph.add("TinyCLIP", kind="sd15", seed=0)
    texts = ["a photo of a red fox", "a watercolour of a heron"]
    for number, text in enumerate(texts):
        graph.add("RecordTextInputs", clip=clip, text=text, prefix=f"osrm_te_{number}")
    prompts = {"clip": clip, "prompts": "\n".join(texts), "text_encoder": True, "padding": "include"}
    node = init(graph, "sd15", (), "init_te", features="means", only="mlp.fc1|attn1.to_q", **prompts)
    result = server.run(graph.prompt).ok()
    found = downs(load_file(init_file(result, node)))
    names = [name for name in found if "fc1" in name]
    assert names and any("to_q" in name for name in found) and not [n for n in found if "to_k" in n]
    for name in names:
        weight = name.removeprefix("text_encoders.")
        for number in range(2):
            x = Recording(base, f"osrm_te_{number}").rows(weight).mean(dim=0)
            assert float((found[name] @ x).norm()) < 1e-4 * float(x.norm())


@pytest.mark.parametrize("prefix", ["../../outside", "x_3_steps_y", "sub/"])
def test_init_refuses_names_that_lead_outside_or_are_misread(server, base, prefix):
    graph = MergeGraph(server)
    init(graph, "lumina2", (601,), prefix)
    result = server.run(graph.prompt)
    assert result.status == "error" and "SSR-Merge" in result.error
    assert not list(base.parent.glob("outside*")) and not list(base.rglob("*outside*.safetensors"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"only": "no such layer"}, "none of the model's"),
        ({"only": "("}, "no regular expression"),
        ({"rank": 1024}, "room for rank 1024"),
        ({"memory_budget_gb": 0.0005, "exact_limit": 4096}, "exact_limit"),
        ({"others.other0": None}, "no other tasks"),
    ],
)
def test_init_says_what_is_wrong(server, base, options, words):
    graph = MergeGraph(server)
    options = dict(options)
    seeds = () if "others.other0" in options else (601,)
    options.pop("others.other0", None)
    init(graph, "lumina2", seeds, "wrong", **options)
    result = server.run(graph.prompt)
    assert result.status == "error" and words in result.error
    assert not list((base / "output" / "loras").glob("*wrong*"))
