"""Prompts that count more or less in a merge from records, and what its report says about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..ssr_core import Calibration, IncompatibleError, Share, SmallRecords, from_records
from ..ssr_core.words import number_of
from . import host
from .loading import Loaded
from .options import CalibrationOptions
from .recording import Recorded

_REMEDY = "write one number of 0 or more for each prompt, like 1 0.5, not all 0."


def parse_prompt_weights(text: str, loaded: Loaded) -> list[list[float]]:
    """One line for each LoRA: a weight for each of its prompts; an empty text is 1 for all.

    Raises:
        IncompatibleError: Other numbers of lines or weights, no numbers, or a LoRA without any weight.
    """
    counts = [1 if entry.conditioning is not None else len(entry.prompts) for entry in loaded.entries]
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        return [[1.0] * count for count in counts]
    if len(lines) != len(counts):
        raise IncompatibleError(
            f"lines of prompt weights: {len(lines)}, LoRAs: {len(counts)}.", remedy="write one line for each LoRA."
        )
    found = []
    for line, count, entry in zip(lines, counts, loaded.entries, strict=True):
        try:
            weights = [float(word) for word in line.replace(",", " ").split()]
        except ValueError as err:
            raise IncompatibleError(f"{line!r} are no weights.", file=entry.name, remedy=_REMEDY) from err
        usable = all(0 <= one < float("inf") for one in weights) and any(weights)
        if len(weights) != count or not usable:
            raise IncompatibleError(
                f"{line!r} are no weights of its prompts, which number {count}.", file=entry.name, remedy=_REMEDY
            )
        found.append(weights)
    return found


def weighted(loaded: Loaded, recorded: Recorded, weights: Sequence[Sequence[float]]) -> tuple[Loaded, Recorded]:
    """Weigh prompts; those of weight 0 are left out, as if they had not been written."""
    shares = [
        tuple(Share(share.record, weight) for share, weight in zip(mine, row, strict=True) if weight > 0)
        for mine, row in zip(recorded.shares, weights, strict=True)
    ]
    entries, tasks = [], []
    for entry, task, row in zip(loaded.entries, loaded.tasks, weights, strict=True):
        left = entry
        if entry.conditioning is None:
            left = replace(entry, prompts=tuple(p for p, w in zip(entry.prompts, row, strict=True) if w > 0))
        entries.append(left)
        tasks.append(replace(task, prompts=left.identity))
    return replace(loaded, entries=tuple(entries), tasks=tuple(tasks)), replace(recorded, shares=tuple(shares))


def put_together(
    loaded: Loaded,
    recorded: Recorded,
    weights: Sequence[Sequence[float]],
    sampling: CalibrationOptions,
    small: SmallRecords = "accept",
) -> tuple[Loaded, Recorded, Calibration]:
    """The calibration that records add up to.

    Args:
        loaded: The LoRAs.
        recorded: Their records.
        weights: For each LoRA one for each prompt.
        sampling: How they were recorded.
        small: As in `from_records`.

    Returns:
        LoRAs and records without prompts of weight 0, and the calibration.
    """
    loaded, recorded = weighted(loaded, recorded, weights)
    calibration = from_records(loaded.tasks, recorded.shares, small=small, tick=lambda done, total: host.check_cancel())
    return loaded, recorded, replace(calibration, settings={**sampling.settings(), **calibration.settings})


def record_notes(recorded: Recorded, settings: Mapping[str, Any]) -> list[str]:
    """What a merge's report says about the records behind it."""
    about = settings.get("records", {})
    notes = [recorded.sentence()]
    if about:
        notes.append(
            f"The records hold all but {100 * about['unknown_energy']:.2g} % of their layers' energy; the rest is "
            "taken as even in all directions. What a LoRA reads of its own inputs is exact."
        )
    if about.get("small"):
        notes.append(
            f"In {about['small']} of {about['layers']} layers the records keep fewer directions than the LoRAs read; "
            f"columns {about['columns']} would do for all."
        )
    if about.get("unsampled"):
        notes.append(
            f"{number_of(about['unsampled'], 'layer is', 'layers are')} merged without the correction from sampled inputs, which not all records "
            "have; set sampled_tokens for all of them."
        )
    return notes
