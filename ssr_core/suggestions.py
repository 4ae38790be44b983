"""What would make the next merge better, in plain words with the values to set.

Warnings (`advice`) say what is wrong; these say what to try. Each looks at one number of the report
and is silent where that number is fine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import permutations
from statistics import median

from .calibration import Calibration
from .compatibility import APART, FIGHTING, balancing
from .report import MergeReport

LOUD = 4.0
"""Energy of one LoRA over another's from which the louder one's strength is worth changing."""

OVERFIT = 1.5
"""Held-out over calibration error of the typical layer (of text layers alone it is always large) that is too much."""

USEFUL = 0.9
"""Error of the merge over that of the best router without routing above which routing gained little."""

MUCH = 0.6
"""Relative error above which much of the LoRAs is lost."""

SINGULAR = 1e8
"""Condition number from which rounding shows."""

NOTICEABLE = 0.02
"""Errors below this are not worth any advice."""


def suggestions(report: MergeReport, settings: Mapping[str, object], routed: bool) -> list[str]:
    """All suggestions about one merge, the most important first.

    Args:
        report: The merge.
        settings: How its calibration was made (`Calibration.settings`).
        routed: Whether the method tells LoRAs apart by the signals of their prompts.
    """
    error = report.reconstruction_error()
    if math.isnan(error):
        return []
    if report.reconstruction_error("sum") < APART:
        return [*_louder(report), _sum_suffices(report)]
    found = _louder(report)
    if routed:
        found += [*_alike(report), *_overfit(report, settings), *_few_tokens(report, settings), *_ill(report)]
        found += _much_left(report)
    return found


def _louder(report: MergeReport) -> list[str]:
    """One LoRA whose branch carries much more energy than another's."""
    loud = report.loudness()
    usable = [index for index, value in enumerate(loud) if math.isfinite(value) and value > 0]
    if len(usable) < 2 or len(report.strengths) != len(report.tasks):
        return []
    a, b = max(permutations(usable, 2), key=lambda pair: loud[pair[0]] / loud[pair[1]])
    ratio, strength = loud[a] / loud[b], report.strengths[a]
    if ratio < LOUD or strength == 0:
        return []
    others = math.exp(sum(math.log(loud[index]) for index in usable if index != a) / (len(usable) - 1))
    level = "" if len(usable) == 2 else " with the mean of the others"
    return [
        f"{report.tasks[a]} carries {ratio:.3g}x the energy of {report.tasks[b]}: strength "
        f"{balancing(strength, loud[a], others):.2g} instead of {strength:g} balances it{level}, if it drowns them out."
    ]


def _sum_suffices(report: MergeReport) -> str:
    return (
        f"These LoRAs hardly meet: the plain sum's error is {report.reconstruction_error('sum'):.2f}. Mode sum, or a "
        "chain of LoRA loaders, gives nearly the same picture."
    )


def _alike(report: MergeReport) -> list[str]:
    """Routing that gains little, and the two prompts that are to blame."""
    others = {name: report.reconstruction_error(name) for name in ("sum", "average", "gains")}
    best = min(others, key=lambda name: others[name])
    error = report.reconstruction_error()
    if error < NOTICEABLE or error < USEFUL * others[best] or not report.apart:
        return []
    first, second = min(report.apart, key=lambda pair: report.apart[pair])
    words = {"sum": "the plain sum", "average": "the average", "gains": "one gain for each LoRA"}
    return [
        f"Routing gains little here (error {error:.2f}, {words[best]} {others[best]:.2f}): the prompts of "
        f"{report.tasks[first]} and {report.tasks[second]} look most alike to the model (their signals differ by "
        f"{report.apart[(first, second)]:.3f} of 1). Name in each what only that LoRA shows, and give each two or "
        "three prompts."
    ]


def _overfit(report: MergeReport, settings: Mapping[str, object]) -> list[str]:
    judged = [(layer.errors["result"], layer.held_errors["result"]) for layer in report.layers if layer.held_errors]
    if not judged:
        return []
    seen, unseen = (median(values) for values in zip(*judged, strict=True))
    if unseen < NOTICEABLE or unseen < OVERFIT * seen:
        return []
    return [
        f"In the typical layer the error on held-out tokens is {unseen:.2f}, on calibration's own {seen:.2f}: there "
        f"were too few tokens to learn from. {_more_tokens(settings)}"
    ]


def _few_tokens(report: MergeReport, settings: Mapping[str, object]) -> list[str]:
    """Layers that read whole sequences and still saw fewer tokens than their rank."""
    routed = [layer for layer in report.layers if layer.status == "routed" and layer.tokens]
    most = max((max(layer.tokens) for layer in routed), default=0.0)
    # modulation and embedding layers see one token a pass, whatever the size
    reading = [layer for layer in routed if max(layer.tokens) > most / 16]
    short = [layer for layer in reading if sum(layer.tokens) < 2 * layer.rank]
    if len(short) <= len(reading) / 4:
        return []
    worst = min(short, key=lambda layer: sum(layer.tokens) / layer.rank)
    return [
        f"{len(short)} of {len(reading)} layers saw fewer than two tokens for each direction that they route, e.g. "
        f"{worst.target} ({sum(worst.tokens):.0f} for rank {worst.rank}). {_more_tokens(settings)}"
    ]


def _more_tokens(settings: Mapping[str, object]) -> str:
    steps, width, height = (settings.get(name) for name in ("steps", "width", "height"))
    if not (isinstance(steps, int) and isinstance(width, int) and isinstance(height, int)):
        return "Run more calibration passes: more prompts for each LoRA, or more noise levels."
    if settings.get("custom_sigmas") or settings.get("custom_latent"):
        return "Connect SIGMAS with more steps or a larger LATENT, or give each LoRA more prompts."
    return f"Set steps to {4 * steps}, or width and height to {2 * width} x {2 * height}."


def _ill(report: MergeReport) -> list[str]:
    bad = [layer for layer in report.layers if math.isfinite(layer.condition) and layer.condition > SINGULAR]
    if not bad:
        return []
    worst = max(bad, key=lambda layer: layer.condition)
    return [
        f"{len(bad)} layers are nearly singular (condition {worst.condition:.0e} in {worst.target}): small changes of "
        "the noise change the merge there. Set ridge to 0.01."
    ]


def _much_left(report: MergeReport) -> list[str]:
    error = report.reconstruction_error()
    fighting = [pair for pair in report.pairs() if pair.error >= FIGHTING / 2]
    if error < MUCH or not fighting:
        return []
    worst = max(fighting, key=lambda pair: pair.error)
    a, b = report.tasks[worst.first], report.tasks[worst.second]
    where = f", most of all in {worst.worst[0][0]}" if worst.worst else ""
    fewer = "merge fewer LoRAs at once, leave one of the two out" if len(report.tasks) > 2 else "lower one's strength"
    return [
        f"Much is lost even so (error {error:.2f}). {a} and {b} fight most{where}: {fewer}, or put OSRM Refit before "
        "the merge."
    ]


def together(report: MergeReport, calibration: Calibration | None, routed: bool) -> list[str]:
    """What to do for pictures that show several of the LoRAs, where calibration has seen each one alone."""
    if not routed or calibration is None or len(report.tasks) < 2 or any(scene.tasks for scene in calibration.scenes):
        return []
    if math.isnan(report.reconstruction_error()):
        return []
    return [
        "Calibration saw each LoRA alone. For several of them in one picture (two subjects, a subject in a style) "
        "write that prompt into joint_prompts of SSR Merge or SSR Calibrate and run that; without it routing tends to "
        "keep one of them."
    ]
