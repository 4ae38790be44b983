"""Cancel and failures while a forward merge samples leave no hook behind and no weight changed."""

import pytest

from .merging import MergeGraph, pair
from .quantised import latent_of
from .test_interrupt import state_of

CASE = "flux-fused-split"


@pytest.mark.parametrize("kind", ["out of memory", "broken"])
def test_a_failure_in_the_middle_of_a_sampling(server, base, kind):
    family, tasks = pair(base, CASE)
    before = state_of(server, family, f"forward_before_{kind}")
    graph = MergeGraph(server)
    merged = graph.merge(family, tasks, apply="forward")
    saved = graph.sample(family, graph.add("FailingModel", model=merged, call=2, kind=kind), steps=3)
    sampler = graph.prompt[saved.id]["inputs"]["samples"][0]
    result = server.run(graph.prompt)
    assert result.status == "error" and result.error_node == sampler and "planted" in result.error
    assert state_of(server, family, f"forward_after_{kind}") == before and before["hooks"] == 0


def test_cancel_in_the_middle_of_a_sampling(server, base):
    family, tasks = pair(base, CASE)
    before = state_of(server, family, "forward_before_cancel")
    graph = MergeGraph(server)
    saved = graph.sample(family, graph.merge(family, tasks, apply="forward"), steps=400)
    sampler = graph.prompt[saved.id]["inputs"]["samples"][0]
    prompt = server.submit(graph.prompt)
    server.wait_event(prompt, lambda event, data: event == "progress" and data["node"] == sampler and data["value"] > 1)
    server.interrupt()
    assert server.wait(prompt, timeout=60).status == "interrupted"
    assert state_of(server, family, "forward_after_cancel") == before and before["hooks"] == 0


def test_the_same_merge_samples_again_the_same(server, base):
    """After a failure and a cancel the MODEL that ComfyUI kept still works."""
    family, tasks = pair(base, CASE)
    latents = []
    for prefix in ("first", "second"):
        graph = MergeGraph(server)
        merged = graph.merge(family, tasks, apply="forward")
        # another number here makes ComfyUI sample again with the cached MODEL
        failing = graph.add("FailingModel", model=merged, call=10**6 + len(prefix), kind="broken")
        saved = graph.sample(family, failing)
        result = server.run(graph.prompt).ok()
        assert merged.id in result.cached or prefix == "first"
        latents.append(latent_of(base, result, saved))
    assert (latents[0] - latents[1]).norm() == 0.0
