"""What would make the next merge better, in plain words with the values to set.

Warnings (`advice`) say what is wrong; these say what to try. Each looks at one number of the report
and is silent where that number is fine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from .advice import SAME_SIGNAL
from .compatibility import APART, FIGHTING, MEETING, balancing, loudness
from .joint_advice import less_weight
from .methods import AverageMerge, GainsMerge, MergeMethod, SSRMerge, SumMerge, routes
from .report import MergeReport
from .rounds import rounds_of
from .sampling import SampleOptions
from .words import number_of

LOUD = 4.0
"""Energy of one LoRA over that of the others (or the other way round) from which its strength is worth changing."""

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

MOST_STEPS, LARGEST_SIDE = 100, 8192
"""What the inputs steps, width and height of the nodes take at most."""


def suggestions(report: MergeReport, settings: Mapping[str, object], method: MergeMethod) -> list[str]:
    """All suggestions about one merge, the most important first.

    Args:
        report: The merge.
        settings: How its calibration was made (`Calibration.settings`).
        method: What it was merged by.
    """
    error = report.reconstruction_error()
    if math.isnan(error):
        return []
    if report.reconstruction_error("sum") < APART:
        return [*_louder(report), *_sum_suffices(report, method)]
    found = _louder(report)
    if isinstance(method, (SumMerge, AverageMerge, GainsMerge)):
        found += _not_routed(report)
    elif routes(method):
        lower = less_weight(report, method) if error >= MUCH else []
        found += lower or _alike(report)
        found += [*(_overfit(report, settings) or _few_tokens(report, settings)), *_ill(report), *_drowned(report)]
        found += [] if lower else _much_left(report, settings, method)
    return found


def _louder(report: MergeReport) -> list[str]:
    """The LoRA whose branch is furthest from the others' in energy, where that is far."""
    loud = loudness(len(report.tasks), [layer for layer in report.layers if layer.target.part == "model"])
    usable = [index for index, value in enumerate(loud) if math.isfinite(value) and value > 0]
    if len(usable) < 2 or len(report.strengths) != len(report.tasks):
        return []
    # of two, each is as far from the other: then the louder one
    far = {index: abs(math.log(loud[index] / _others(loud, usable, index))) for index in usable}
    odd = max(usable, key=lambda index: (round(far[index], 9), loud[index]))
    name, strength, others = report.tasks[odd], report.strengths[odd], _others(loud, usable, odd)
    ratio = loud[odd] / others
    if max(ratio, 1 / ratio) < LOUD or strength == 0:
        return []
    value = f"strength_model of {name} to {_digits(balancing(strength, loud[odd], others))} (now {strength:g})"
    if len(usable) == 2:
        other = next(index for index in usable if index != odd)
        weak, now = report.tasks[other], report.strengths[other]
        raised = _digits(balancing(now, loud[other], loud[odd]))
        return [
            f"{name} carries {ratio:.3g}x the energy of {weak}. If {weak} is too weak in your pictures, set {value}, "
            f"or that of {weak} to {raised} (now {now:g}): either balances the two."
        ]
    if ratio > 1:
        return [
            f"{name} carries {ratio:.3g}x the energy of the others (their geometric mean). If they are too weak in "
            f"your pictures, set {value}: that is their level."
        ]
    return [
        f"The others carry {1 / ratio:.3g}x the energy of {name} (their geometric mean). If it is too weak in your "
        f"pictures, set {value}, or multiply theirs by {_digits(math.sqrt(ratio))}: either brings it to their level."
    ]


def _others(loud: list[float], usable: list[int], index: int) -> float:
    """Geometric mean of the others' loudness."""
    logs = [math.log(loud[other]) for other in usable if other != index]
    return math.exp(sum(logs) / len(logs))


def _digits(value: float) -> str:
    """Two digits, as a person types them."""
    return f"{float(f'{value:.2g}'):g}"


def _sum_suffices(report: MergeReport, method: MergeMethod) -> list[str]:
    if isinstance(method, SumMerge):
        return []
    return [
        f"These LoRAs hardly meet: the plain sum's error is {report.reconstruction_error('sum'):.2f}. Mode sum, or a "
        "chain of LoRA loaders, gives nearly the same picture."
    ]


def _not_routed(report: MergeReport) -> list[str]:
    """A router that cannot tell the LoRAs apart, where they meet."""
    error = report.reconstruction_error()
    if error < MEETING:
        return []
    return [
        f"This mode treats all signals alike and leaves an error of {error:.2f} (0: each LoRA as if alone, 1: as if "
        "it were off). Set mode to ssr; SSR Compare shows beforehand what that gains."
    ]


def _alike(report: MergeReport) -> list[str]:
    """Routing that gains little, and the two prompts that are to blame (a warning says it where they are the same)."""
    others = {name: report.reconstruction_error(name) for name in ("sum", "average", "gains")}
    best = min(others, key=lambda name: others[name])
    error = report.reconstruction_error()
    if error < NOTICEABLE or error < USEFUL * others[best] or not report.apart:
        return []
    first, second = min(report.apart, key=lambda pair: report.apart[pair])
    if report.apart[(first, second)] < SAME_SIGNAL:
        return []
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
    ways = [f"steps to {min(MOST_STEPS, 4 * steps)}"] if steps < MOST_STEPS else []
    if max(width, height) <= LARGEST_SIDE // 2:
        ways.append(f"width and height to {2 * width} x {2 * height}")
    return f"Set {', or '.join(ways)}." if ways else "Give each LoRA more prompts."


def _ill(report: MergeReport) -> list[str]:
    bad = [layer for layer in report.layers if math.isfinite(layer.condition) and layer.condition > SINGULAR]
    if not bad:
        return []
    worst = max(bad, key=lambda layer: layer.condition)
    return [
        f"{number_of(len(bad), 'layer is', 'layers are')} nearly singular (condition {worst.condition:.0e} "
        f"in {worst.target}): small changes of the noise change the merge there. Set ridge to 0.01."
    ]


def _drowned(report: MergeReport) -> list[str]:
    """LoRAs that a plain sum would have kept as well, though the merge as a whole is better."""
    held = not math.isnan(report.reconstruction_error(held_out=True))
    tokens = "held-out" if held else "calibration's"
    found = []
    for index, name in enumerate(report.tasks):
        mine, plain = (report.reconstruction_error(one, held_out=held, task=index) for one in ("result", "sum"))
        if math.isfinite(mine) and mine > max(MUCH, plain) and len(report.strengths) == len(report.tasks):
            strength = report.strengths[index]
            found.append(
                f"{name} comes out no better than in a plain sum (error {mine:.2f} against {plain:.2f} on {tokens} "
                f"tokens): what the others add weighs more than it does itself. Give it two or three prompts, or raise "
                f"its strength_model (now {strength:g})."
            )
    return found


def _much_left(report: MergeReport, settings: Mapping[str, object], method: MergeMethod) -> list[str]:
    error = report.reconstruction_error()
    fighting = [pair for pair in report.pairs() if pair.error >= FIGHTING / 2]
    if error < MUCH or not fighting:
        return []
    worst = max(fighting, key=lambda pair: pair.error)
    a, b = report.tasks[worst.first], report.tasks[worst.second]
    where = f", most of all in {worst.worst[0][0]}" if worst.worst else ""
    ways = ["merge without one of the two"] if len(report.tasks) > 2 else []
    if isinstance(method, SSRMerge) and method.refine and settings.get("sampled_tokens") == 0:
        ways.append(f"calibrate with sampled_tokens {SampleOptions().tokens}")
    if isinstance(method, SSRMerge) and rounds_of(settings) == 1 and "records" not in settings:
        ways.append("calibrate in 2 rounds")
    ways.append("put OSRM Refit (mode contrast) between the SSR LoRA nodes and the calibration")
    return [f"Much is lost even so (error {error:.2f}). {a} and {b} fight most{where}: {', or '.join(ways)}."]
