"""A merge beside what other nodes put on the same MODEL: attention patches, guidance patches, control nets.

Mode sum, so that core's chained LoRA loaders with the same guests are the truth; both ways of applying.
"""

import pytest

from .merging import MergeGraph, pair
from .quantised import latent_of
from .test_forward_company import sample

CASE = "sd15-convolutions"
GUESTS = ("nobody", "attention patch before", "attention patch after", "free u", "perturbed attention", "control net")


def guested(graph, model, text, guest, merge):
    """The MODEL with the LoRAs and the guest, and the conditioning."""
    if guest == "attention patch before":
        model = graph.add("AttentionGuest", model=model, share=0.3)
    model = merge(model)
    if guest == "attention patch after":
        model = graph.add("AttentionGuest", model=model, share=0.3)
    if guest == "free u":
        model = graph.add("FreeU_V2", model=model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)
    if guest == "perturbed attention":
        model = graph.add("PerturbedAttentionGuidance", model=model, scale=3.0)
    if guest == "control net":
        text = graph.add("ControlGuest", conditioning=text)
    return model, text


def latents(server, base, guest, how):
    family, tasks = pair(base, CASE)
    graph = MergeGraph(server)

    def merge(model):
        if how == "core":
            for task in tasks:
                model = graph.core_lora(model, task.file.name, task.strength)
            return model
        return graph.merge(family, tasks, model=model, apply=how, mode="sum") if how != "base" else model

    model, text = guested(graph, graph.checkpoint(family), graph.conditioning(family, 100), guest, merge)
    saved = sample(graph, family, model, text, custom=False)
    return latent_of(base, server.run(graph.prompt).ok(), saved)


@pytest.mark.parametrize("guest", GUESTS)
def test_with_a_guest_it_samples_like_cores_loaders(server, base, guest):
    core, plain = latents(server, base, guest, "core"), latents(server, base, guest, "base")
    effect = (core - plain).norm()
    assert effect > 0.01 * plain.norm()
    for how in ("weights", "forward"):
        assert (latents(server, base, guest, how) - core).norm() < 1e-3 * effect, how
    if guest != "nobody":
        alone = latents(server, base, "nobody", "base")
        assert (plain - alone).norm() > 1e-2 * alone.norm(), "the guest does nothing"
