"""What a report says about pictures that show several LoRAs."""

from dataclasses import replace

import pytest
from scene_world import SCENES, SEEN, TASKS, calibrated, merged

from ssr_core import AverageMerge, GainsMerge, PaperMerge, SSRMerge
from ssr_core.joint_advice import MOST_WEIGHT, together
from ssr_core.methods.ssr import JOINT


def advice_at(error, method):
    """On a report whose joint prompts are missed by this much."""
    calibration = calibrated()
    report = merged(calibration, method)[1]
    layers = [replace(layer, measures={**layer.measures, JOINT: error}) for layer in report.layers]
    return together(replace(report, layers=tuple(layers)), TASKS, calibration, method)


def test_without_a_joint_prompt_one_is_asked_for():
    for method, wanted in ((SSRMerge(refine=False), 1), (AverageMerge(), 0), (PaperMerge(), 0), (GainsMerge(), 0)):
        advice = merged(calibrated(scenes=(), seen=[]), method)[1].advice
        for name in ("joint_prompts", "neutral_prompts"):
            assert len([line for line in advice if name in line]) == wanted
    advice = merged(calibrated(scenes=(), seen=[]), SSRMerge(refine=False, neutral_weight=0))[1].advice
    assert not any("neutral_prompts" in line for line in advice)


def test_where_neutral_prompts_cost_the_loras_much_a_lower_weight_is_named():
    heavy, plain = (merged(calibrated(), SSRMerge(refine=False, neutral_weight=weight))[1] for weight in (50, 0.05))
    (line,) = [one for one in heavy.advice if "neutral_weight" in one]
    assert line.endswith("set neutral_weight to 0.05.") and "50 times as much as all LoRAs" in line
    assert not any("Name in each" in one or "OSRM" in one for one in heavy.advice)
    assert not any("neutral_weight" in one for one in plain.advice)


@pytest.mark.parametrize(
    ("count", "scenes", "wanted"), [(3, (), 1), (2, (), 0), (3, SCENES[2:], 0), (3, SCENES[:1], 1)]
)
def test_without_a_neutral_prompt_some_are_asked_for_from_three_loras_on(count, scenes, wanted):
    seen = [SEEN[SCENES.index(one)] for one in scenes]
    tasks = TASKS[:count]
    report = merged(calibrated(scenes=scenes, seen=seen, tasks=tasks), tasks=tasks)[1]
    assert len([line for line in report.advice if "neutral_prompts" in line]) == wanted


def test_where_much_of_a_joint_prompt_is_missed_a_weight_is_named():
    (line,) = advice_at(0.3, SSRMerge(joint_weight=2.5))
    assert "misses 30 %" in line
    assert "joint_weight from 2.5 to 10" in line
    assert "from 0 to 1" in advice_at(0.3, SSRMerge(joint_weight=0))[0]


def test_where_joint_prompts_cost_the_others_much_a_lower_weight_is_named():
    """And nothing is said against the prompts, or for other tools."""
    heavy, plain = (merged(calibrated(), SSRMerge(refine=False, joint_weight=weight))[1] for weight in (50, 1))
    assert heavy.reconstruction_error() > 0.6
    (line,) = [one for one in heavy.advice if "joint_weight" in one]
    assert line.endswith("set joint_weight to 1.") and "Joint prompts count 50 times" in line
    assert not any("Name in each" in one or "OSRM" in one for one in heavy.advice)
    assert not any("set joint_weight to" in one for one in plain.advice)


@pytest.mark.parametrize(
    ("error", "method"), [(0.05, SSRMerge()), (0.3, AverageMerge()), (0.3, SSRMerge(joint_weight=MOST_WEIGHT))]
)
def test_no_weight_is_named_where_none_helps(error, method):
    assert advice_at(error, method) == []
