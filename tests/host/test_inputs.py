"""Every way to hand LoRAs to SSR Merge means the same: files, chains, stacks, LORA_MODELs."""

import json

import pytest

from .merging import SEED, MergeGraph, pair, summed
from .weights import assert_added, base_weights, dumped

FAMILY, CASE = "flux", "flux-fused-split"
PROMPTS = "a fox\na hare"


def chain(graph, tasks):
    first = graph.lora(FAMILY, tasks[0])
    return [graph.lora(FAMILY, tasks[1], previous=first)]


def chain_with_a_disabled_link(graph, tasks):
    first = graph.lora(FAMILY, tasks[0])
    off = graph.lora(FAMILY, tasks[1], previous=first, enabled=False)
    return [graph.lora(FAMILY, tasks[1], previous=off)]


def lora_models(graph, tasks):
    return [
        graph.lora(FAMILY, task, lora="None", lora_model=graph.add("LoraModelFromFile", name=task.file.name))
        for task in tasks
    ]


def stack(graph, tasks):
    entries = json.dumps([[task.file.name, task.strength, task.strength] for task in tasks])
    return [graph.pack("SSRLoRA", lora_stack=graph.add("MakeStack", entries=entries), prompts=PROMPTS)]


def last_socket_open(graph, tasks):
    return [graph.lora(FAMILY, task) for task in tasks]


@pytest.mark.parametrize("way", [chain, chain_with_a_disabled_link, lora_models, stack, last_socket_open])
def test_the_sum_is_the_same_however_loras_arrive(server, base, way):
    _, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    clip = graph.add("TinyCLIP", kind=FAMILY, seed=0)
    merged = graph.join("SSRMerge", way(graph, tasks), model=graph.checkpoint(FAMILY), clip=clip, mode="sum")
    graph.dump(merged, f"way_{way.__name__}")
    server.run(graph.prompt).ok()
    assert_added(dumped(base, f"way_{way.__name__}"), base_weights(base, FAMILY), summed(tasks), tolerance=2e-5)


def test_chain_and_sockets_give_the_same_router(server, base):
    _, tasks = pair(base, CASE)
    for way in (chain, last_socket_open):
        graph = MergeGraph(server)
        values = {"model": graph.checkpoint(FAMILY), "latent": graph.latent(FAMILY), "seed": SEED}
        graph.dump(graph.join("SSRMerge", way(graph, tasks), **values), f"router_{way.__name__}")
        server.run(graph.prompt).ok()
    before, one = base_weights(base, FAMILY), dumped(base, "router_chain")
    deltas = {name: one[name].double() - before[name].double() for name in summed(tasks)}
    assert_added(dumped(base, "router_last_socket_open"), before, deltas, tolerance=1e-6)


@pytest.mark.parametrize("mode", ["ssr", "paper", "gains", "sum", "average", "np_lora"])
@pytest.mark.parametrize("case", ["flux-split-split", "wan21"])
def test_every_mode_runs_on_its_own_empty_latent(server, base, mode, case):
    family, tasks = pair(base, case)
    graph = MergeGraph(server)
    loras = [graph.lora(family, task) for task in tasks]
    merged = graph.join("SSRMerge", loras, model=graph.checkpoint(family), mode=mode, frames=5)
    graph.sample(family, merged)
    report = graph.add("PreviewAny", source=merged.out(4))
    text = server.run(graph.prompt).ok().text(report)
    assert all(task.file.name in text for task in tasks)
