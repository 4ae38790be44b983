"""Further rounds of calibration: the same prompts with a merge in the model, their tokens beside the first's."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import F64, LAYER, factors_of, linear64, rel
from scene_world import IN, OUT, SCENES, SEEN, TASKS, TOKENS, calibrated, merged
from torch import nn

from ssr_core import (
    ROUNDS,
    FileError,
    IncompatibleError,
    SampleOptions,
    SSRMerge,
    Target,
    build_stacks,
    calibrate,
    memory_need,
    merge,
    merge_metadata,
    parse_recipe,
    with_rounds,
    without,
)
from ssr_core.combining import combine
from ssr_core.rounds import GONE


def on_a_merge(calibration, tokens=TOKENS, seen=SEEN, scenes=SCENES, **more):
    """A round with the merge of a calibration in the model; and what the layer put out in each pass."""
    module, given = linear64(IN, OUT), []
    layers = merge(TASKS, SSRMerge(refine=False), calibration, dtype=F64).layers

    def run(x):
        given.append((x, module(x), module))

    found = calibrate(
        nn.ModuleDict({"layer": module}),
        TASKS,
        build_stacks(TASKS),
        lambda index, tap: run(tokens[index]),
        scenes=scenes,
        run_scene=lambda number, tap: run(seen[number]),
        merged=layers,
        **more,
    )
    return found, given, layers


def test_the_merge_acts_in_every_pass_and_no_lora_beside_it():
    found, given, layers = on_a_merge(calibrated())
    change = layers[LAYER].delta(F64)
    assert len(given) == len(TASKS) + len(SCENES)
    for x, output, module in given:
        assert rel(output, module(x) + x @ change.T) < 1e-12  # its hooks are gone
    assert not module._forward_hooks and not module._forward_pre_hooks
    first = calibrated()
    assert rel(found.stats[LAYER].gram, first.stats[LAYER].gram) < 1e-12  # one layer reads the same either way
    assert rel(found.stats[LAYER].scenes.gram, first.stats[LAYER].scenes.gram) < 1e-12


def test_tokens_of_all_rounds_count_alike_with_the_same_targets():
    """The router of two rounds is the least-squares answer over both rounds' tokens."""
    later = [x.roll(1, dims=1) + 0.1 for x in TOKENS]
    seen = [x.roll(2, dims=1) for x in SEEN]
    first = calibrated()
    both = with_rounds([first, on_a_merge(first, later, seen)[0]])
    assert both.settings[ROUNDS] == 2 and both.scenes == first.scenes and both.tasks == first.tasks
    alike = calibrated(
        [torch.cat(pair) for pair in zip(TOKENS, later, strict=True)],
        [torch.cat(pair) for pair in zip(SEEN, seen, strict=True)],
    )
    assert rel(merged(both)[0], merged(alike)[0]) < 1e-10
    assert rel(merged(both)[0], merged(first)[0]) > 1e-2
    assert both.stats[LAYER].tokens.tolist() == alike.stats[LAYER].tokens.tolist()
    assert both.stats[LAYER].gram.dtype == first.stats[LAYER].gram.dtype
    held = both.stats[LAYER].held_out().tokens
    assert held.tolist() == [a + b for a, b in zip(*(2 * [first.stats[LAYER].held_out().tokens.tolist()]), strict=True)]


def test_the_correction_sees_the_inputs_of_all_rounds():
    """By the d x d covariance over both rounds' tokens, where the engine has their samples."""
    options = SampleOptions(1000, most=10_000)
    later = [x.roll(1, dims=1) + 0.1 for x in TOKENS]
    first = calibrated(scenes=(), seen=[], sample=options)
    both = with_rounds([first, on_a_merge(first, later, [], (), sample=options)[0]])
    found = merged(both, SSRMerge())[0]
    plain, deltas = merged(both)[0], [up @ down for down, up in factors_of(TASKS)]
    inputs, lacks = [], []
    for k, pair in enumerate(zip(TOKENS, later, strict=True)):
        x = torch.cat(pair) / sum(map(len, pair)) ** 0.5
        inputs.append(x)
        lacks.append(x @ (deltas[k] - plain).T)
    x, lacks = torch.cat(inputs), torch.cat(lacks)
    mean, answers = x.square().sum() / len(x), {float(lacks.square().sum()): torch.zeros(OUT, IN, dtype=F64)}
    for share in (1.0, 0.1):
        inverse = torch.linalg.inv(x.T @ x + share * mean * torch.eye(IN, dtype=F64))
        fit, leverage = lacks.T @ x @ inverse, ((x @ inverse) * x).sum(dim=1)
        answers[float(((lacks - x @ fit.T) / (1 - leverage)[:, None]).square().sum())] = fit
    best = answers[min(answers)]
    assert float(best.norm()) > 0.05 * float(plain.norm())
    assert rel(found, plain + best) < 1e-9


def test_one_round_is_the_calibration_itself():
    first = calibrated()
    assert with_rounds([first]) is first


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_rounds_can_be_summed_with_other_runs(weight):
    first, other = calibrated(), calibrated([x.roll(3, dims=1) for x in TOKENS])
    both = with_rounds([first, on_a_merge(first)[0]])
    total = combine([both, other], [1.0, weight])
    expected = both.stats[LAYER].gram + weight * other.stats[LAYER].gram
    assert rel(total.stats[LAYER].gram, expected) < 1e-12


def test_a_round_on_the_same_inputs_changes_no_router():
    """Tokens double for LoRAs and scenes alike: what joint and neutral prompts count stays."""
    first = calibrated()
    twice = with_rounds([first, on_a_merge(first)[0]])
    assert twice.stats[LAYER].scenes.tokens.tolist() == [2.0 * len(x) for x in SEEN]
    assert rel(merged(twice)[0], merged(first)[0]) < 1e-10


def test_rounds_add_up_one_by_one():
    first, second = calibrated(), on_a_merge(calibrated(), [x.roll(1, dims=1) for x in TOKENS])[0]
    third = on_a_merge(calibrated(), [x.roll(2, dims=1) for x in TOKENS])[0]
    one_by_one, at_once = with_rounds([with_rounds([first, second]), third]), with_rounds([first, second, third])
    assert one_by_one.settings[ROUNDS] == at_once.settings[ROUNDS] == 3
    assert rel(one_by_one.stats[LAYER].gram, at_once.stats[LAYER].gram) < 1e-12


def test_rounds_of_other_prompts_or_models_are_refused():
    first = calibrated()
    with pytest.raises(IncompatibleError, match="round 2 ran other prompts"):
        with_rounds([first, calibrated(scenes=SCENES[:1], seen=SEEN[:1])])
    with pytest.raises(IncompatibleError, match="the model"):
        with_rounds([first, replace(first, model="another")])
    with pytest.raises(IncompatibleError, match="no round"):
        with_rounds([])


def test_layers_of_other_parts_are_left_out():
    """A layer of the text encoder may be called as one of the model is."""
    first = calibrated()
    layers = merge(TASKS, SSRMerge(refine=False), first, dtype=F64).layers
    given, module = [], linear64(IN, OUT)

    def run(index, tap):
        given.append(module(TOKENS[index]))

    other = {Target(LAYER.module_path, None, "clip"): layers[LAYER], Target("not.there", None, "clip"): layers[LAYER]}
    calibrate(nn.ModuleDict({"layer": module}), TASKS, build_stacks(TASKS), run, merged={**layers, **other})
    assert rel(given[0], module(TOKENS[0]) + TOKENS[0] @ layers[LAYER].delta(F64).T) < 1e-12


def test_the_same_run_with_another_number_of_rounds_is_no_other_run():
    settings = {"seed": 1}
    first = replace(calibrated(), settings=settings)
    twice = with_rounds([first, on_a_merge(first)[0]])
    with pytest.raises(IncompatibleError, match="twice"):
        combine([first, twice])


def test_dropped_loras_stay_known_to_notes_and_recipes():
    """The merges of further rounds had them: what they saw cannot be made again without."""
    first = calibrated()
    twice = with_rounds([first, on_a_merge(first)[0]])
    left = without(twice, [2])
    assert left.settings[GONE] == ["task2"] and GONE not in without(first, [2]).settings
    for calibration in (left, twice):  # dropped before, or by the merge
        report = merged(calibration, tasks=TASKS[:2])[1]
        assert len([note for note in report.notes if "merges with task2" in note]) == 1
        recipe = json.loads(merge_metadata(TASKS[:2], SSRMerge(), calibration)["ssr_merge"])
        for source, digit in zip(recipe["sources"], "ab", strict=True):
            source["sha256"] = 64 * digit
        with pytest.raises(FileError, match="LoRAs that are not in it: task2"):
            parse_recipe(recipe, "x", recorded=True)
    assert not any("merges with" in note for note in merged(twice)[1].notes)


@pytest.mark.parametrize("count", [2, 3])
def test_memory_of_several_rounds_is_foreseen(count):
    """As the nodes do it: the sum so far, one more round, and their sum."""
    sample = SampleOptions(16)
    total = calibrated(scenes=(), seen=[], sample=sample)
    for _ in range(count - 1):
        more = calibrated(scenes=(), seen=[], sample=sample)
        summed = with_rounds([total, more])
        held = sum(size_of(one) for one in (total, more, summed))
        total = summed
    stack = build_stacks(TASKS)[0]
    need = memory_need([stack], F64, sample, rounds=count).host - 4 * stack.basis.numel()
    assert held <= need <= 1.1 * held


def size_of(calibration):
    """Bytes of Grams, which are float32 beside other models than this one of float64, and of samples."""
    stats = calibration.stats[LAYER]
    return 4 * (stats.gram.numel() + stats.held.packed.numel()) + 8 * sum(one.rows.numel() for one in stats.samples)
