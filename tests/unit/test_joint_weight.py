"""How much joint prompts count: in router, correction and compression."""

import pytest
import torch
from helpers import F64, LAYER, rel
from scene_world import SCENES, SEEN, TASKS, TOKENS, calibrated, least_squares, merged

from ssr_core import CompressOptions, IncompatibleError, SampleOptions, SSRMerge, compress, merge
from ssr_core.methods.ssr import JOINT


@pytest.mark.parametrize("weight", [0.0, 0.3, 5.0])
def test_joint_prompts_weigh_what_the_method_says(weight):
    found, _ = merged(calibrated(), SSRMerge(refine=False, joint_weight=weight))
    assert rel(found, least_squares(TOKENS, SEEN, SCENES, weight=weight)) < 1e-10


def test_the_weight_counts_tokens_where_loras_are_not_balanced():
    twice = calibrated(seen=[*(torch.cat([x, x]) for x in SEEN[:2]), SEEN[2]])
    found, _ = merged(calibrated(), SSRMerge(refine=False, balance=False, joint_weight=2))
    assert rel(found, merged(twice, SSRMerge(refine=False, balance=False, joint_weight=1))[0]) < 1e-12


def test_a_joint_prompt_of_weight_0_is_as_none():
    sample = {"sample": SampleOptions(1000, most=10_000)}
    found, _ = merged(calibrated(**sample), SSRMerge(joint_weight=0))
    without, _ = merged(calibrated(scenes=SCENES[2:], seen=SEEN[2:], **sample), SSRMerge())
    assert rel(found, without) < 1e-10


def test_more_weight_brings_joint_prompts_nearer_and_the_others_farther():
    calibration = calibrated(sample=SampleOptions(1000, most=10_000))
    reports = [merged(calibration, SSRMerge(joint_weight=weight))[1] for weight in (0.1, 1.0, 10.0)]
    joint = [report.layers[0].measures[JOINT] for report in reports]
    own = [report.reconstruction_error() for report in reports]
    assert joint == sorted(joint, reverse=True) and joint[2] < 0.5 * joint[0]
    assert own == sorted(own) and own[0] < 0.9 * own[2]


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_mean_nothing_are_refused(weight):
    with pytest.raises(IncompatibleError, match="joint_weight"):
        SSRMerge(joint_weight=weight)


@pytest.mark.parametrize("emphasis", [1, 4])
def test_compression_counts_scenes_among_the_calibrated_outputs(emphasis):
    """The error that a truncation states is the one on all passes' tokens."""
    calibration = calibrated()
    result = merge(TASKS, SSRMerge(refine=False), calibration, dtype=F64)
    small, report = compress(result, CompressOptions("rank", 2, 0.0), TASKS, calibration, joint_weight=emphasis)
    whole, less = result.layers[LAYER].delta(F64), small.layers[LAYER].delta(F64)
    error = energy = 0.0
    for x, weight in [*((x, 1) for x in TOKENS), (SEEN[0], 2 * emphasis), (SEEN[1], 3 * emphasis), (SEEN[2], 1)]:
        error += weight * float((x @ (whole - less).T).square().sum()) / len(x)
        energy += weight * float((x @ whole.T).square().sum()) / len(x)
    assert report.layers[0].error == pytest.approx((error / energy) ** 0.5, rel=1e-6)
