"""Which LoRAs fight, where, how loud each one is: from the energies of their branches.

All from `LayerReport.crosstalk["sum"]`, the energy X_ij per token of branch j under prompt i when
every LoRA acts in full. The plain sum of i and j alone leaves branch j on prompt i as its error, so
`sqrt((X_ij + X_ji) / (X_ii + X_jj))` is what merging the two by addition costs, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from .layer_report import LayerReport
from .layout import place_of

APART, MEETING, FIGHTING = 0.15, 0.5, 1.0
"""Errors of a pair's plain sum up to which the two hardly meet, meet in part, or fight."""


@dataclass(frozen=True)
class Pair:
    """Two LoRAs on the layers that both have.

    Attributes:
        first: Index of one.
        second: Index of the other.
        layers: How many layers were compared.
        error: Relative error of the plain sum of these two, over all those layers, each scaled by its
            own energy; nan without statistics.
        heard: Energy of the second's branch under the first's prompt over the first's own, and the other
            way round; nan without statistics.
        overlap: Mean squared cosine of the principal angles.
        angle: Smallest principal angle in degrees, median over layers.
        apart: How different their prompts' signals are (`diagnostics.separability`), median; nan if unknown.
        worst: Up to three (block and kind, error of the plain sum there), the worst first.
    """

    first: int
    second: int
    layers: int
    error: float
    heard: tuple[float, float]
    overlap: float
    angle: float
    apart: float
    worst: tuple[tuple[str, float], ...] = ()

    @property
    def verdict(self) -> str:
        """What that predicts, in words."""
        if math.isnan(self.error):
            return "not known without a calibration"
        if self.error < APART:
            return "they hardly meet: the plain sum of the two is nearly exact"
        if self.error < MEETING:
            return "they meet in part: routing helps"
        if self.error < FIGHTING:
            return "they fight: each disturbs the other's prompt, routing is needed"
        return "they fight hard: on its own prompt each LoRA hears the other as loudly as itself"

    def to_json(self) -> dict[str, object]:
        """Plain JSON values (nan becomes null)."""
        return {
            "first": self.first,
            "second": self.second,
            "layers": self.layers,
            "error": _number(self.error),
            "heard": [_number(value) for value in self.heard],
            "overlap": _number(self.overlap),
            "angle": _number(self.angle),
            "apart": _number(self.apart),
            "worst": [{"place": place, "error": error} for place, error in self.worst],
            "verdict": self.verdict,
        }


def find_pairs(
    count: int, layers: Sequence[LayerReport], apart: Mapping[tuple[int, int], float] | None = None
) -> list[Pair]:
    """Compare every two LoRAs that share a layer.

    Args:
        count: Number of LoRAs.
        layers: All merged layers.
        apart: How different the signals of two LoRAs' prompts are, where it is known.
    """
    found = []
    for first, second in combinations(range(count), 2):
        shared = [layer for layer in layers if first in layer.tasks and second in layer.tasks and layer.overlap]
        if shared:
            found.append(_pair(first, second, shared, (apart or {}).get((first, second), math.nan)))
    return found


def _pair(first: int, second: int, layers: Sequence[LayerReport], apart: float) -> Pair:
    totals = [0.0] * 4  # X_ii, X_ij, X_ji, X_jj, each layer scaled to one
    places: dict[str, list[float]] = {}
    overlaps, angles = [], []
    for layer in layers:
        i, j = layer.tasks.index(first), layer.tasks.index(second)
        overlaps.append(layer.overlap[i][j])
        angles.append(math.degrees(math.acos(min(1.0, layer.closest[i][j]))))
        x = layer.crosstalk.get("sum")
        own = 0.0 if x is None else x[i][i] + x[j][j]
        if x is None or own <= 0:
            continue
        totals = [t + v / own for t, v in zip(totals, (x[i][i], x[i][j], x[j][i], x[j][j]), strict=True)]
        here = places.setdefault(str(place_of(layer.target)), [0.0, 0.0])
        here[0] += (x[i][j] + x[j][i]) / own
        here[1] += 1
    a, ab, ba, b = totals
    worst = sorted(((name, math.sqrt(e / n)) for name, (e, n) in places.items()), key=lambda one: -one[1])[:3]
    return Pair(
        first,
        second,
        len(layers),
        math.sqrt((ab + ba) / (a + b)) if a + b > 0 else math.nan,
        (ab / a if a > 0 else math.nan, ba / b if b > 0 else math.nan),
        sum(overlaps) / len(overlaps),
        median(angles),
        apart,
        tuple(worst),
    )


def loudness(count: int, layers: Sequence[LayerReport]) -> list[float]:
    """Energy of each LoRA's branch on its own prompt, relative to the others' on theirs.

    Returns:
        For each LoRA the geometric mean, over the layers that it shares, of its energy over the geometric
        mean of all LoRAs there; nan for one that shares none.
    """
    logs: list[list[float]] = [[] for _ in range(count)]
    for layer in layers:
        x = layer.crosstalk.get("sum")
        if x is None or len(layer.tasks) < 2 or min(x[i][i] for i in range(len(layer.tasks))) <= 0:
            continue
        own = [math.log(x[i][i]) for i in range(len(layer.tasks))]
        mean = sum(own) / len(own)
        for task, value in zip(layer.tasks, own, strict=True):
            logs[task].append(value - mean)
    return [math.exp(sum(one) / len(one)) if one else math.nan for one in logs]


def balancing(strength: float, loud: float, others: float) -> float:
    """The strength at which a LoRA carries the others' energy: energy goes with its square."""
    return strength * math.sqrt(others / loud)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
