"""The report as people read it."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from .file_account import FATE_WORDS
from .layout import Place
from .modelmap import MapCell, by_kind, model_map
from .words import number_of

if TYPE_CHECKING:
    from .report import MergeReport

_WORST = 5
"""Blocks that the text names; the JSON report has them all."""

_COLUMNS = (("plain sum", "sum"), ("average", "average"), ("best gains", "gains"))
"""Beside `MergeReport.subject`."""


def markdown(report: MergeReport) -> str:
    """Summary, pairs, map, files, what to do next last."""
    lines = ["# SSR-Merge report", "", f"Method: {report.method}. LoRAs: {', '.join(report.tasks)}.", ""]
    for section in (_layers, _errors, _crosstalk, _compatibility, _map, _files):
        found = section(report)
        lines += [*found, ""] if found else []
    if report.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in report.notes), ""]
    lines += ["## What to do next", ""]
    lines += [f"- {sentence}" for sentence in (*report.warnings, *report.advice)] or ["- Nothing: use the merge."]
    return "\n".join(lines) + "\n"


def number(value: float, digits: int = 3) -> str:
    """A number of a table; a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _layers(report: MergeReport) -> list[str]:
    counts = Counter(layer.status for layer in report.layers)
    lines = ["## Layers", "", *(f"- {counts[status]} {FATE_WORDS[status]}" for status in counts), *_measures(report)]
    short = [layer for layer in report.layers if layer.status == "routed" and sum(layer.tokens) < layer.rank]
    if short:
        lines += [
            "",
            f"{number_of(len(short), 'routed layer')} saw fewer tokens than the rank (modulation and embedding layers "
            f"see one a pass); the anchor decides most of them, e.g. {short[0].target}.",
        ]
    return lines


def _measures(report: MergeReport) -> list[str]:
    """What the method itself measured, averaged over the layers that have it."""
    found: dict[str, list[float]] = {}
    for layer in report.layers:
        for name, value in layer.measures.items():
            found.setdefault(name, []).append(value)
    return [
        f"- {name}: {sum(all_) / len(all_):.3g} on average, {max(all_):.3g} at most" for name, all_ in found.items()
    ]


def _errors(report: MergeReport) -> list[str]:
    if math.isnan(report.reconstruction_error()):
        return []
    rows = []
    held = not math.isnan(report.reconstruction_error(held_out=True))
    for name, held_out in (("calibration", False), ("held-out", True)) if held else (("calibration", False),):
        rows.append([f"**all, {name} tokens**", *_row(report, held_out, None)])
        if len(report.tasks) > 1:
            rows += [[f"{task}, {name}", *_row(report, held_out, i)] for i, task in enumerate(report.tasks)]
    judged = (
        "Held-out tokens are one in eight of the same passes, judged by a router that was fitted on the others (the "
        "merge itself uses all tokens); layers of a single token, such as modulation, have none. In layers that read "
        "only text they are words that this router has not met."
        if held
        else "The calibration holds no held-out tokens, so there is no honest figure beside this one."
    )
    return [
        "## Reconstruction error",
        "",
        "0: every LoRA acts on its own prompt as if it were alone, 1: as if it were off; root mean square over layers. "
        "In *all* a layer's LoRAs weigh by their energy, so a quiet one hardly shows there; its own line is relative "
        "to its own energy. " + judged,
        "",
        *table(["tokens", report.subject, *(title for title, _ in _COLUMNS)], rows),
    ]


def _row(report: MergeReport, held_out: bool, task: int | None) -> list[str]:
    names = ("result", *(name for _, name in _COLUMNS))
    return [number(report.reconstruction_error(name, held_out=held_out, task=task)) for name in names]


def _crosstalk(report: MergeReport) -> list[str]:
    shared = [layer for layer in report.layers if len(layer.tasks) == len(report.tasks) and layer.crosstalk]
    if len(report.tasks) < 2 or not shared:
        return []
    ideal = "Energy of each LoRA's branch under each LoRA's prompt; ideal: 1 on the diagonal, 0 off it."
    lines = ["## Crosstalk", "", ideal]
    for name, title in (("sum", "plain sum"), ("result", report.subject)):
        rows = [
            [f"prompt of {task}", *(f"{value:.2f}" for value in row)]
            for task, row in zip(report.tasks, report.crosstalk(name), strict=True)
        ]
        lines += ["", *table([title, *report.tasks], rows)]
    return lines


def _compatibility(report: MergeReport) -> list[str]:
    pairs = report.pairs()
    if not pairs:
        return []
    lines = [
        "## Compatibility",
        "",
        "How two LoRAs do when they are simply added, whatever the method of this merge.",
        "",
    ]
    for pair in sorted(pairs, key=lambda one: -one.error if math.isfinite(one.error) else 0.0):
        names = f"**{report.tasks[pair.first]} and {report.tasks[pair.second]}**"
        text = f"- {names}: {pair.verdict}"
        if math.isfinite(pair.error):
            text += f" (error of their sum {pair.error:.2f}, prompts' signals differ by {number(pair.apart, 2)})"
        text += f". The spaces that they read share {pair.overlap:.0%}, smallest angle {pair.angle:.0f} degrees"
        if pair.worst and pair.error > 0:
            text += "; most in " + ", ".join(f"{place} ({error:.2f})" for place, error in pair.worst)
        lines.append(text + ".")
    loud = report.loudness()
    if sum(math.isfinite(value) for value in loud) > 1:
        named = ", ".join(f"{name} {value:.2g}" for name, value in zip(report.tasks, loud, strict=True))
        lines += ["", f"Energy of each LoRA on its own prompt, relative to the others: {named}."]
    return lines


def _map(report: MergeReport) -> list[str]:
    cells = model_map(report.layers)
    if not any(math.isfinite(cell.interference) for cell in cells):
        return []
    head = ["", "layers", "plain sum", report.subject, "held-out", "overlap", "tokens / rank", "condition"]
    worst = sorted((c for c in cells if math.isfinite(c.error)), key=lambda c: -c.error)[:_WORST]
    return [
        "## Map of the model",
        "",
        "Errors by kind of layer, over all blocks (tokens / rank is that of the least covered layer):",
        "",
        *table(head, [_cell_row(cell) for cell in by_kind(report.layers)]),
        "",
        "Where most error is left:",
        "",
        *table(head, [_cell_row(cell) for cell in worst]),
    ]


def _cell_row(cell: MapCell) -> list[str]:
    condition = f"{cell.condition:.0e}" if math.isfinite(cell.condition) else "-"
    errors = [number(value, 2) for value in (cell.interference, cell.error, cell.held_error, cell.overlap)]
    return [_name(cell.place), str(sum(cell.statuses.values())), *errors, number(cell.coverage, 1), condition]


def _name(place: Place) -> str:
    return f"`{place}`" + (" (text encoder)" if place.part == "clip" else "")


def _files(report: MergeReport) -> list[str]:
    lines = ["## Files", ""]
    for account in report.files:
        lines.append(f"- **{account.name}**: {account.summary()}.")
        lines += [f"  - `{key}`: {FATE_WORDS[fate]}; {reason}." for key, fate, reason in account.details[:20]]
        if len(account.details) > 20:
            lines.append(f"  - and {len(account.details) - 20} more (all of them are in the JSON report).")
    return lines
