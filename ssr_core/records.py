"""What a calibration remembers about the LoRAs it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .adapters import ConvertOptions
from .stacks import Task
from .targets import Part


@dataclass(frozen=True)
class TaskRecord:
    """Which LoRA, at which strength, with which prompts a column of the statistics belongs to.

    Attributes:
        name: Name of the LoRA when it was calibrated.
        fingerprint: sha256 of its content.
        strength_model: Strength on the diffusion model during calibration.
        strength_clip: Strength on the text encoder during calibration.
        prompts: The calibration prompts; for a CONDITIONING input, its content hash.
        convert_options: How its changes that are not low-rank were converted, if they were.
    """

    name: str
    fingerprint: str
    strength_model: float
    strength_clip: float
    prompts: tuple[str, ...]
    convert_options: ConvertOptions | None = None

    def strength(self, part: Part) -> float:
        """Strength on one part of the model during calibration."""
        return self.strength_model if part == "model" else self.strength_clip

    @property
    def identity(self) -> tuple[str, tuple[str, ...]]:
        """What makes two tasks the same: content and prompts."""
        return (self.fingerprint, self.prompts)


def records_of(tasks: Sequence[Task]) -> tuple[TaskRecord, ...]:
    """Records of tasks as they are being calibrated."""
    return tuple(
        TaskRecord(
            t.name, t.adapter.fingerprint, t.strength_model, t.strength_clip, t.prompts, t.adapter.convert_options
        )
        for t in tasks
    )
