"""What a merge did, as values: for each layer, for each file, and in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from .targets import Target

LayerStatus = Literal["routed", "merged", "passed_through", "anchored"]
KeyFate = Literal[
    "routed",
    "merged",
    "passed_through",
    "anchored",
    "converted",
    "summed",
    "strength_0",
    "host_patch",
    "refused",
    "shadowed",
    "unmatched",
]

FATE_WORDS: Mapping[KeyFate, str] = {
    "routed": "routed",
    "merged": "merged without routing",
    "passed_through": "passed through unchanged (no other LoRA has the layer)",
    "anchored": "merged by the anchor (the layer never ran in calibration)",
    "converted": "converted to low rank, then merged like the others",
    "summed": "summed by strength (bias or norm)",
    "strength_0": "absent (strength 0)",
    "host_patch": "applied to the MODEL or CLIP as the host's own patch, not in the saved file",
    "refused": "refused",
    "shadowed": "given twice in the file, the later name counts (as in ComfyUI)",
    "unmatched": "not used",
}


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


@dataclass(frozen=True)
class FileAccount:
    """What became of one LoRA file's keys; the counts add up to `keys`.

    Attributes:
        name: The LoRA.
        keys: Number of keys in the file.
        fates: Number of keys by fate.
        details: `(key, fate, reason)` of every key that is not simply merged.
        conversion_error: Largest relative error of a converted layer; None where nothing was converted.
    """

    name: str
    keys: int
    fates: Mapping[KeyFate, int]
    details: tuple[tuple[str, KeyFate, str], ...] = ()
    conversion_error: float | None = None

    def summary(self) -> str:
        """One line."""
        fates = ", ".join(f"{count} {FATE_WORDS[fate]}" for fate, count in self.fates.items())
        error = self.conversion_error
        return f"{self.keys} keys: {fates}" + (f" (largest relative error {error:.1e})" if error is not None else "")


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
    """

    method: str
    tasks: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    files: tuple[FileAccount, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def reconstruction_error(self, router: str = "result") -> float:
        """Root mean square over layers of the relative error; nan without routed layers."""
        values = [layer.errors[router] ** 2 for layer in self.layers if router in layer.errors]
        return math.sqrt(sum(values) / len(values)) if values else math.nan

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

    def to_json(self) -> dict[str, object]:
        """Plain JSON values (nan becomes null)."""
        return {
            "method": self.method,
            "tasks": list(self.tasks),
            "reconstruction_error_on_calibration": {
                name: _number(self.reconstruction_error(name)) for name in ("result", "sum", "average", "gains")
            },
            "crosstalk": {"sum": self.crosstalk("sum"), "result": self.crosstalk("result")},
            "layers": [
                {
                    **asdict(layer),
                    "target": str(layer.target),
                    "part": layer.target.part,
                    "condition": _number(layer.condition),
                }
                for layer in self.layers
            ],
            "files": [asdict(account) for account in self.files],
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }

    def to_markdown(self) -> str:
        """The report as people read it: summary, files, warnings last."""
        lines = ["# SSR-Merge report", "", f"Method: {self.method}. LoRAs: {', '.join(self.tasks)}.", ""]
        lines += _summary(self)
        lines += ["## Files", ""]
        for account in self.files:
            lines.append(f"- **{account.name}**: {account.summary()}.")
            lines += [f"  - `{key}`: {FATE_WORDS[fate]}; {reason}." for key, fate, reason in account.details[:20]]
            if len(account.details) > 20:
                lines.append(f"  - and {len(account.details) - 20} more (all of them are in the JSON report).")
        if self.notes:
            lines += ["", "## Notes", "", *(f"- {note}" for note in self.notes)]
        lines += ["", "## What to do next", ""]
        lines += [f"- {warning}" for warning in self.warnings] or ["- Nothing: use the merge."]
        return "\n".join(lines) + "\n"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _summary(report: MergeReport) -> list[str]:
    counts = Counter(layer.status for layer in report.layers)
    lines = ["## Layers", ""]
    lines += [f"- {counts[status]} {FATE_WORDS[status]}" for status in counts]
    lines += _measures(report)
    error = report.reconstruction_error()
    if not math.isnan(error):
        lines += [
            "",
            "Reconstruction error on the calibration tokens (0: every LoRA acts on its own prompt as if it were alone; "
            "root mean square over layers):",
            "",
            "| this merge | plain sum | average | best gains |",
            "|---|---|---|---|",
            "| "
            + " | ".join(f"{report.reconstruction_error(name):.3f}" for name in ("result", "sum", "average", "gains"))
            + " |",
        ]
        lines += _crosstalk_table(report)
    short = [layer for layer in report.layers if layer.status == "routed" and sum(layer.tokens) < layer.rank]
    if short:
        lines += [
            "",
            f"{len(short)} routed layers saw fewer tokens than their rank (modulation and embedding layers see one "
            f"a pass); the anchor decides most of them, e.g. {short[0].target}.",
        ]
    return [*lines, ""]


def _measures(report: MergeReport) -> list[str]:
    """What the method itself measured, averaged over the layers that have it."""
    found: dict[str, list[float]] = {}
    for layer in report.layers:
        for name, value in layer.measures.items():
            found.setdefault(name, []).append(value)
    return [
        f"- {name}: {sum(all_) / len(all_):.3g} on average, {max(all_):.3g} at most" for name, all_ in found.items()
    ]


def _crosstalk_table(report: MergeReport) -> list[str]:
    if len(report.tasks) < 2 or not any(len(layer.tasks) == len(report.tasks) for layer in report.layers):
        return []
    lines = [
        "",
        "Crosstalk (energy of each LoRA's branch under each LoRA's prompt; ideal: 1 on the diagonal, 0 off it):",
        "",
    ]
    for name, title in (("sum", "plain sum"), ("result", "this merge")):
        lines += [f"| {title} | " + " | ".join(report.tasks) + " |", "|---" * (len(report.tasks) + 1) + "|"]
        for task, row in zip(report.tasks, report.crosstalk(name), strict=True):
            lines.append(f"| prompt of {task} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
        lines.append("")
    return lines


def count_fates(fates: Sequence[KeyFate]) -> dict[KeyFate, int]:
    """Count fates in the order of `FATE_WORDS`."""
    counter = Counter(fates)
    return {fate: counter[fate] for fate in FATE_WORDS if counter[fate]}
