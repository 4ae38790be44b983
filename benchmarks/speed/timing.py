"""Clocks, repetitions by turns, ratios within one repetition."""

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


def clock_for(device: torch.device) -> Callable[[], float]:
    """Processor time where one CPU thread does all the work: what else the machine does then hardly shows."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def seconds(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Time of one run, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def by_turns(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Time every run once in each repetition, starting with another one each time.

    A machine that slows down meanwhile slows all of them; a ratio within one repetition hardly moves.

    Args:
        runs: What to time, by name.
        repeats: Repetitions.
        device: Where it runs.
        clock: `clock_for(device)` if None.
    """
    clock = clock or clock_for(device)
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for repetition in range(repeats):
        at = repetition % len(names)
        for name in names[at:] + names[:at]:
            found[name].append(seconds(runs[name], device, clock))
    return found
