"""Where the statistics of held-out tokens would not fit, calibration goes on without them and says so."""

import re

import pytest

from .merging import MergeGraph, pair
from .test_report import read, report_of
from .weights import assert_added, base_weights, dumped

CASE = "flux-fused-split"


def needed(server, base, budget):
    """GiB that a merge within `budget` asks for; None if it runs."""
    family, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    graph.sample(family, graph.merge(family, tasks, sampled_tokens=0, memory_budget_gb=budget))
    result = server.run(graph.prompt)
    if result.status == "success":
        return None
    assert "memory_budget_gb" in result.error, result.error
    return float(re.search(r"needs (\S+) GiB", result.error).group(1))


@pytest.fixture(scope="module")
def tight(server, base):
    """A budget that holds the statistics, but not those of held-out tokens as well."""
    budget = 1e-9
    for _ in range(3):  # the device's memory is named first, then the host's
        asked = needed(server, base, budget)
        if asked is None:
            return budget
        budget = asked * 1.005  # three digits are said
    raise AssertionError(f"{budget} GiB were asked for and not enough")


def merged(server, base, prefix, budget):
    """Report, and weights that the merge gives."""
    family, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    node = graph.merge(family, tasks, sampled_tokens=0, memory_budget_gb=budget)
    dump = report_of(graph, node.out(2))
    graph.dump(node, prefix)
    return read(server.run(graph.prompt).ok(), dump), dumped(base, prefix)


def test_the_merge_is_the_same_and_the_report_says_what_it_lacks(server, base, tight):
    roomy, expected = merged(server, base, "memory_roomy", 1.0)
    report, weights = merged(server, base, "memory_tight", tight)
    before = base_weights(base, pair(base, CASE)[0])
    deltas = {n: expected[n].double() - before[n].double() for n in before if (expected[n] != before[n]).any()}
    assert len(deltas) > 10
    assert_added(weights, before, deltas, tolerance=1e-6)
    for name, value in roomy["reconstruction_error_on_calibration"].items():
        assert report["reconstruction_error_on_calibration"][name] == pytest.approx(value, rel=1e-6)
    assert all(value is not None for value in roomy["reconstruction_error_held_out"].values())
    assert all(value is None for value in report["reconstruction_error_held_out"].values())
    assert not any("held out" in note for note in roomy["notes"])
    assert any(note.startswith("No tokens were held out") and "memory_budget_gb" in note for note in report["notes"])


def test_a_budget_for_both_keeps_the_held_out_tokens(server, base, tight):
    report, _ = merged(server, base, "memory_enough", 2 * tight)
    assert all(value is not None for value in report["reconstruction_error_held_out"].values())
