"""A second round of calibration, on the merge of the first, against the dense reference."""

import torch

from .merging import MergeGraph
from .reference import Recording, routed
from .test_scenes import KIND, PROMPTS, RIDGE, merge_node, record, record_pass, tasks  # noqa: F401  (a fixture)
from .weights import assert_added, base_weights, dumped, relative_error

MIDDLE = 0.01
"""Ridge of the merge that the second round runs on: the default."""


def record_merged(server, tasks, prompt, prefix):  # noqa: F811
    """One pass with what SSR Merge makes of one round."""
    graph = MergeGraph(server)
    merged = merge_node(graph, tasks, ridge=MIDDLE)
    record_pass(server, graph, merged.out(0), merged.out(1), prompt, prefix)


def expected(base, tasks, names, suffix):  # noqa: F811
    """The router of all tokens of both rounds."""
    recordings = [
        [Recording(base, f"rounds_{number}_{kind}{suffix}") for kind in ("alone", "merged")]
        for number in range(len(tasks))
    ]
    merged = {}
    for name in names:
        owners = [index for index, task in enumerate(tasks) if name in task.file.truth]
        deltas = [tasks[index].strength * tasks[index].file.truth[name].delta for index in owners]
        shape, flat = deltas[0].shape, [delta.flatten(1) for delta in deltas]
        if len(owners) == 1:
            merged[name] = deltas[0]
            continue
        inputs = [torch.cat([one.rows(name) for one in recordings[index]]) for index in owners]
        merged[name] = routed(inputs, flat, RIDGE).reshape(shape)
    return merged


def test_two_rounds_equal_the_dense_reference_and_leave_the_model_alone(server, base, tasks):  # noqa: F811
    for number, prompt in enumerate(PROMPTS):
        record(server, tasks, prompt, (number,), f"rounds_{number}_alone")
        record_merged(server, tasks, prompt, f"rounds_{number}_merged")
    graph = MergeGraph(server)
    merged = merge_node(graph, tasks, rounds=2)
    graph.dump(merged, "rounds_model")
    graph.dump(merged.out(1), "rounds_text")
    graph.dump(graph.checkpoint(KIND), "rounds_base")
    server.run(graph.prompt).ok()
    models, text = base_weights(base, KIND), dumped(base, "scenes_clip")
    names = {name for task in tasks for name in task.file.truth}
    wanted = expected(base, tasks, names & models.keys(), "")
    assert_added(dumped(base, "rounds_model"), models, wanted, tolerance=1e-3)
    assert_added(dumped(base, "rounds_text"), text, expected(base, tasks, names & text.keys(), "_text"), tolerance=1e-3)
    assert_added(dumped(base, "rounds_base"), models, {}, tolerance=1e-3)
    once = MergeGraph(server)
    once.dump(merge_node(once, tasks), "rounds_once")
    server.run(once.prompt).ok()
    single = dumped(base, "rounds_once")
    moved = [relative_error(wanted[n], single[n].double() - models[n].double()) for n in wanted]
    assert max(moved) > 1e-2, "a second round changes nothing?"


def test_calibrating_and_solving_apart_gives_the_same(server, base, tasks):  # noqa: F811
    graph = MergeGraph(server)
    values = {"rounds": 2, "sampled_tokens": 16}
    graph.dump(merge_node(graph, tasks, **values), "rounds_whole")
    calibration = merge_node(graph, tasks, "SSRCalibrate", **values)
    model, clip = graph.checkpoint(KIND), graph.add("TinyCLIP", kind=KIND, seed=0)
    solved = graph.pack("SSRSolve", model=model, clip=clip, calibration=calibration, ridge=RIDGE)
    graph.dump(solved, "rounds_solved")
    server.run(graph.prompt).ok()
    one, other = dumped(base, "rounds_whole"), dumped(base, "rounds_solved")
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
