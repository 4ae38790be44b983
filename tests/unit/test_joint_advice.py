"""What a report says about pictures that show several LoRAs."""

from dataclasses import replace

import pytest
from scene_world import TASKS, calibrated, merged

from ssr_core import AverageMerge, SSRMerge
from ssr_core.joint_advice import MOST_WEIGHT, together
from ssr_core.methods.ssr import JOINT


def advice_at(error, method):
    """On a report whose joint prompts are missed by this much."""
    calibration = calibrated()
    report = merged(calibration, method)[1]
    layers = [replace(layer, measures={**layer.measures, JOINT: error}) for layer in report.layers]
    return together(replace(report, layers=tuple(layers)), TASKS, calibration, method)


def test_without_a_joint_prompt_one_is_asked_for():
    for method, wanted in ((SSRMerge(refine=False), 1), (AverageMerge(), 0)):
        advice = merged(calibrated(scenes=(), seen=[]), method)[1].advice
        assert len([line for line in advice if "joint_prompts" in line]) == wanted


def test_where_much_of_a_joint_prompt_is_missed_a_weight_is_named():
    (line,) = advice_at(0.3, SSRMerge(joint_weight=2.5))
    assert "misses 30 %" in line
    assert "joint_weight from 2.5 to 10" in line
    assert "from 0 to 4" in advice_at(0.3, SSRMerge(joint_weight=0))[0]


@pytest.mark.parametrize(
    ("error", "method"), [(0.05, SSRMerge()), (0.3, AverageMerge()), (0.3, SSRMerge(joint_weight=MOST_WEIGHT))]
)
def test_no_weight_is_named_where_none_helps(error, method):
    assert advice_at(error, method) == []
