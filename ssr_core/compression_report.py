"""What compression left of each layer."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

from .targets import Target
from .words import number_of

_LISTED = 40


@dataclass(frozen=True)
class CompressedLayer:
    """One layer of a compressed merge; errors are relative, against the merge before.

    Attributes:
        target: Module and rows.
        before: Its rank before.
        after: Its rank now.
        measured_on: "outputs" on the calibration's inputs, or "weights" where those are not known.
        error: Of what `measured_on` names, in exact arithmetic.
        weight_error: Of the weights (Frobenius).
        stored_error: Of the outputs with the factors rounded as they are stored; None for weights.
        reason: Why the inputs are not known; empty where they are.
    """

    target: Target
    before: int
    after: int
    measured_on: Literal["outputs", "weights"]
    error: float
    weight_error: float
    stored_error: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class CompressionReport:
    """What compression did.

    Attributes:
        limit: What was asked for.
        layers: All layers of the merge.
        bytes_before: Bytes of all tensors before.
        bytes_after: And now; names and metadata of a file come on top.
    """

    limit: str
    layers: tuple[CompressedLayer, ...]
    bytes_before: int
    bytes_after: int

    def error(self, measured_on: Literal["outputs", "weights"]) -> float:
        """Root mean square over the layers that were measured so; nan if none was."""
        found = [layer.error**2 for layer in self.layers if layer.measured_on == measured_on]
        return math.sqrt(sum(found) / len(found)) if found else math.nan

    def headline(self) -> str:
        """One sentence."""
        parts = [f"{self.bytes_after / 1e6:.2f} of {self.bytes_before / 1e6:.2f} MB"]
        for kind, words in (("outputs", "on calibrated outputs"), ("weights", "of the weights of the other layers")):
            error = self.error("outputs" if kind == "outputs" else "weights")
            if not math.isnan(error):
                parts.append(f"relative error {error:.2g} {words}")
        return ", ".join(parts) + "."

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return {
            "limit": self.limit,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "layers": [{**asdict(one), "target": str(one.target), "part": one.target.part} for one in self.layers],
        }

    def to_markdown(self) -> str:
        """Rank and error by layer, the worst layers first."""
        lines = ["# SSR-Merge compression", "", f"Limit: {self.limit}. {self.headline()}", ""]
        reasons = Counter(one.reason for one in self.layers if one.reason)
        lines += [
            f"- {number_of(count, 'layer is cut by its', 'layers are cut by their')} weights: {reason}."
            for reason, count in reasons.items()
        ]
        lines += [
            "",
            "| layer | rank | error | measured on | as stored | of the weights |",
            "|---|---|---|---|---|---|",
        ]
        for one in sorted(self.layers, key=lambda one: -one.error)[:_LISTED]:
            stored = "" if one.stored_error is None else f"{one.stored_error:.2g}"
            lines.append(
                f"| {one.target} | {one.before} to {one.after} | {one.error:.2g} | {one.measured_on} | {stored} "
                f"| {one.weight_error:.2g} |"
            )
        if len(self.layers) > _LISTED:
            lines += ["", f"And {len(self.layers) - _LISTED} more with smaller errors."]
        return "\n".join(lines) + "\n"
