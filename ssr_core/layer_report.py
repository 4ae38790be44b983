"""What a merge did to one layer, as values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .targets import Target

LayerStatus = Literal["routed", "merged", "passed_through", "anchored"]


@dataclass(frozen=True)
class LayerReport:
    """One merged layer.

    Attributes:
        target: Module and rows.
        status: What was done.
        tasks: Indices of the LoRAs that have the layer.
        rank: R, the sum of their ranks.
        tokens: Weighted tokens that calibration saw here, for each of `tasks`.
        nonfinite: Tokens left out because they were NaN or infinite.
        condition: Condition number of the solved matrix (a lower bound); nan where nothing was solved.
        errors: Relative reconstruction error on the calibration tokens, by router: "result", "sum",
            "average", "gains"; empty without statistics.
        crosstalk: Two (K, K) matrices, sum and result: mean energy of branch j under task i.
        measures: Numbers of the method's own, by what they are called in the report.
        task_errors: As `errors`, for each of `tasks`.
        held_errors: As `errors`, on tokens that the router was not fitted on; empty where none were held out.
        held_task_errors: As `held_errors`, for each of `tasks`.
        held_tokens: Weighted tokens that were held out, for each of `tasks`.
        overlap: (K, K), mean squared cosine of the principal angles between the spaces that the LoRAs read.
        closest: (K, K), the largest of those cosines.
    """

    target: Target
    status: LayerStatus
    tasks: tuple[int, ...]
    rank: int
    tokens: tuple[float, ...] = ()
    nonfinite: int = 0
    condition: float = math.nan
    errors: Mapping[str, float] = field(default_factory=dict)
    crosstalk: Mapping[str, list[list[float]]] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)
    task_errors: Mapping[str, list[float]] = field(default_factory=dict)
    held_errors: Mapping[str, float] = field(default_factory=dict)
    held_task_errors: Mapping[str, list[float]] = field(default_factory=dict)
    held_tokens: tuple[float, ...] = ()
    overlap: list[list[float]] = field(default_factory=list)
    closest: list[list[float]] = field(default_factory=list)
