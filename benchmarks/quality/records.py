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
    """What jobs measured, a file each: which methods, and their values.

    Attributes:
        folder: Where the files are.
    """

    folder: Path

    def clear(self) -> None:
        """Forget everything."""
        for file in self.folder.glob("*.json"):
            file.unlink()

    def write(self, job: str, methods: Sequence[str], found: Sequence[Record], *, add: bool) -> None:
        """Keep what a job measured.

        Args:
            job: Its name.
            methods: What it compared.
            found: The values.
            add: Keep earlier values of other methods, too.
        """
        known, before = self._read(job) if add else ([], [])
        measured = {(one.table, one.method) for one in found}
        records = [*(one for one in before if (one.table, one.method) not in measured), *found]
        names = [*(name for name in known if name not in methods), *methods]
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {"methods": names, "records": [asdict(one) for one in records]}
        beside = self.folder / f"{job}.tmp"
        beside.write_text(json.dumps(whole, indent=0), encoding="utf-8")
        beside.replace(self._file(job))

    def methods(self, job: str) -> list[str] | None:
        """What a job has compared; None if it never ran."""
        return self._read(job)[0] if self._file(job).exists() else None

    def read(self, job: str) -> list[Record]:
        """What a job measured."""
        return self._read(job)[1]

    def _read(self, job: str) -> tuple[list[str], list[Record]]:
        if not self._file(job).exists():
            return [], []
        whole = json.loads(self._file(job).read_text(encoding="utf-8"))
        return whole["methods"], [Record(**one) for one in whole["records"]]

    def _file(self, job: str) -> Path:
        return self.folder / f"{job}.json"
