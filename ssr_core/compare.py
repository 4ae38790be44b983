"""Several methods or settings from one calibration, side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .calibration import Calibration
from .errors import IncompatibleError, SolveError
from .layer_report import LayerReport
from .merge import Unsupported, describe, merge
from .method_lines import NoMergeError, parse_lines
from .report import MergeReport
from .report_text import number, table
from .stacks import Task
from .targets import Target

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


@dataclass(frozen=True)
class Comparison:
    """A row for each method.

    Attributes:
        tasks: Names of the LoRAs.
        rows: In the order that was asked for.
        measured: Layers that every method measured, which all rows are about.
        known: Layers that at least one method measured.
        judged: Layers that the held-out errors are about.
    """

    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    measured: int = 0
    known: int = 0
    judged: int = 0

    @property
    def held(self) -> bool:
        """Whether rows are ranked by held-out tokens: where any row has a figure on them, all are."""
        return any(math.isfinite(row.held_error) for row in self.rows)

    @property
    def ranked_by(self) -> str:
        """What rows are ranked by, as the table names it."""
        return "held-out error" if self.held else "calibration error"

    def score(self, index: int) -> float:
        """What a row is ranked by, the smaller the better: `ranked_by`, all LoRAs together; infinite without it."""
        value = self.rows[index].held_error if self.held else self.rows[index].error
        return value if math.isfinite(value) else math.inf

    @property
    def best(self) -> int:
        """Index of the row with the smallest score.

        Raises:
            IncompatibleError: No method applies.
        """
        index = min(range(len(self.rows)), key=lambda i: (self.score(i), bool(self.rows[i].refused)))
        if self.rows[index].refused:
            raise IncompatibleError("none of the methods applies.", remedy=self.rows[index].refused)
        return index

    def to_markdown(self, chosen: int) -> str:
        """The table and, below it, what to do next.

        Args:
            chosen: The row whose merge is used.
        """
        head = ["", "method", "held-out error", "calibration error", "own signal kept", "leak", "seconds"]
        best = self.best if math.isfinite(self.score(self.best)) else -1
        rows = []
        for index, row in enumerate(self.rows):
            numbers = [number(value) for value in (row.held_error, row.error, row.kept, row.leak)]
            if index == best:
                numbers[0 if self.held else 1] += " (best)"
            name = f"**{row.label}**" if index == chosen else row.label
            rows.append([str(index + 1), name, *numbers, "-" if row.refused else f"{row.seconds:.1f}"])
        lines = ["# SSR-Merge comparison", "", f"LoRAs: {', '.join(self.tasks)}.", "", *table(head, rows), ""]
        lines += [self._ranking(), "", _EXPLAINED, "", *self._basis()]
        lines += [f"- {row.label}: not applicable. {row.refused}" for row in self.rows if row.refused]
        lines += ["", "## What to do next", "", f"- {self._advice(chosen)}"]
        return "\n".join(lines) + "\n"

    def _ranking(self) -> str:
        """What the methods are ranked by."""
        held = (
            "The router that is judged was fitted without those tokens; the merge itself uses all of them."
            if self.held
            else "That error flatters whatever fits closely: the calibration holds no tokens that were kept out of the "
            "fit."
        )
        return (
            f"Ranked by {self.ranked_by}, all LoRAs together, root mean square over layers: the smallest is the best. "
            f"{held} Bold: the merge in use."
        )

    def _basis(self) -> list[str]:
        """Which layers the numbers are about."""
        if not self.known:
            return []
        less = " The others are left out, so that every line is about the same layers." * (self.measured < self.known)
        part = f" Held-out errors are about {self.judged} of them." * (self.held and self.judged < self.measured)
        lines = [f"Measured by every method: {self.measured} of {self.known} layers.{less}{part}", ""]
        for index, row in enumerate(self.rows):
            if not row.refused and not math.isfinite(self.score(index)):
                tokens = " on held-out tokens" if self.held and math.isfinite(row.error) else ""
                lines += [f"- {row.label}: its answer cannot be measured{tokens} in any of these layers."]
        return lines

    def _advice(self, chosen: int) -> str:
        best, mine = self.score(self.best), self.score(chosen)
        if not math.isfinite(best):
            return "Connect a calibration whose LoRAs share layers: without one the methods cannot be told apart."
        label = self.rows[chosen].label
        if best >= mine:
            return (
                f"Use {label}: no other has a smaller {self.ranked_by} ({mine:.3f}). It says how faithfully the LoRAs "
                "are kept, not how pictures look: look at them as well."
            )
        has = f"{self.ranked_by} {mine:.3f}" if math.isfinite(mine) else f"no {self.ranked_by}"
        return (
            f"You use {label} ({has}); {self.rows[self.best].label} has {best:.3f}: set choose to {self.best + 1}, or "
            "to best."
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
        IncompatibleError: There are no lines, or one of them means nothing; before anything is solved.
    """
    if not lines:
        raise IncompatibleError("there is nothing to compare.", remedy="write one method a line, e.g. ssr and sum.")
    rows: list[Row] = []
    reports: dict[int, MergeReport] = {}
    for index, (line, method) in enumerate(zip(lines, parse_lines(lines), strict=True)):
        tick(index, len(lines))
        begin = time.perf_counter()
        try:
            if isinstance(method, NoMergeError):
                raise method
            report = merge(tasks, method, calibration, device=device, unsupported=unsupported).report
        except (IncompatibleError, SolveError) as err:
            rows.append(Row(line, refused=" ".join(part for part in (_sentence(err.what), err.remedy) if part)))
            continue
        rows.append(Row(line, describe(method), seconds=time.perf_counter() - begin))
        reports[index] = report
    tick(len(lines), len(lines))
    measured, known = _shared([[layer for layer in one.layers if layer.errors] for one in reports.values()])
    held, _ = _shared([[layer for layer in one.layers if layer.held_errors] for one in reports.values()])
    for index, report in reports.items():
        rows[index] = _scored(rows[index], report, measured, held)
    return Comparison(tuple(task.name for task in tasks), tuple(rows), len(measured), known, len(held))


def _shared(layers: Sequence[Sequence[LayerReport]]) -> tuple[set[Target], int]:
    """Layers that every method measured, of the methods that measured any; how many at least one did."""
    sets = [{layer.target for layer in one} for one in layers if one]
    return set.intersection(*sets) if sets else set(), len(set().union(*sets))


def _scored(row: Row, report: MergeReport, measured: set[Target], held: set[Target]) -> Row:
    """The row with its numbers, over these layers alone."""
    before = kept = leak = 0.0
    seen = replace(report, layers=tuple(layer for layer in report.layers if layer.target in measured))
    judged = replace(report, layers=tuple(layer for layer in report.layers if layer.target in held))
    for layer in seen.layers:
        if not layer.crosstalk:
            continue
        own, result = layer.crosstalk["sum"], layer.crosstalk["result"]
        total = sum(own[i][i] for i in range(len(own)))
        if total > 0:
            before += 1
            kept += sum(result[i][i] for i in range(len(own))) / total
            leak += sum(v for i, line in enumerate(result) for j, v in enumerate(line) if i != j) / total
    return replace(
        row,
        error=seen.reconstruction_error(),
        held_error=judged.reconstruction_error(held_out=True),
        kept=kept / before if before else math.nan,
        leak=leak / before if before else math.nan,
    )


def _sentence(what: str) -> str:
    return what[:1].upper() + what[1:]
