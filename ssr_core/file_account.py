"""What became of the keys of one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .words import number_of

KeyFate = Literal[
    "routed",
    "merged",
    "passed_through",
    "anchored",
    "converted",
    "summed",
    "strength_0",
    "host_patch",
    "refused",
    "shadowed",
    "unmatched",
]

FATE_WORDS: Mapping[KeyFate, str] = {
    "routed": "routed",
    "merged": "merged without routing",
    "passed_through": "passed through unchanged (no other LoRA has the layer)",
    "anchored": "merged by the anchor (the layer never ran in calibration)",
    "converted": "converted to low rank, then merged like the others",
    "summed": "summed by strength (bias or norm)",
    "strength_0": "absent (strength 0)",
    "host_patch": "applied to the MODEL or CLIP as the host's own patch, not in the saved file",
    "refused": "refused",
    "shadowed": "given twice in the file, the later name counts (as in ComfyUI)",
    "unmatched": "not used",
}


@dataclass(frozen=True)
class FileAccount:
    """What became of one LoRA file's keys; the counts add up to `keys`.

    Attributes:
        name: The LoRA.
        keys: Number of keys in the file.
        fates: Number of keys by fate.
        details: `(key, fate, reason)` of every key that is not simply merged.
        conversion_error: Largest relative error of a converted layer; None where nothing was converted.
    """

    name: str
    keys: int
    fates: Mapping[KeyFate, int]
    details: tuple[tuple[str, KeyFate, str], ...] = ()
    conversion_error: float | None = None

    def summary(self) -> str:
        """One line."""
        fates = ", ".join(f"{count} {FATE_WORDS[fate]}" for fate, count in self.fates.items())
        error = self.conversion_error
        return f"{number_of(self.keys, 'key')}: {fates}" + (
            f" (largest relative error {error:.1e})" if error is not None else ""
        )


def count_fates(fates: Sequence[KeyFate]) -> dict[KeyFate, int]:
    """Count fates in the order of `FATE_WORDS`."""
    counter = Counter(fates)
    return {fate: counter[fate] for fate in FATE_WORDS if counter[fate]}
