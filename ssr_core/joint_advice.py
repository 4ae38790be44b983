"""What to do for pictures that show several LoRAs at once, or none, in plain words with the values to set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from .calibration import Calibration
from .methods import MergeMethod, SSRMerge
from .methods.ssr import JOINT, NEUTRAL
from .report import MergeReport
from .scenes import scenes_of
from .stacks import Task

LOST_TOGETHER = 0.2
"""Relative error of the typical layer on joint prompts from which one of several LoRAs may be missed."""

ALREADY_MUCH = 0.6
"""Error on the LoRAs' own prompts from which they cannot spare more."""

MANY = 3
"""LoRAs from which other pictures change enough to be worth neutral prompts."""

MOST_WEIGHT = 100.0
"""What the input joint_weight of the nodes takes at most."""


def together(
    report: MergeReport, tasks: Sequence[Task], calibration: Calibration | None, method: MergeMethod
) -> list[str]:
    """What to do for pictures of several LoRAs or none: calibrate on them, or let that count for more."""
    if not isinstance(method, SSRMerge) or calibration is None or len(report.tasks) < 2:
        return []
    if math.isnan(report.reconstruction_error()):
        return []
    scenes = scenes_of(calibration.scenes, calibration.match_active(tasks))[1]
    several = _more_weight(report, method) if any(scene.tasks for scene in scenes) else _ask_for_joint()
    count = sum(task.active for task in tasks)
    known = any(not scene.tasks for scene in scenes) or method.neutral_weight == 0
    return [*several, *([] if known else _ask_for_neutral(count))]


def _ask_for_joint() -> list[str]:
    return [
        "Calibration saw no prompt of several LoRAs. For them in one picture (two subjects, a subject in a style) "
        "write that prompt into joint_prompts of SSR Merge or SSR Calibrate and run that; without it routing tends to "
        "keep one of them."
    ]


def _ask_for_neutral(count: int) -> list[str]:
    if count < MANY:
        return []
    return [
        f"With {count} LoRAs pictures that show none of them change as well. Four prompts that name none and vary "
        "(a street, a forest, people, food), written into neutral_prompts of SSR Merge or SSR Calibrate, hold them "
        "back at little cost to the LoRAs; each takes one more pass."
    ]


def less_weight(report: MergeReport, method: MergeMethod) -> list[str]:
    """Where scenes count for more than they need to, what that costs the LoRAs is not their prompts' fault."""
    if not isinstance(method, SSRMerge):
        return []
    measured = {name for layer in report.layers for name in layer.measures}
    heavy = NEUTRAL in measured and method.neutral_weight > SSRMerge.neutral_weight
    if JOINT not in measured or method.joint_weight <= SSRMerge.joint_weight:
        return [_less_neutral(report, method)] if heavy else []
    return [
        f"Joint prompts count {method.joint_weight:g} times here, at the cost of each LoRA's own (error "
        f"{report.reconstruction_error():.2f}, best gains {report.reconstruction_error('gains'):.2f}). If pictures of "
        f"one LoRA suffer, set joint_weight to {SSRMerge.joint_weight:g}."
    ]


def _less_neutral(report: MergeReport, method: SSRMerge) -> str:
    return (
        f"Neutral prompts together count {method.neutral_weight:g} times as much as all LoRAs here, at the cost of "
        f"these (error {report.reconstruction_error():.2f}). If their pictures suffer, set neutral_weight to "
        f"{SSRMerge.neutral_weight:g}."
    )


def _more_weight(report: MergeReport, method: MergeMethod) -> list[str]:
    errors = [layer.measures[JOINT] for layer in report.layers if JOINT in layer.measures]
    if not isinstance(method, SSRMerge) or not errors or median(errors) < LOST_TOGETHER:
        return []
    higher = 4 * method.joint_weight or SSRMerge.joint_weight
    if higher > MOST_WEIGHT or report.reconstruction_error() >= ALREADY_MUCH:
        return []
    return [
        f"Under joint prompts the typical layer misses {100 * median(errors):.0f} % of what its LoRAs give together. "
        f"If one of them is weak in such pictures, raise joint_weight from {method.joint_weight:g} to {higher:g} "
        "(SSR Solve does it without new passes); pictures of one LoRA alone then get worse."
    ]
