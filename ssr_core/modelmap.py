"""The map of the model: what happened in each block and kind of layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .layer_report import LayerReport
from .layout import Place, natural, place_of


@dataclass(frozen=True)
class MapCell:
    """All layers of one kind in one block.

    Attributes:
        place: Part, block and kind.
        statuses: Number of layers by status.
        interference: Error of the plain sum on the calibration tokens: how far the LoRAs' branches get
            in each other's way (root mean square over the layers); nan without statistics.
        error: Error of this merge, the same way.
        held_error: Error of this merge on held-out tokens; nan where none were held out.
        overlap: Mean squared cosine of the principal angles, over layers and pairs; nan for a single LoRA.
        coverage: Tokens that the least covered task saw, over the rank R.
        condition: The largest condition number (a lower bound); nan where nothing was solved.
    """

    place: Place
    statuses: Mapping[str, int]
    interference: float = math.nan
    error: float = math.nan
    held_error: float = math.nan
    overlap: float = math.nan
    coverage: float = math.nan
    condition: float = math.nan

    def to_json(self) -> dict[str, object]:
        """Plain JSON values (nan becomes null)."""
        numbers = ("interference", "error", "held_error", "overlap", "coverage", "condition")
        values = {name: getattr(self, name) for name in numbers}
        return {
            "part": self.place.part,
            "block": self.place.block,
            "kind": self.place.kind,
            "statuses": dict(self.statuses),
            **{name: value if math.isfinite(value) else None for name, value in values.items()},
        }


def model_map(layers: Sequence[LayerReport]) -> list[MapCell]:
    """One cell for each block and kind of layer, the text encoders last."""
    by_place: dict[Place, list[LayerReport]] = {}
    for layer in layers:
        by_place.setdefault(place_of(layer.target), []).append(layer)
    order = sorted(by_place, key=lambda place: (place.part == "clip", natural(place.block), natural(place.kind)))
    return [_cell(place, by_place[place]) for place in order]


def by_kind(layers: Sequence[LayerReport]) -> list[MapCell]:
    """The same over all blocks: one cell for each kind of layer."""
    by_place: dict[Place, list[LayerReport]] = {}
    for layer in layers:
        place = place_of(layer.target)
        by_place.setdefault(Place(place.part, "", place.kind), []).append(layer)
    order = sorted(by_place, key=lambda place: (place.part == "clip", natural(place.kind)))
    return [_cell(place, by_place[place]) for place in order]


def _cell(place: Place, layers: Sequence[LayerReport]) -> MapCell:
    overlaps = [
        row[j] for layer in layers for i, row in enumerate(layer.overlap) for j in range(i) if len(layer.overlap) > 1
    ]
    coverages = [min(layer.tokens) / layer.rank for layer in layers if layer.tokens and layer.rank]
    conditions = [layer.condition for layer in layers if math.isfinite(layer.condition)]
    return MapCell(
        place,
        Counter(layer.status for layer in layers),
        root_mean_square([layer.errors["sum"] for layer in layers if layer.errors]),
        root_mean_square([layer.errors["result"] for layer in layers if layer.errors]),
        root_mean_square([layer.held_errors["result"] for layer in layers if layer.held_errors]),
        sum(overlaps) / len(overlaps) if overlaps else math.nan,
        min(coverages, default=math.nan),
        max(conditions, default=math.nan),
    )


def root_mean_square(values: Sequence[float]) -> float:
    """Of any numbers; nan for none."""
    return math.sqrt(sum(value**2 for value in values) / len(values)) if values else math.nan
