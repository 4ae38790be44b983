"""What settings say about rounds of calibration (`round_sums`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROUNDS = "rounds"
"""Setting: how often all passes ran; 1 where it does not say."""

GONE = "rounds_gone"
"""Setting: names of LoRAs that the merges of further rounds had, and that are not there any more."""


def rounds_of(settings: Mapping[str, Any]) -> int:
    """Rounds of a calibration, or the most that one of its summed runs had."""
    runs: Sequence[Mapping[str, Any]] = settings.get("runs", ())
    found = [settings.get(ROUNDS, 1), *(run["settings"].get(ROUNDS, 1) for run in runs)]
    return max(int(one) for one in found)


def settings_without(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Settings of a calibration that some LoRAs leave.

    Args:
        settings: Of all of them.
        names: Of those that leave.
    """
    if not names or rounds_of(settings) == 1:
        return dict(settings)
    return {**settings, GONE: sorted({*settings.get(GONE, ()), *names})}
