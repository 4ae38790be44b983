"""What a merge did, as values and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from .compatibility import Pair, find_pairs, loudness
from .file_account import FileAccount
from .layer_report import LayerReport
from .modelmap import model_map, root_mean_square
from .report_text import markdown

ROUTERS = ("result", "sum", "average", "gains")
"""Whose errors every report has: this merge, the plain sum, the average, the best gain for each LoRA."""


@dataclass(frozen=True)
class MergeReport:
    """Everything a person should know about one merge.

    Attributes:
        method: Name and parameters of the method.
        tasks: Names of the LoRAs, in order.
        layers: One entry for each merged layer.
        files: One account for each LoRA.
        warnings: Plain sentences, each with what to do.
        notes: Plain sentences that are no warnings.
        advice: Plain sentences on how to get a better merge, with the values to set.
        strengths: Of each LoRA on the diffusion model.
        apart: How different the signals of two LoRAs' prompts are, median over layers.
        forecast: Whether nothing was merged, and this is what mode ssr would do.
    """

    method: str
    tasks: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    files: tuple[FileAccount, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    strengths: tuple[float, ...] = ()
    apart: Mapping[tuple[int, int], float] = field(default_factory=dict)
    forecast: bool = False

    @property
    def subject(self) -> str:
        """What the figures of router `result` are about."""
        return "mode ssr (forecast)" if self.forecast else "this merge"

    def reconstruction_error(self, router: str = "result", *, held_out: bool = False, task: int | None = None) -> float:
        """Root mean square over layers of the relative error; nan without routed layers.

        Args:
            router: One of `ROUTERS`.
            held_out: On held-out tokens instead of calibration's.
            task: For one LoRA instead of all.
        """
        values = []
        for layer in self.layers:
            if task is None:
                whole = layer.held_errors if held_out else layer.errors
                values += [whole[router]] if router in whole else []
            elif task in layer.tasks:
                single = layer.held_task_errors if held_out else layer.task_errors
                values += [single[router][layer.tasks.index(task)]] if router in single else []
        return root_mean_square(values)

    def crosstalk(self, router: str) -> list[list[float]]:
        """Energy of branch j under task i over all layers that all tasks share, rows divided by their maximum."""
        k = len(self.tasks)
        total = [[0.0] * k for _ in range(k)]
        for layer in self.layers:
            matrix = layer.crosstalk.get(router)
            if matrix is None or len(layer.tasks) != k:
                continue
            scale = sum(layer.crosstalk["sum"][i][i] for i in range(k)) / k
            if scale > 0:
                for i in range(k):
                    for j in range(k):
                        total[i][j] += matrix[i][j] / scale
        return [[value / max(max(row), 1e-300) for value in row] for row in total]

    def pairs(self) -> list[Pair]:
        """Which LoRAs fight, and where."""
        return find_pairs(len(self.tasks), self.layers, self.apart)

    def loudness(self) -> list[float]:
        """Energy of each LoRA's branch relative to the others'; nan for one that shares no layer."""
        return loudness(len(self.tasks), self.layers)

    def to_json(self) -> dict[str, object]:
        """Plain JSON values (nan becomes null)."""
        return {
            "method": self.method,
            "tasks": list(self.tasks),
            "strengths": list(self.strengths),
            "reconstruction_error_on_calibration": _numbers(self, held_out=False),
            "reconstruction_error_held_out": _numbers(self, held_out=True),
            "reconstruction_error_by_lora": [
                {
                    "calibration": _numbers(self, held_out=False, task=task),
                    "held_out": _numbers(self, held_out=True, task=task),
                }
                for task in range(len(self.tasks))
            ],
            "crosstalk": {"sum": self.crosstalk("sum"), "result": self.crosstalk("result")},
            "loudness": [_number(value) for value in self.loudness()],
            "pairs": [pair.to_json() for pair in self.pairs()],
            "map": [cell.to_json() for cell in model_map(self.layers)],
            "layers": [
                {
                    **asdict(layer),
                    "target": str(layer.target),
                    "part": layer.target.part,
                    "condition": _number(layer.condition),
                    "measures": {name: _number(value) for name, value in layer.measures.items()},
                }
                for layer in self.layers
            ],
            "files": [asdict(account) for account in self.files],
            "warnings": list(self.warnings),
            "advice": list(self.advice),
            "notes": list(self.notes),
        }

    def to_markdown(self) -> str:
        """The report as people read it: summary, pairs, map, files, what to do next last."""
        return markdown(self)


def _numbers(report: MergeReport, *, held_out: bool, task: int | None = None) -> dict[str, float | None]:
    return {name: _number(report.reconstruction_error(name, held_out=held_out, task=task)) for name in ROUTERS}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


__all__ = ["ROUTERS", "FileAccount", "LayerReport", "MergeReport"]
