"""What runs again when something changes, and what does not."""

import os
import shutil

from .loras import family_lora
from .merging import MergeGraph, pair, summed
from .weights import assert_added, base_weights, dumped

FAMILY, CASE = "flux", "flux-fused-split"


def two_step(server, tasks, **solve):
    """SSR Calibrate -> SSR Solve -> dump; returns the graph and its last two nodes."""
    graph = MergeGraph(server)
    model = graph.checkpoint(FAMILY)
    calibration = graph.merge(FAMILY, tasks, "SSRCalibrate", model=model)
    solved = graph.pack("SSRSolve", {"model": model, "calibration": calibration} | solve)
    return graph, solved, graph.dump(solved, "two_step")


def test_the_same_graph_again_runs_nothing(server, base):
    _, tasks = pair(base, CASE)
    graph, _, _ = two_step(server, tasks)
    server.run(graph.prompt).ok()
    again = server.run(graph.prompt).ok()
    assert not again.executed and again.cached == graph.prompt.keys()


def test_solve_settings_run_only_the_solve(server, base):
    _, tasks = pair(base, CASE)
    graph, _, _ = two_step(server, tasks)
    server.run(graph.prompt).ok()
    for change in ({"ridge": 0.05}, {"strengths": "0.5\n0.25"}, {"mode": "gains"}, {"anchor": "average"}):
        graph, solved, dump = two_step(server, tasks, **change)
        assert set(server.run(graph.prompt).ok().executed) == {solved.id, dump.id}, change


def test_solve_equals_merge_and_follows_its_strengths(server, base):
    _, tasks = pair(base, CASE)
    graph, _, _ = two_step(server, tasks)
    whole = MergeGraph(server)
    whole.dump(whole.merge(FAMILY, tasks), "one_step")
    server.run(graph.prompt).ok()
    server.run(whole.prompt).ok()
    before, one = base_weights(base, FAMILY), dumped(base, "one_step")
    deltas = {name: one[name].double() - before[name].double() for name in summed(tasks)}
    assert_added(dumped(base, "two_step"), before, deltas, tolerance=1e-6)
    graph, _, _ = two_step(server, tasks, strengths="0.5\n-0.25 1", mode="sum")
    server.run(graph.prompt).ok()
    expected = {name: 0.5 * part.delta for name, part in tasks[0].file.truth.items()}
    for name, part in tasks[1].file.truth.items():
        expected[name] = expected.get(name, 0) - 0.25 * part.delta
    assert_added(dumped(base, "two_step"), before, expected, tolerance=2e-5)


def test_a_replaced_file_runs_again_and_a_touched_one_does_not(server, base):
    _, tasks = pair(base, CASE)
    changing = family_lora(base, FAMILY, "kohya", seed=60, name="changing")

    def graph_of_sum():
        graph = MergeGraph(server)
        loras = [graph.pack("SSRLoRA", lora=changing.name), graph.lora(FAMILY, tasks[1])]
        values = {"model": graph.checkpoint(FAMILY), "latent": graph.latent(FAMILY), "mode": "sum"}
        texts = graph.conditioning(FAMILY, 1)
        graph.prompt[loras[0].id]["inputs"]["conditioning"] = texts.out(0)
        graph.dump(graph.join("SSRMerge", loras, **values), "changing")
        return graph, loras[0]

    graph, node = graph_of_sum()
    server.run(graph.prompt).ok()
    stat = changing.path.stat()
    os.utime(changing.path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert node.id not in server.run(graph_of_sum()[0].prompt).ok().executed
    other = family_lora(base, FAMILY, "kohya", seed=61, name="replacement")
    shutil.copy(other.path, changing.path)
    assert node.id in server.run(graph_of_sum()[0].prompt).ok().executed
    expected = {name: part.delta for name, part in other.truth.items()}
    for name, delta in tasks[1].scaled().items():
        expected[name] = expected.get(name, 0) + delta
    assert_added(dumped(base, "changing"), base_weights(base, FAMILY), expected, tolerance=2e-5)


def test_saved_calibration_gives_the_same_merge(server, base):
    _, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    model = graph.checkpoint(FAMILY)
    merged = graph.merge(FAMILY, tasks, model=model)
    graph.dump(merged, "before_saving")
    graph.pack("SSRSaveCalibration", calibration=merged.out(3), filename_prefix="kept")
    server.run(graph.prompt).ok()
    listed = server.schemas(refresh=True)["SSRLoadCalibration"]["input"]["required"]["calibration"][1]["options"]
    name = next(option for option in listed if "kept" in option)
    again = MergeGraph(server)
    loaded = again.pack("SSRLoadCalibration", calibration=name)
    again.dump(again.pack("SSRSolve", model=again.checkpoint(FAMILY), calibration=loaded), "after_loading")
    server.run(again.prompt).ok()
    before, first = base_weights(base, FAMILY), dumped(base, "before_saving")
    deltas = {name: first[name].double() - before[name].double() for name in summed(tasks)}
    assert_added(dumped(base, "after_loading"), before, deltas, tolerance=1e-5)
