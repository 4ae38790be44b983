"""Plain sentences about a merge: what looks wrong, and the value to set."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import median

from .calibration import Calibration
from .diagnostics import separability
from .finite import nonfinite_warnings
from .gram import GramStats
from .layer_report import LayerReport
from .rounds import GONE, settings_without
from .scenes import scenes_of
from .stacks import LayerStack, Task
from .words import number_of

SAME_SIGNAL = 1e-3
"""Median separability below which two tasks count as indistinguishable."""


Separabilities = dict[tuple[int, int], list[float]]
"""For each pair of tasks its separability on each layer."""


def prompt_warnings(names: Sequence[str], prompts: Sequence[Sequence[str]]) -> list[str]:
    """Warn about prompts from which a router can learn nothing.

    Args:
        names: The LoRAs.
        prompts: Their prompts.
    """
    warnings = silent_warnings(names, prompts)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, own in zip(names, prompts, strict=True):
        stripped = tuple(prompt.strip() for prompt in own)
        if any(stripped):
            groups.setdefault(stripped, []).append(name)
    for same in groups.values():
        if len(same) > 1:
            warnings.append(
                f"{_listed(same)} have the same prompt: their signals differ only by what each LoRA itself changes in "
                "the model, which does not tell the router whose turn it is under a prompt of yours; where their "
                "signals are equal it averages them. Name in each prompt what only that LoRA shows."
            )
    return warnings


def silent_warnings(names: Sequence[str], prompts: Sequence[Sequence[str]]) -> list[str]:
    """One sentence about the LoRAs whose prompts are all empty; none where there are none.

    Args:
        names: The LoRAs.
        prompts: Their prompts.
    """
    silent = [name for name, own in zip(names, prompts, strict=True) if not any(prompt.strip() for prompt in own)]
    if not silent:
        return []
    return [
        f"{_listed(silent)} {'has' if len(silent) == 1 else 'have'} no calibration prompt. Write what "
        f"{'it' if len(silent) == 1 else 'each'} was trained on, with its trigger word; prompts that differ are what "
        "LoRAs are told apart by."
    ]


def _listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def warnings_for(
    tasks: Sequence[Task],
    reports: Sequence[LayerReport],
    apart: Separabilities,
    routed: bool,
) -> list[str]:
    """All warnings about one merge."""
    active = [task for task in tasks if task.active]
    warnings = []
    if routed and len(active) > 1:
        warnings = prompt_warnings([task.name for task in active], [task.prompts for task in active])
    for a, b in combinations(active, 2):
        if a.adapter.fingerprint == b.adapter.fingerprint:
            warnings.append(
                f"{a.name} and {b.name} have the same content. They are merged as two tasks; if that is not meant, "
                "remove one."
            )
    if routed:
        warnings += _indistinguishable(tasks, apart)
    warnings += nonfinite_warnings({layer.target: layer.nonfinite for layer in reports})
    warnings += [sentence for task in active for sentence in _truncated(task)]
    warnings += _anchored([layer for layer in reports if layer.status == "anchored"])
    for task in active:
        missing = task.adapter.keys_with("unmatched")
        if missing:
            warnings.append(
                f"Not used: {len(missing)} of {number_of(len(task.adapter.records), 'key')} of {task.name}, e.g. "
                f"{missing[0].key}: {missing[0].reason}."
            )
    return warnings


def _truncated(task: Task) -> list[str]:
    """What the rank limit cut off a LoRA's converted layers."""
    options = task.adapter.convert_options
    if options is None:
        return []
    short = [one for one in task.adapter.conversions if one.error > options.bound and one.rank >= options.max_rank]
    if not short:
        return []
    worst = max(short, key=lambda one: one.error)
    fate = (
        "is applied to MODEL and CLIP as a patch of its own and is not in the saved file"
        if worst.rest_kept
        else "is lost"
    )
    return [
        f"More than rank {worst.rank} is in {number_of(len(short), 'converted layer')} of {task.name}: what is left, "
        f"up to {worst.error:.0%} ({worst.group.target}), {fate}. A larger convert_rank at its SSR LoRA keeps more."
    ]


def _anchored(layers: Sequence[LayerReport]) -> list[str]:
    """One sentence for each part of the model with layers that never ran."""
    warnings = []
    causes = {
        "model": "They are merged by the anchor. If there are many, the MODEL calls them in a way that hooks miss.",
        "clip": "They are merged by the anchor. If a CONDITIONING replaces the prompts, write a prompt beside it: the "
        "text encoder learns from that. If CLIP was not connected then, calibrate again with it.",
    }
    for part, advice in causes.items():
        own = [layer for layer in layers if layer.target.part == part]
        if own:
            named = ", ".join(str(layer.target) for layer in own[:3]) + (" and others" if len(own) > 3 else "")
            warnings.append(
                f"{number_of(len(own), 'layer')} never ran in calibration for one of their LoRAs: {named}. {advice}"
            )
    return warnings


def note_separability(apart: Separabilities, stack: LayerStack, stats: GramStats | None) -> None:
    """Remember how different each pair of tasks is on one stack to its router, where it saw tokens enough."""
    if stats is None or bool((stats.tokens < stack.rank).any()):
        return
    matrix = separability(stats.gram)
    for i, j in combinations(range(len(stack.tasks)), 2):
        apart.setdefault((stack.tasks[i], stack.tasks[j]), []).append(float(matrix[i, j]))


def _indistinguishable(tasks: Sequence[Task], apart: Separabilities) -> list[str]:
    """Groups whose signals are the same though their prompts differ; of equal prompts `prompt_warnings` tells."""
    groups: list[set[int]] = []
    for (i, j), values in apart.items():
        if median(values) < SAME_SIGNAL and not _same_prompts(tasks[i], tasks[j]):
            near = [group for group in groups if i in group or j in group]
            groups = [group for group in groups if group not in near] + [{i, j}.union(*near)]
    return [
        f"On the signals of their prompts {_listed([tasks[i].name for i in sorted(group)])} look the same to the "
        "model: the router averages them. Make the prompts differ in what only one of the LoRAs shows."
        for group in groups
    ]


def _same_prompts(a: Task, b: Task) -> bool:
    return [prompt.strip() for prompt in a.prompts] == [prompt.strip() for prompt in b.prompts]


def notes_for(tasks: Sequence[Task], calibration: Calibration | None) -> list[str]:
    """Facts worth knowing that need no action."""
    active = [task.name for task in tasks if task.active]
    notes = []
    if len(active) == 1:
        notes.append(
            f"{active[0]} alone is active: there is nothing to merge it with, and it is passed through as it is, at "
            "its strengths."
        )
    if calibration is None:
        return notes
    matched = calibration.match_active(tasks)
    for task, index in zip(tasks, matched, strict=True):
        if index < 0:
            continue
        record = calibration.tasks[index]
        then, now = (record.strength_model, record.strength_clip), (task.strength_model, task.strength_clip)
        if then != now:
            notes.append(
                f"{task.name} was calibrated at strength {then[0]:g} (CLIP {then[1]:g}) and is merged at {now[0]:g} "
                f"(CLIP {now[1]:g}): the statistics are an approximation there; calibrate again for the exact ones."
            )
    dropped = [r.name for i, r in enumerate(calibration.tasks) if i not in matched]
    if dropped:
        notes.append(f"Calibrated but not merged: {', '.join(dropped)}.")
    gone = settings_without(calibration.settings, dropped).get(GONE)
    if gone:
        notes.append(
            f"Further rounds of calibration ran on merges with {', '.join(gone)}: what they saw is an approximation."
        )
    kept = scenes_of(calibration.scenes, matched)[1]
    for scene in kept:
        who = " and ".join(tasks[task].name for task in scene.tasks) or "no LoRA"
        notes.append(f"{scene.label.capitalize()} ({who} active): {scene.prompt}")
    sampled = [one.scenes for one in calibration.stats.values() if kept and one.samples is not None]
    unrefined = sum(one is not None and one.samples is None for one in sampled)
    if unrefined:
        notes.append(
            f"{unrefined} of {len(calibration.stats)} layers are routed and not refined: a joint or neutral prompt "
            "gave them no sampled input."
        )
    lost = len(calibration.scenes) - len(kept)
    if lost:
        some = number_of(lost, "joint prompt takes", "joint prompts take")
        notes.append(f"{some} no part, as some of the LoRAs are not merged.")
    return notes
