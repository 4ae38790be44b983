"""What OSRM Init says of the start that it made."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .finite import nonfinite_warnings
from .moments import Features
from .osrm import InitResult
from .targets import Target
from .words import number_of

FEW_MEANS = 50
"""Below so many samples Init says that means are few; the paper takes up to about 100 a task."""

FEW_MEANS_REMEDY = "Write more prompts, take more steps, or set features to tokens."

TIGHT = 0.5
"""From this share of what random rows see, Init says that a layer has little room."""

TIGHT_REMEDY = "Lower the rank, or leave such layers out by layers or only."


def init_markdown(result: InitResult, rank: int, names: Sequence[str], features: Features = "means") -> str:
    """The report as people read it."""
    reports = result.reports
    lines = [
        "# OSRM Init",
        "",
        f"{number_of(len(reports), 'layer')} of rank {rank}, outside the inputs of: {', '.join(names)}.",
    ]
    if reports:
        mean = math.fsum(one.likely for one in reports) / len(reports)
        bound = math.fsum(one.bound for one in reports) / len(reports)
        most = f" (an estimate, as wide layers are sketched; {bound:.2e} at most)" if bound > mean else ""
        lines.append(f"\nEnergy of those inputs in the rows of down, against random rows: {mean:.2e} on average{most}.")
        worst = max(reports, key=lambda one: one.likely)
        lines.append(f"Largest: {worst.likely:.2e} in {worst.target}, which saw {worst.tokens:.0f} samples or tokens.")
        tight = sum(one.likely > TIGHT for one in reports)
        if tight:
            lines += [
                "",
                f"Warning: in {number_of(tight, 'layer')} the others' inputs leave little room for rank {rank}: its "
                f"rows see more than {TIGHT:.0%} of what random ones see, most in {worst.target}. {TIGHT_REMEDY}",
            ]
        if features == "means" and worst.tokens < FEW_MEANS:
            lines += [
                "",
                f"Warning: the other tasks are known by few samples, {worst.tokens:.0f} in {worst.target}: with "
                "features means each prompt gives one a step, the mean of its tokens. The start avoids those means "
                f"and may meet what single tokens hold besides. Fewer than {FEW_MEANS} count as few here; the paper "
                f"takes up to about 100 a task. {FEW_MEANS_REMEDY}",
            ]
    reasons: dict[str, list[Target]] = {}
    for target, reason in result.skipped.items():
        reasons.setdefault(reason, []).append(target)
    for reason, targets in reasons.items():
        lines += [
            "",
            f"{number_of(len(targets), 'layer is', 'layers are')} not in the file ({reason}), e.g. {targets[0]}.",
        ]
    lines += [f"\nWarning: {sentence}" for sentence in nonfinite_warnings(result.nonfinite)]
    return "\n".join(lines) + "\n"
