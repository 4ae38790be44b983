"""How much joint and neutral prompts count: in router, correction and compression."""

from dataclasses import replace

import pytest
import torch
from helpers import F64, LAYER, rel, task_tokens
from scene_world import IN, SCENES, SEEN, TASKS, TOKENS, calibrated, least_squares, masses, merged

from ssr_core import CompressOptions, IncompatibleError, SampleOptions, Scene, SSRMerge, compress, merge
from ssr_core.methods.ssr import JOINT, NEUTRAL


@pytest.mark.parametrize("weight", [0.0, 0.3, 5.0])
def test_joint_prompts_weigh_what_the_method_says(weight):
    found, _ = merged(calibrated(), SSRMerge(refine=False, joint_weight=weight))
    assert rel(found, least_squares(TOKENS, SEEN, SCENES, joint=weight)) < 1e-10


@pytest.mark.parametrize("weight", [0.0, 0.3, 5.0])
def test_neutral_prompts_share_the_weight_that_the_method_gives_them(weight):
    scenes, seen = (*SCENES, Scene("again nobody")), [*SEEN, task_tokens(60, 17, IN)]
    found, _ = merged(calibrated(seen=seen, scenes=scenes), SSRMerge(refine=False, neutral_weight=weight))
    assert rel(found, least_squares(TOKENS, seen, scenes, neutral=weight)) < 1e-10
    once, _ = merged(calibrated(), SSRMerge(refine=False, neutral_weight=weight))
    twice, _ = merged(calibrated(seen=[*SEEN, SEEN[2]], scenes=scenes), SSRMerge(refine=False, neutral_weight=weight))
    assert rel(twice, once) < 1e-10  # the same prompt written twice counts once


def test_a_neutral_prompt_that_did_not_reach_a_layer_takes_no_share():
    whole = calibrated(seen=[*SEEN, SEEN[0]], scenes=(*SCENES, Scene("again nobody")))
    stats = whole.stats[LAYER]
    silent = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=F64)
    seen = replace(stats.scenes, packed=stats.scenes.packed * silent[:, None], tokens=stats.scenes.tokens * silent)
    found, _ = merged(replace(whole, stats={LAYER: replace(stats, scenes=seen)}))
    assert rel(found, merged(calibrated())[0]) < 1e-10


def test_the_weight_counts_tokens_where_loras_are_not_balanced():
    twice = calibrated(seen=[*(torch.cat([x, x]) for x in SEEN[:2]), SEEN[2]])
    found, _ = merged(calibrated(), SSRMerge(refine=False, balance=False, joint_weight=2))
    assert rel(found, merged(twice, SSRMerge(refine=False, balance=False, joint_weight=1))[0]) < 1e-12


def test_a_joint_prompt_of_weight_0_is_as_none():
    sample = {"sample": SampleOptions(1000, most=10_000)}
    found, _ = merged(calibrated(**sample), SSRMerge(joint_weight=0))
    without, _ = merged(calibrated(scenes=SCENES[2:], seen=SEEN[2:], **sample), SSRMerge())
    assert rel(found, without) < 1e-10


def test_neutral_prompts_of_weight_0_are_as_none():
    sample = {"sample": SampleOptions(1000, most=10_000)}
    found, _ = merged(calibrated(**sample), SSRMerge(neutral_weight=0))
    without, _ = merged(calibrated(scenes=SCENES[:2], seen=SEEN[:2], **sample), SSRMerge())
    assert rel(found, without) < 1e-10


@pytest.mark.parametrize("name", ["joint_weight", "neutral_weight"])
def test_hardly_any_weight_is_hardly_more_than_none(name):
    """Nor does it lower the ridge of the correction."""
    scenes, seen = (*SCENES, *(Scene(f"nobody {n}") for n in range(3))), [*SEEN, *(task_tokens(60, 17, IN),) * 3]
    calibration = calibrated(scenes=scenes, seen=seen, sample=SampleOptions(1000, most=10_000))
    none, hardly = (merged(calibration, SSRMerge(**{name: weight}))[0] for weight in (0, 1e-9))
    assert rel(hardly, none) < 1e-6


def test_neutral_weight_counts_tokens_where_loras_are_not_balanced():
    """Two prompts of half the weight each, times as many LoRAs as there are, token by token."""
    scenes, seen = (*SCENES, Scene("again nobody")), [*SEEN, task_tokens(60, 17, IN)]
    method = SSRMerge(refine=False, balance=False, neutral_weight=0.4)
    found, _ = merged(calibrated(seen=seen, scenes=scenes), method)
    scaled = [*SEEN[:2], *((0.4 * 3 / 2) ** 0.5 * x for x in seen[2:])]
    alike = SSRMerge(refine=False, balance=False, neutral_weight=2 / 3)  # 1 for each of the two
    assert rel(found, merged(calibrated(seen=scaled, scenes=scenes), alike)[0]) < 1e-10
    assert rel(found, merged(calibrated(seen=seen, scenes=scenes), alike)[0]) > 1e-4


def test_more_weight_keeps_neutral_prompts_as_they_are_at_the_cost_of_the_others():
    calibration = calibrated(scenes=SCENES[2:], seen=SEEN[2:])
    reports = [merged(calibration, SSRMerge(refine=False, neutral_weight=weight))[1] for weight in (0.01, 0.3, 10.0)]
    left = [report.layers[0].measures[NEUTRAL] for report in reports]
    own = [report.reconstruction_error() for report in reports]
    assert left == sorted(left, reverse=True) and left[2] < 0.5 * left[0]
    assert own == sorted(own) and own[0] < 0.95 * own[2]


def test_more_weight_brings_joint_prompts_nearer_and_the_others_farther():
    calibration = calibrated(sample=SampleOptions(1000, most=10_000))
    reports = [merged(calibration, SSRMerge(joint_weight=weight))[1] for weight in (0.1, 1.0, 10.0)]
    joint = [report.layers[0].measures[JOINT] for report in reports]
    own = [report.reconstruction_error() for report in reports]
    assert joint == sorted(joint, reverse=True) and joint[2] < 0.5 * joint[0]
    assert own == sorted(own) and own[0] < 0.9 * own[2]


@pytest.mark.parametrize("name", ["joint_weight", "neutral_weight"])
@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_mean_nothing_are_refused(name, weight):
    with pytest.raises(IncompatibleError, match=name):
        SSRMerge(**{name: weight})


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("joint", "neutral"), [(1.0, 0.05), (4.0, 0.7)])
def test_compression_counts_scenes_among_the_calibrated_outputs(joint, neutral, balanced, refine):
    """The error that a truncation states is the one on all passes' tokens."""
    calibration = calibrated(sample=SampleOptions(1000, most=10_000) if refine else None)
    how = {"joint_weight": joint, "neutral_weight": neutral, "balanced": balanced}
    result = merge(TASKS, SSRMerge(refine=refine), calibration, dtype=F64)
    small, report = compress(result, CompressOptions("rank", 2, 0.0), TASKS, calibration, **how)
    whole, less = result.layers[LAYER].delta(F64), small.layers[LAYER].delta(F64)
    error = energy = 0.0
    emphasis = [1] * len(TASKS) + [joint if scene.tasks else neutral * len(TASKS) for scene in SCENES]
    weights = masses(SCENES, len(TOKENS), joint, neutral) if balanced else emphasis
    for x, weight in zip([*TOKENS, *SEEN], weights, strict=True):
        count = len(x) if balanced else 1
        error += weight * float((x @ (whole - less).T).square().sum()) / count
        energy += weight * float((x @ whole.T).square().sum()) / count
    assert report.layers[0].error == pytest.approx((error / energy) ** 0.5, rel=1e-5)
