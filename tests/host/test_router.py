"""Mode ssr against a dense float64 least-squares solution on inputs recorded from ComfyUI's own loaders.

LoRA k is applied alone by core's LoraLoaderModelOnly and sampled by core's SamplerCustomAdvanced, with
the same noise, sigmas and conditioning; every layer's full input is recorded. From there on the
reference shares nothing with the pack.
"""

import pytest
import torch

from .merging import OTHER_FAMILIES, PAIRS, MergeGraph, averaged, pair, record, row_groups, summed
from .reference import Recording, routed
from .weights import assert_added, base_weights, dumped, relative_error

RIDGE = 1e-3
STEPS = {"flux-fused-split": 3}


def expected_deltas(base, tasks, prefix, rounds=1, **options):
    """The reference's merged delta of every weight; each round recorded every task once."""
    recordings = [Recording(base, f"{prefix}_{index}") for index in range(rounds * len(tasks))]
    merged = {}
    for name in {name for task in tasks for name in task.file.truth}:
        owners = [index for index, task in enumerate(tasks) if name in task.file.truth]
        parts = [tasks[index].file.truth[name] for index in owners]
        deltas = [tasks[index].strength * part.delta.flatten(1) for index, part in zip(owners, parts, strict=True)]
        inputs = [torch.cat([one.rows(name) for one in recordings[index :: len(tasks)]]) for index in owners]
        whole = deltas[0].new_zeros(deltas[0].shape)
        for start, rows in row_groups(parts):
            span = slice(start, start + rows)
            here = [position for position, delta in enumerate(deltas) if bool(delta[span].any())]
            if len(here) == 1:  # nothing to tell apart: the LoRA stays as it is
                whole[span] = deltas[here[0]][span]
            else:
                whole[span] = routed([inputs[p] for p in here], [deltas[p][span] for p in here], RIDGE, **options)
        merged[name] = whole.reshape(parts[0].delta.shape)
    return merged


def compare(server, base, case, **options):
    """Run both sides; the reference's deltas."""
    family, tasks = pair(base, case)
    steps = STEPS.get(case, 1)
    for index, task in enumerate(tasks):
        record(server, family, task, steps, f"router_{case}_{index}")
    graph = MergeGraph(server)
    model = graph.checkpoint(family)
    refined = options.pop("refine", False)
    values = {"anchor": "sum", "sampled_tokens": 640 if refined else 0} | options
    options |= {"refine": refined}
    sigmas = graph.first_sigmas(model, steps)
    graph.dump(graph.merge(family, tasks, model=model, sigmas=sigmas, ridge=RIDGE, **values), f"router_{case}")
    server.run(graph.prompt).ok()
    expected = expected_deltas(base, tasks, f"router_{case}", **options)
    assert_added(dumped(base, f"router_{case}"), base_weights(base, family), expected, tolerance=1e-3)
    return tasks, expected


@pytest.mark.parametrize("case", [*PAIRS, *OTHER_FAMILIES])
def test_router_equals_the_dense_reference(server, base, case):
    tasks, expected = compare(server, base, case)
    for trivial in (summed(tasks), averaged(tasks)):  # the comparison must be able to fail
        assert sorted(relative_error(delta, trivial[name]) for name, delta in expected.items())[-5] > 0.2


@pytest.mark.parametrize("case", ["flux-fused-split", "sdxl-convolutions"])
def test_refinement_equals_the_dense_regression(server, base, case):
    _, refined = compare(server, base, case, refine=True)
    _, plain = compare(server, base, case)
    assert sorted(relative_error(delta, plain[name]) for name, delta in refined.items())[-5] > 0.05


@pytest.mark.parametrize("options", [{"anchor": "average"}, {"anchor": "zero"}, {"balance": False}], ids=str)
def test_anchor_and_balance_mean_what_they_say(server, base, options):
    compare(server, base, "zimage-fused-split", **options)
