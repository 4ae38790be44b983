"""Wall clock, repetitions by turns, ratios within one repetition."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """A quantity over repetitions.

    Attributes:
        median: The middle one.
        low: The least.
        high: The greatest.
    """

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        """The spread of some values."""
        return Spread(statistics.median(values), min(values), max(values))

    def json(self) -> dict[str, float]:
        """Rounded to four significant digits."""
        return {name: float(f"{value:.4g}") for name, value in vars(self).items()}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one run, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def by_turns(runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Time every run once in each repetition, starting with another one each time.

    A machine that slows down meanwhile slows all of them; a ratio within one repetition hardly moves.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for repetition in range(repeats):
        at = repetition % len(names)
        for name in names[at:] + names[:at]:
            found[name].append(seconds(runs[name], device))
    return found
