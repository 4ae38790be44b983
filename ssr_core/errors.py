"""Errors that reach the user. Each says what is wrong, where, and what to do next."""

from __future__ import annotations


class SSRMergeError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: One sentence that says what is wrong.
        file: Name of the LoRA, calibration or output file, if one is to blame.
        layer: Module path of the layer, if one is to blame.
        remedy: What the user can do about it.
    """

    def __init__(
        self, what: str, *, file: str | None = None, layer: str | None = None, remedy: str | None = None
    ) -> None:
        self.what, self.file, self.layer, self.remedy = what, file, layer, remedy
        parts = [f"SSR-Merge: {what}"]
        if file is not None:
            parts.append(f"File: {file}.")
        if layer is not None:
            parts.append(f"Layer: {layer}.")
        if remedy is not None:
            parts.append(f"What to do: {remedy}")
        super().__init__(" ".join(parts))


class FileError(SSRMergeError):
    """A file cannot be read, trusted or written."""


class IncompatibleError(SSRMergeError):
    """A LoRA does not fit the model, or a calibration does not fit the LoRAs."""


class CalibrationError(SSRMergeError):
    """A calibration pass failed or saw nothing."""


class ClipMissingError(CalibrationError):
    """Prompts have no text encoder; what names one depends on who asks."""


class SolveError(SSRMergeError):
    """A layer's least-squares problem has no finite solution."""


class MemoryBudgetError(SSRMergeError):
    """The statistics would not fit into the memory that the caller allows."""
