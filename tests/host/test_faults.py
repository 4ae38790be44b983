"""A model that fails in the second LoRA's pass: a clear message, nothing left behind, the next run works."""

import pytest

from .merging import MergeGraph, pair
from .test_interrupt import state_of


@pytest.mark.parametrize(
    ("kind", "words"),
    [("out of memory", ("out of memory while calibrating", "Nothing was changed", "width")), ("broken", ("planted",))],
)
@pytest.mark.parametrize("node", ["SSRMerge", "SSRCalibrate"])
def test_failure_in_the_second_pass(server, base, kind, words, node):
    family, tasks = pair(base, "flux-fused-split")
    before = state_of(server, family, f"before_{kind}_{node}")
    graph = MergeGraph(server)
    failing = graph.add("FailingModel", model=graph.checkpoint(family), call=2, kind=kind)
    merged = graph.merge(family, tasks, node, model=failing)
    graph.add("PreviewAny", source=merged)
    result = server.run(graph.prompt)
    assert result.status == "error" and result.error_node == merged.id
    assert all(word in result.error for word in words), result.error
    if kind == "out of memory":
        assert tasks[1].file.name in result.error
    after = state_of(server, family, f"after_{kind}_{node}")
    assert after == before and after["hooks"] == 0
    again = MergeGraph(server)
    again.sample(family, again.merge(family, tasks))
    server.run(again.prompt).ok()
