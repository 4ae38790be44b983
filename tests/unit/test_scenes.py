"""Joint and neutral prompts: their passes, what they add to router and correction, and where they stay."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    F64,
    LAYER,
    factors_of,
    linear64,
    lora,
    randn,
    rel,
    task,
)
from scene_world import IN, OUT, RANK, SCENES, SEEN, TASKS, TOKENS, calibrated, least_squares, masses, merged
from torch import nn

from ssr_core import (
    CalibrationError,
    PaperMerge,
    SampleOptions,
    Scene,
    SSRMerge,
    Target,
    build_stacks,
    calibrate,
    keep,
)
from ssr_core.lookup import Statistics
from ssr_core.methods.ssr import JOINT, NEUTRAL


def test_router_is_the_least_squares_answer_over_all_passes():
    found, _ = merged(calibrated())
    assert rel(found, least_squares(TOKENS, SEEN, SCENES)) < 1e-10
    assert rel(found, least_squares(TOKENS, [], ())) > 1e-2


@pytest.mark.parametrize("number", range(len(SCENES)))
def test_a_scenes_pass_adds_exactly_its_loras(number):
    module, given = linear64(IN, OUT), []

    def run_scene(index, tap):
        given.append(module(SEEN[index]))

    calibrate(
        nn.ModuleDict({"layer": module}),
        TASKS,
        build_stacks(TASKS),
        lambda index, tap: module(TOKENS[index]),
        scenes=SCENES,
        run_scene=run_scene,
    )
    pairs = factors_of(TASKS)
    expected = module(SEEN[number]) + sum(
        (SEEN[number] @ pairs[k][0].T @ pairs[k][1].T for k in SCENES[number].tasks), torch.zeros(1, dtype=F64)
    )
    assert rel(given[number], expected) < 1e-12
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_a_layer_of_other_loras_is_watched_and_should_stay_silent():
    two = [task("a", lora(1, OUT, IN, RANK)), task("b", lora(2, OUT, IN, RANK))]
    alone = task("c", {Target("other"): lora(3, OUT, IN, RANK)})
    tasks, scenes = [*two, alone], (Scene("a and c", (0, 2)),)
    root = nn.ModuleDict({"layer": linear64(IN, OUT), "other": linear64(IN, OUT)})

    def run(x):
        for module in root.values():
            module(x)

    found = calibrate(
        root,
        tasks,
        build_stacks(tasks),
        lambda k, tap: run(TOKENS[k]),
        scenes=scenes,
        run_scene=lambda j, tap: run(SEEN[j]),
    )
    seen = found.stats[LAYER].scenes
    assert seen.active.tolist() == [[True, False]]
    assert float(seen.tokens) == len(SEEN[0])


def test_refinement_learns_the_scenes_targets():
    """Sampled whole inputs tell a joint prompt from the LoRAs' own where their coordinates cannot."""
    options = SampleOptions(1000, most=10_000)
    plain, refined = (merged(calibrated(sample=options), SSRMerge(refine=refine)) for refine in (False, True))
    name = JOINT
    before, after = (report.layers[0].measures[name] for _, report in (plain, refined))
    assert after < 0.9 * before
    pairs = factors_of(TASKS)
    deltas = [up @ down for down, up in pairs]
    errors = energy = 0.0
    for x, scene in list(zip(SEEN, SCENES, strict=True))[:2]:
        wanted = x @ sum(deltas[k] for k in scene.tasks).T
        errors += float((x @ refined[0].T - wanted).square().sum()) / len(x)
        energy += float(wanted.square().sum()) / len(x)
    assert after == pytest.approx((errors / energy) ** 0.5, rel=1e-9)


def test_refinement_is_the_regression_of_what_is_left_on_all_inputs():
    """By the d x d covariance and the hat matrix, where the engine has the kernel of the tokens."""
    found, _ = merged(calibrated(sample=SampleOptions(1000, most=10_000)), SSRMerge())
    plain, deltas = least_squares(TOKENS, SEEN, SCENES), [up @ down for down, up in factors_of(TASKS)]
    passes = [(x, (k,)) for k, x in enumerate(TOKENS)]
    passes += [(x, scene.tasks) for x, scene in zip(SEEN, SCENES, strict=True)]
    inputs, lacks = [], []
    for (x, acting), mass in zip(passes, masses(SCENES, len(TOKENS)), strict=True):
        scale = (mass / len(x)) ** 0.5
        wanted = sum((deltas[k] for k in acting), torch.zeros(OUT, IN, dtype=F64))
        inputs.append(scale * x)
        lacks.append(scale * x @ (wanted - plain).T)
    x, lacks = torch.cat(inputs), torch.cat(lacks)
    count = sum(len(x) * min(1, mass) for (x, _), mass in zip(passes, masses(SCENES, len(TOKENS)), strict=True))
    mean, answers = x.square().sum() / count, {float(lacks.square().sum()): torch.zeros(OUT, IN, dtype=F64)}
    for share in (1.0, 0.1, 0.01):
        inverse = torch.linalg.inv(x.T @ x + share * mean * torch.eye(IN, dtype=F64))
        fit, leverage = lacks.T @ x @ inverse, ((x @ inverse) * x).sum(dim=1)
        answers[float(((lacks - x @ fit.T) / (1 - leverage)[:, None]).square().sum())] = fit
    best = answers[min(answers)]
    assert float(best.norm()) > 0.05 * float(plain.norm())
    assert rel(found, plain + best) < 1e-9


def test_measures_of_a_plain_router_are_those_of_its_answers():
    found, report = merged(calibrated())
    deltas = [up @ down for down, up in factors_of(TASKS)]
    x = SEEN[2]
    left = (x @ found.T).norm() / (x @ sum(deltas).T).norm()
    assert report.layers[0].measures[NEUTRAL] == pytest.approx(float(left), rel=1e-9)
    without = merged(calibrated(scenes=(), seen=[]))[1].layers[0].measures
    assert JOINT not in without
    assert NEUTRAL not in without


def test_the_published_formula_knows_no_scenes():
    found, bare = merged(calibrated(), PaperMerge())[0], merged(calibrated(scenes=(), seen=[]), PaperMerge())[0]
    assert rel(found, bare) < 1e-12


def test_scenes_of_a_dropped_lora_go_and_the_others_stay():
    left = keep(calibrated(), [2, 1])
    assert left.scenes == (Scene("nobody"),)
    found, _ = merged(left, tasks=[TASKS[2], TASKS[1]])
    expected = least_squares([TOKENS[2], TOKENS[1]], [SEEN[2]], [SCENES[2]], tasks=[TASKS[2], TASKS[1]])
    assert rel(found, expected) < 1e-10
    again, _ = merged(calibrated(), tasks=[TASKS[2], TASKS[1]])  # a subset chosen by the merge itself
    assert rel(again, expected) < 1e-10
    swapped = keep(calibrated(), [1, 0, 2])
    assert swapped.scenes[0] == SCENES[0]
    assert rel(merged(swapped)[0], merged(calibrated())[0]) < 1e-10


def test_scenes_without_a_pass_are_refused():
    module = linear64(IN, OUT)
    with pytest.raises(CalibrationError, match="run_scene"):
        calibrate(
            nn.ModuleDict({"layer": module}),
            TASKS,
            build_stacks(TASKS),
            lambda k, tap: module(TOKENS[k]),
            scenes=SCENES,
        )


def test_room_for_a_solve_counts_the_scenes():
    """Their Grams in float64, and with the rows of who acts, beside the tasks'."""
    stack, bare = build_stacks(TASKS)[0], calibrated(scenes=(), seen=[])
    with_scenes, without = (
        Statistics(TASKS, SSRMerge(), one, "anchor", True).bytes_to_solve(stack) for one in (calibrated(), bare)
    )
    gram = 8 * sum(stack.basis_ranks) ** 2
    assert 2 * len(SCENES) * gram <= with_scenes - without <= 4 * len(SCENES) * gram


def test_a_joint_prompt_of_others_is_measured_as_a_neutral_one():
    tasks = [*TASKS[:2], task("else", {Target("other"): lora(3, OUT, IN, RANK)})]
    tasks.append(task("more", {Target("other"): lora(4, OUT, IN, RANK)}))
    root = nn.ModuleDict({"layer": linear64(IN, OUT), "other": linear64(IN, OUT)})
    x = [*TOKENS, TOKENS[0], SEEN[0]]

    def run(index, tap):
        for module in root.values():
            module(x[index])

    scenes = (Scene("else and more", (2, 3)),)
    found = calibrate(root, tasks, build_stacks(tasks), run, scenes=scenes, run_scene=lambda j, tap: run(4, tap))
    layers = {layer.target: layer for layer in merged(found, tasks=tasks)[1].layers}
    assert set(layers[LAYER].measures) == {NEUTRAL}
    assert set(layers[Target("other")].measures) == {JOINT}


def test_convolutions_have_scenes_too():
    tasks = [task(f"t{k}", lora(k, 5, 4 * 9, RANK, kernel=(3, 3))) for k in range(2)]
    module, inputs = (
        nn.Conv2d(4, 5, 3, padding=1).double().requires_grad_(False),
        [randn(k, 1, 4, 6, 6) for k in range(3)],
    )
    given = []
    found = calibrate(
        nn.ModuleDict({"layer": module}),
        tasks,
        build_stacks(tasks),
        lambda k, tap: module(inputs[k]),
        scenes=(Scene("both", (0, 1)),),
        run_scene=lambda j, tap: given.append(module(inputs[2])),
    )
    weight = sum(one.adapter.layers[LAYER].delta(F64) for one in tasks).reshape(5, 4, 3, 3)
    expected = torch.nn.functional.conv2d(inputs[2], module.weight + weight, module.bias, padding=1)
    assert rel(given[0], expected) < 1e-12
    columns = torch.nn.functional.unfold(inputs[2], 3, padding=1)[0].T
    z = columns @ build_stacks(tasks)[0].basis.to(F64).T
    assert rel(found.stats[LAYER].scenes.gram[0], z.T @ z) < 1e-12


def test_layers_that_a_scene_gave_no_sample_are_named_as_unrefined():
    whole = calibrated(sample=SampleOptions(8))
    stats = whole.stats[LAYER]
    bare = replace(whole, stats={LAYER: replace(stats, scenes=replace(stats.scenes, samples=None))})
    said = [[note for note in merged(one, SSRMerge())[1].notes if "not refined" in note] for one in (whole, bare)]
    assert said[0] == []
    assert len(said[1]) == 1
    assert said[1][0].startswith("1 of 1 layers")
    assert rel(merged(bare, SSRMerge())[0], merged(whole)[0]) < 1e-12  # the plain router, as the note says
