"""A merge in the forward pass among everything else that may sit on a MODEL.

On a float32 base forward and weights mean the same, so each graph is sampled both ways and compared.
"""

import pytest

from .loras import family_lora
from .merging import MergeGraph, Task, pair
from .quantised import latent_of
from .weights import facts

CASE = "flux-fused-split"


def chain(graph, family, model, tasks, apply):
    first = graph.merge(family, tasks, model=model, apply=apply)
    return graph.merge(family, [tasks[1]], model=first, apply=apply, mode="sum")


def hooked_conditioning(graph, family, file):
    """A conditioning that switches a LoRA on for itself alone."""
    hooks = graph.add("CreateHookLoraModelOnly", lora_name=file, strength_model=0.7)
    text = graph.conditioning(family, 100)
    values = {"cond_NEW": text, "strength": 1.0, "set_cond_area": "default", "hooks": hooks}
    return graph.add("ConditioningSetProperties", values)


def build(graph, family, tasks, other, company, apply):
    """The MODEL to sample, and the conditioning."""
    model, text = graph.checkpoint(family), graph.conditioning(family, 100)
    bypass = {"lora_name": other.name, "strength_model": 0.7}
    if company == "lora upstream":
        model = graph.core_lora(model, other.name, 0.7)
    if company == "bypass lora upstream":
        model = graph.add("LoraLoaderBypassModelOnly", bypass, model=model)
    if company == "two merges":
        return chain(graph, family, model, tasks, apply), text
    model = graph.merge(family, tasks, model=model, apply=apply)
    if company == "lora downstream":
        model = graph.core_lora(model, other.name, 0.7)
    if company == "bypass lora downstream":
        model = graph.add("LoraLoaderBypassModelOnly", bypass, model=model)
    if company == "lora of one conditioning":
        text = hooked_conditioning(graph, family, other.name)
    if company == "low memory":
        model = graph.add("LowMemoryModel", model=model)
    if company == "compiled":
        model = graph.add("CompiledModel", model=model, backend="eager")
    return model, text


def sample(graph, family, model, text, custom):
    """KSampler or SamplerCustomAdvanced, two steps with a negative prompt."""
    if not custom:
        latent = graph.add(
            "KSampler",
            model=model,
            positive=text,
            negative=graph.conditioning(family, 101),
            latent_image=graph.latent(family),
            seed=3,
            steps=2,
            cfg=2.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )
    else:
        latent = graph.add(
            "SamplerCustomAdvanced",
            noise=graph.add("RandomNoise", noise_seed=3),
            guider=graph.add("BasicGuider", model=model, conditioning=text),
            sampler=graph.add("KSamplerSelect", sampler_name="euler"),
            sigmas=graph.first_sigmas(model, 2),
            latent_image=graph.latent(family),
        )
    return graph.add("SaveLatent", samples=latent, filename_prefix="host/company")


def latents(server, base, company, apply, custom=False):
    family, tasks = pair(base, CASE)
    other = family_lora(base, family, "native", seed=71, name="company")
    server.schemas(refresh=True)
    graph = MergeGraph(server)
    model, text = build(graph, family, tasks, other, company, apply)
    saved = sample(graph, family, model, text, custom)
    return latent_of(base, server.run(graph.prompt).ok(), saved)


COMPANY = (
    "nobody",
    "lora upstream",
    "lora downstream",
    "bypass lora upstream",
    "bypass lora downstream",
    "lora of one conditioning",
    "two merges",
    "low memory",
    "compiled",
)


def salted(graph, family, tasks, times):
    """The base model behind LoRA loaders of strength 0: ComfyUI would answer an equal graph from its cache."""
    model = graph.checkpoint(family)
    for _ in range(times):
        model = graph.core_lora(model, tasks[0].file.name, 0.0)
    return model


def plain(server, base, salt=0):
    """The base model alone, and what is left on it."""
    family, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    model = salted(graph, family, tasks, salt)
    dump = graph.dump(model, "company_base", base_only=True)
    saved = sample(graph, family, model, graph.conditioning(family, 100), False)
    result = server.run(graph.prompt).ok()
    return latent_of(base, result, saved), facts(result, dump)


@pytest.mark.parametrize("company", COMPANY)
def test_forward_equals_weights(server, base, company):
    before, state = plain(server, base)
    weights, forward = (latents(server, base, company, apply) for apply in ("weights", "forward"))
    after, left = plain(server, base, salt=1 + COMPANY.index(company))
    effect = (weights - before).norm()
    assert effect > 0.1 * before.norm()
    assert (forward - weights).norm() < 1e-4 * effect
    assert (after - before).norm() < 1e-5 * effect
    assert left == state and left["hooks"] == 0


def test_other_samplers(server, base):
    weights, forward = (latents(server, base, "nobody", apply, custom=True) for apply in ("weights", "forward"))
    assert (forward - weights).norm() < 1e-4 * weights.norm()


def test_base_and_merge_by_turns_when_compiled(server, base):
    """Graphs of torch.compile are kept by the model that both share."""
    family, tasks = pair(base, CASE)

    def compiled(merge, salt):
        graph = MergeGraph(server)
        model = salted(graph, family, tasks, salt)
        model = graph.merge(family, tasks, model=model, apply="forward") if merge else model
        model = graph.add("CompiledModel", model=model, backend="eager")
        saved = sample(graph, family, model, graph.conditioning(family, 100), False)
        return latent_of(base, server.run(graph.prompt).ok(), saved)

    alone, _ = plain(server, base)
    merged = latents(server, base, "nobody", "weights")
    effect = (merged - alone).norm()
    for turn in range(2):
        assert (compiled(False, turn) - alone).norm() < 1e-4 * effect
        assert (compiled(True, turn) - merged).norm() < 1e-4 * effect


def test_copies_on_other_devices_have_the_hooks_too(server, base):
    family, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    merged = graph.merge(family, tasks, apply="forward")
    other = graph.add("UNETLoader", unet_name=f"tiny_{family}.safetensors", weight_dtype="fp8_e4m3fn")
    node = graph.add("SecondDevice", model=merged, copy=other)
    found = facts(server.run(graph.prompt).ok(), node)
    assert found["inside"][0] == found["inside"][1] == 36 and found["after"] == [0, 0]


def test_a_merge_as_second_model_of_a_sampling_is_refused(server, base):
    """Its own wrapper is not asked there, so the merge would be lost in silence."""
    family, tasks = pair(base, CASE)
    results = {}
    for apply in ("weights", "forward"):
        graph = MergeGraph(server)
        merged = graph.merge(family, tasks, apply=apply)
        guider = graph.add(
            "DualModelGuider",
            model=graph.checkpoint(family),
            model_negative=merged,
            positive=graph.conditioning(family, 100),
            negative=graph.conditioning(family, 101),
            cfg=3.0,
        )
        latent = graph.add(
            "SamplerCustomAdvanced",
            noise=graph.add("RandomNoise", noise_seed=3),
            guider=guider,
            sampler=graph.add("KSamplerSelect", sampler_name="euler"),
            sigmas=graph.first_sigmas(merged, 1),
            latent_image=graph.latent(family),
        )
        graph.add("SaveLatent", samples=latent, filename_prefix="host/dual")
        results[apply] = server.run(graph.prompt)
    assert results["weights"].status == "success"
    assert results["forward"].status == "error" and "second model" in results["forward"].error


def test_a_merge_on_the_model_is_part_of_what_calibration_sees(server, base):
    family, tasks = pair(base, CASE)
    third = Task(family_lora(base, family, "native", seed=72, name="company_third"), 1.0, 503)
    server.schemas(refresh=True)
    graph = MergeGraph(server)
    plain_model = graph.checkpoint(family)
    under = graph.merge(family, [third], model=plain_model, apply="forward")
    calibration = graph.merge(family, tasks, "SSRCalibrate", model=under)
    reports = {}
    for name, model in (("same", under), ("other", plain_model)):
        solved = graph.pack("SSRSolve", model=model, calibration=calibration)
        reports[name] = graph.add("PreviewAny", source=solved.out(3))
    result = server.run(graph.prompt).ok()
    assert "made on another model" in result.text(reports["other"])
    assert "made on another model" not in result.text(reports["same"])
