"""Several methods or settings from one calibration, side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .calibration import Calibration
from .errors import IncompatibleError, SolveError
from .merge import Unsupported, describe, merge
from .method_lines import parse_method
from .report import MergeReport
from .report_text import number, table
from .stacks import Task

_EXPLAINED = (
    "Errors: 0 if every LoRA acts on its own prompt as if it were alone, 1 if it were off. Own signal kept: energy of "
    "each LoRA's branch under its own prompt (1 is right). Leak: energy of the branches under others' prompts (0 is "
    "right)."
)


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        label: As it was asked for.
        method: Name and all parameters; "" where it does not apply.
        error: Reconstruction error on the calibration tokens; nan without any.
        held_error: On held-out tokens, by the method fitted on the others; nan where none were held out.
        kept: Energy of the LoRAs' branches under their own prompts over what it is when they act alone.
        leak: Energy of the branches under others' prompts over the same.
        seconds: What the solve took, its diagnostics included.
        refused: Why the method does not apply; "" where it does.
    """

    label: str
    method: str = ""
    error: float = math.nan
    held_error: float = math.nan
    kept: float = math.nan
    leak: float = math.nan
    seconds: float = 0.0
    refused: str = ""

    @property
    def score(self) -> float:
        """What rows are ranked by: the held-out error, the other where there is none; infinite for a refusal."""
        values = [value for value in (self.held_error, self.error) if math.isfinite(value)]
        return values[0] if values and not self.refused else math.inf


@dataclass(frozen=True)
class Comparison:
    """A row for each method.

    Attributes:
        tasks: Names of the LoRAs.
        rows: In the order that was asked for.
    """

    tasks: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def best(self) -> int:
        """Index of the row with the smallest score.

        Raises:
            IncompatibleError: No method applies.
        """
        index = min(range(len(self.rows)), key=lambda i: (self.rows[i].score, bool(self.rows[i].refused)))
        if self.rows[index].refused:
            raise IncompatibleError("none of the methods applies.", remedy=self.rows[index].refused)
        return index

    def to_markdown(self, chosen: int) -> str:
        """The table and, below it, what to do next.

        Args:
            chosen: The row whose merge is used.
        """
        head = ["", "method", "held-out error", "calibration error", "own signal kept", "leak", "seconds"]
        rows = []
        for index, row in enumerate(self.rows):
            numbers = [number(value) for value in (row.held_error, row.error, row.kept, row.leak)]
            name = f"**{row.label}**" if index == chosen else row.label
            rows.append([str(index + 1), name, *numbers, "-" if row.refused else f"{row.seconds:.1f}"])
        lines = ["# SSR-Merge comparison", "", f"LoRAs: {', '.join(self.tasks)}.", "", *table(head, rows), ""]
        lines += [_EXPLAINED, ""]
        lines += [f"- {row.label}: not applicable. {row.refused}" for row in self.rows if row.refused]
        lines += ["", "## What to do next", "", f"- {self._advice(chosen)}"]
        return "\n".join(lines) + "\n"

    def _advice(self, chosen: int) -> str:
        best, mine = self.rows[self.best], self.rows[chosen]
        if not math.isfinite(best.score):
            return "Connect a calibration whose LoRAs share layers: without one the methods cannot be told apart."
        if best.score >= mine.score:
            return f"Use {mine.label}: no other has a smaller error here ({mine.score:.3f}). Look at pictures as well."
        line = self.best + 1
        return (
            f"You use {mine.label} (error {mine.score:.3f}); {best.label} has {best.score:.3f}: set choose to {line}, "
            "or to best."
        )


def compare(
    tasks: Sequence[Task],
    lines: Sequence[str],
    calibration: Calibration,
    *,
    device: torch.device | None = None,
    unsupported: Unsupported = "refuse",
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Solve with each method and measure; the merges themselves are not kept.

    Args:
        tasks: The LoRAs.
        lines: Methods with their settings (`parse_method`).
        calibration: What all of them are measured by.
        device: Where to solve.
        unsupported: As in `merge`.
        tick: Called with (methods done, methods in all); may raise to cancel.

    Raises:
        IncompatibleError: There are no lines.
    """
    if not lines:
        raise IncompatibleError("there is nothing to compare.", remedy="write one method a line, e.g. ssr and sum.")
    rows = []
    for index, line in enumerate(lines):
        tick(index, len(lines))
        begin = time.perf_counter()
        try:
            method = parse_method(line)
            report = merge(tasks, method, calibration, device=device, unsupported=unsupported).report
        except (IncompatibleError, SolveError) as err:
            rows.append(Row(line, refused=" ".join(part for part in (_sentence(err.what), err.remedy) if part)))
            continue
        rows.append(_row(line, describe(method), report, time.perf_counter() - begin))
    tick(len(lines), len(lines))
    return Comparison(tuple(task.name for task in tasks), tuple(rows))


def _row(label: str, method: str, report: MergeReport, seconds: float) -> Row:
    before = kept = leak = 0.0
    for layer in report.layers:
        if not layer.crosstalk:
            continue
        own, result = layer.crosstalk["sum"], layer.crosstalk["result"]
        total = sum(own[i][i] for i in range(len(own)))
        if total > 0:
            before += 1
            kept += sum(result[i][i] for i in range(len(own))) / total
            leak += sum(v for i, line in enumerate(result) for j, v in enumerate(line) if i != j) / total
    return Row(
        label,
        method,
        report.reconstruction_error(),
        report.reconstruction_error(held_out=True),
        kept / before if before else math.nan,
        leak / before if before else math.nan,
        seconds,
    )


def _sentence(what: str) -> str:
    return what[:1].upper() + what[1:]
