"""Further rounds of calibration: the same prompts with a merge in the model, their tokens beside the first's."""

import pytest
import torch
from helpers import F64, LAYER, factors_of, linear64, rel
from scene_world import IN, OUT, SCENES, SEEN, TASKS, TOKENS, calibrated, masses, merged
from torch import nn

from ssr_core import ROUNDS, SampleOptions, SSRMerge, build_stacks, calibrate, merge, with_rounds
from ssr_core.combining import combine


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


def test_masses_are_those_of_one_round():
    """Tokens double on both sides: what joint and neutral prompts count does not change."""
    assert masses(SCENES, len(TASKS))[:3] == [1.0, 1.0, 1.0]
    first = calibrated()
    twice = with_rounds([first, on_a_merge(first)[0]])
    assert rel(merged(twice)[0], merged(first)[0]) < 1e-10
