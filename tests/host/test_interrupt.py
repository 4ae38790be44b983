"""Cancel during calibration leaves the model as it was, and the next run works."""

import pytest

from .graphs import Graph
from .merging import MergeGraph, pair
from .weights import facts


def state_of(server, family, tag):
    """Hooks and base-weight hash of the checkpoint that the server holds."""
    graph = Graph()
    loader = graph.checkpoint(family)
    dump = graph.dump(loader, tag, base_only=True)
    return facts(server.run(graph.prompt).ok(), dump)


@pytest.mark.parametrize("case", ["flux-fused-split", "sd15-convolutions"])
@pytest.mark.parametrize("kind", ["SSRMerge", "SSRCalibrate"])
def test_interrupted_calibration_leaves_nothing_behind(server, base, case, kind):
    family, tasks = pair(base, case)
    before = state_of(server, family, f"before_{case}_{kind}")
    graph = MergeGraph(server)
    merged = graph.merge(family, tasks, kind, steps=100, latent=graph.latent(family, 512))
    graph.add("PreviewAny", source=merged)
    prompt = server.submit(graph.prompt)
    server.wait_event(prompt, lambda event, data: event == "progress" and data["node"] == merged.id and data["value"])
    server.interrupt()
    result = server.wait(prompt, timeout=60)
    assert result.status == "interrupted"
    after = state_of(server, family, f"after_{case}_{kind}")
    assert after == before and after["hooks"] == 0
    short = MergeGraph(server)
    short.sample(family, short.merge(family, tasks))
    server.run(short.prompt).ok()
    assert state_of(server, family, f"end_{case}_{kind}") == before
