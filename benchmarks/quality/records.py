"""What was measured, one value at a time."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


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


@dataclass(frozen=True)
class Kept:
    """What jobs measured, a file each.

    Attributes:
        folder: Where the files are.
    """

    folder: Path

    def has(self, job: str) -> bool:
        """Whether a job was measured."""
        return self._file(job).exists()

    def clear(self) -> None:
        """Forget everything."""
        for file in self.folder.glob("*.jsonl"):
            file.unlink()

    def write(self, job: str, found: Sequence[Record]) -> None:
        """Keep what a job measured; its methods that were not measured this time keep their values."""
        measured = {(one.table, one.method) for one in found}
        others = [one for one in self.read([job]) if (one.table, one.method) not in measured]
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(one)) + "\n" for one in (*others, *found)]
        self._file(job).write_text("".join(lines), encoding="utf-8")

    def read(self, jobs: Sequence[str]) -> list[Record]:
        """All values of these jobs, in their order."""
        files = [self._file(job) for job in jobs if self.has(job)]
        lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        return [Record(**json.loads(line)) for line in lines]

    def _file(self, job: str) -> Path:
        return self.folder / f"{job}.jsonl"
