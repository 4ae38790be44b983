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


def first_steps(event, data):
    """The progress bar moves."""
    return event == "progress" and bool(data["value"])


def second_round(event, data):
    """A step of the second round is done."""
    return event == "ssr_merge.progress" and data.get("round") == 1 and data.get("step", 0) > 0


@pytest.mark.parametrize("case", ["flux-fused-split", "sd15-convolutions"])
@pytest.mark.parametrize("kind", ["SSRMerge", "SSRCalibrate"])
def test_interrupted_calibration_leaves_nothing_behind(server, base, case, kind):
    interrupted(server, base, case, kind, first_steps, steps=100)


def test_interrupted_second_round_leaves_nothing_behind(server, base):
    interrupted(server, base, "flux-fused-split", "SSRMerge", second_round, steps=20, rounds=2)


def interrupted(server, base, case, kind, moment, **options):
    """Cancel at the first event of a kind; the model's state before and after, and a run behind it."""
    family, tasks = pair(base, case)
    before = state_of(server, family, f"before_{case}_{kind}")
    graph = MergeGraph(server)
    merged = graph.merge(family, tasks, kind, latent=graph.latent(family, 512), **options)
    graph.add("PreviewAny", source=merged)
    prompt = server.submit(graph.prompt)
    server.wait_event(prompt, lambda event, data: data.get("node") == merged.id and moment(event, data), timeout=120)
    server.interrupt()
    result = server.wait(prompt, timeout=60)
    assert result.status == "interrupted"
    after = state_of(server, family, f"after_{case}_{kind}")
    assert after == before and after["hooks"] == 0
    short = MergeGraph(server)
    short.sample(family, short.merge(family, tasks))
    server.run(short.prompt).ok()
    assert state_of(server, family, f"end_{case}_{kind}") == before
