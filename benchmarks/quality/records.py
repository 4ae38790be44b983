"""What was measured, one value at a time."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One value.

    Attributes:
        table: Which table it belongs to.
        method: Row of the table.
        k: Number of LoRAs that were merged.
        metric: What was measured.
        seed: Seed of the run; equal seeds are paired across methods.
        value: The mean over the run's LoRAs and pictures.
    """

    table: str
    method: str
    k: int
    metric: str
    seed: int
    value: float


@dataclass(frozen=True)
class Row:
    """A mean over seeds."""

    table: str
    method: str
    k: int
    metric: str
    mean: float
    std: float
    seeds: int


def rows(records: Iterable[Record]) -> list[Row]:
    """Means and deviations over seeds, in the order in which they were measured."""
    groups: dict[tuple[str, str, int, str], list[float]] = defaultdict(list)
    for one in records:
        groups[(one.table, one.method, one.k, one.metric)].append(one.value)
    return [
        Row(*key, statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0, len(v)) for key, v in groups.items()
    ]


def paired(records: Sequence[Record], table: str, metric: str, first: str, second: str) -> list[float]:
    """Differences first - second over all runs that both were in."""
    values = {(r.method, r.k, r.seed): r.value for r in records if r.table == table and r.metric == metric}
    return [v - values[(second, k, s)] for (m, k, s), v in values.items() if m == first and (second, k, s) in values]
