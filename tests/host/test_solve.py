"""SSR Solve's own inputs: strengths, a subset of the LoRAs, calibrations that do not belong."""

import pytest

from .loras import family_lora
from .merging import MergeGraph, Task, pair
from .weights import assert_added, base_weights, dumped

FAMILY, CASE = "flux", "flux-fused-split"


def solve(server, tasks, *loras, family=FAMILY, **options):
    """SSR Calibrate -> SSR Solve with these SSR LoRA tasks connected to the solve; dumped."""
    graph = MergeGraph(server)
    model = graph.checkpoint(family)
    calibration = graph.merge(family, tasks, "SSRCalibrate", model=model)
    sockets = {f"loras.lora{index}": graph.lora(family, task) for index, task in enumerate(loras)}
    values = {"model": model, "calibration": calibration} | sockets | options
    graph.dump(graph.pack("SSRSolve", values), "solve")
    return server.run(graph.prompt)


def test_strength_zero_drops_a_lora(server, base):
    _, tasks = pair(base, CASE)
    solve(server, tasks, strengths="0\n0.6").ok()
    expected = {name: 0.6 * part.delta for name, part in tasks[1].file.truth.items()}
    assert_added(dumped(base, "solve"), base_weights(base, FAMILY), expected, tolerance=1e-5)


def test_connected_loras_choose_a_subset(server, base):
    _, tasks = pair(base, CASE)
    solve(server, tasks, tasks[0]).ok()
    assert_added(dumped(base, "solve"), base_weights(base, FAMILY), tasks[0].scaled(), tolerance=1e-5)


def test_dropping_one_of_three_equals_never_having_had_it(server, base):
    _, tasks = pair(base, CASE)
    third = Task(family_lora(base, FAMILY, "native", seed=95, name="third"), 1.0, 503)
    solve(server, [*tasks, third], *tasks).ok()
    three = dumped(base, "solve")
    solve(server, tasks).ok()
    before, two = base_weights(base, FAMILY), dumped(base, "solve")
    changed = {name for task in tasks for name in task.file.truth}
    deltas = {name: two[name].double() - before[name].double() for name in changed}
    assert_added(three, before, deltas, tolerance=1e-4)


def test_a_lora_that_was_not_calibrated_is_named(server, base):
    _, tasks = pair(base, CASE)
    stranger = Task(family_lora(base, FAMILY, "native", seed=96, name="stranger"), 1.0, 504)
    result = solve(server, tasks, tasks[0], stranger)
    assert result.status == "error" and stranger.file.name in result.error


def test_a_calibrated_lora_with_another_prompt_is_refused(server, base):
    _, tasks = pair(base, CASE)
    result = solve(server, tasks, tasks[0], Task(tasks[1].file, tasks[1].strength, 999))
    assert result.status == "error" and tasks[1].file.name in result.error


@pytest.mark.parametrize("strengths", ["1", "1\n1\n1", "one\ntwo", "1\nnan", "1\n1 2 3", "inf\n1"])
def test_strengths_that_make_no_sense_are_refused(server, base, strengths):
    _, tasks = pair(base, CASE)
    result = solve(server, tasks, strengths=strengths)
    assert result.status == "error" and "strength" in result.error and "SSR-Merge" in result.error


def test_damaged_calibration_file(server, base):
    folder = base / "output" / "calibrations"
    folder.mkdir(exist_ok=True)
    (folder / "damaged.calibration.safetensors").write_bytes(b"not a calibration")
    listed = server.schemas(refresh=True)["SSRLoadCalibration"]["input"]["required"]["calibration"][1]["options"]
    name = next(option for option in listed if "damaged" in option)
    graph = MergeGraph(server)
    loaded = graph.pack("SSRLoadCalibration", calibration=name)
    graph.dump(graph.pack("SSRSolve", model=graph.checkpoint(FAMILY), calibration=loaded), "damaged")
    result = server.run(graph.prompt)
    assert result.status == "error" and "damaged.calibration.safetensors" in result.error


def test_stack_with_another_number_of_prompts(server, base):
    _, tasks = pair(base, CASE)
    graph = MergeGraph(server)
    stack = graph.add("MakeStack", entries=f'[["{tasks[0].file.name}", 1, 1], ["{tasks[1].file.name}", 1, 1]]')
    lora = graph.pack("SSRLoRA", lora_stack=stack, prompts="one\ntwo\nthree")
    clip = graph.add("TinyCLIP", kind=FAMILY, seed=0)
    graph.sample(FAMILY, graph.join("SSRMerge", [lora], model=graph.checkpoint(FAMILY), clip=clip))
    result = server.run(graph.prompt)
    assert result.status == "error" and "prompt" in result.error
