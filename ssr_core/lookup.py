"""The statistics that a merge asks a calibration for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .calibration import Calibration
from .errors import CalibrationError
from .gram import GramStats
from .memory import bytes_to_solve
from .methods import MergeMethod
from .stacks import LayerStack, Task

Unseen = Literal["anchor", "refuse"]


class Statistics:
    """Looks a calibration's statistics up for the stacks of a set of tasks."""

    def __init__(
        self,
        tasks: Sequence[Task],
        method: MergeMethod,
        calibration: Calibration | None,
        unseen: Unseen,
        shared: bool,
    ) -> None:
        if calibration is None and method.needs_calibration and shared:
            raise CalibrationError(
                f"the method {method.name} needs a calibration.", remedy="calibrate, or use the method sum."
            )
        self._calibration, self._unseen, self._needed = calibration, unseen, method.needs_calibration
        self._records = [] if calibration is None else calibration.match_active(tasks)

    def _covers(self, stack: LayerStack) -> bool:
        """Whether every LoRA of the stack was active on this part of the model during calibration."""
        assert self._calibration is not None
        records = [self._calibration.tasks[self._records[task]] for task in stack.tasks]
        return all(record.strength(stack.target.part) != 0 for record in records)

    def bytes_to_solve(self, stack: LayerStack) -> int:
        """What solving a stack takes, with the sampled inputs and scenes of its statistics."""
        stats = None if self._calibration is None else self._calibration.stats.get(stack.origin or stack.target)
        if stats is None:
            return bytes_to_solve(stack)
        scenes = 0 if stats.scenes is None else len(stats.scenes.active)
        return bytes_to_solve(stack, sum(len(sample.rows) for sample in stats.all_samples), scenes)

    def of(self, stack: LayerStack) -> GramStats | None:
        """Statistics of one stack, None without a calibration."""
        if self._calibration is None or (not self._needed and not self._covers(stack)):
            return None
        stats = self._calibration.stats_for(stack, self._records)
        missing = stats is None or not stats.complete
        refused = self._needed and self._unseen == "refuse" and stack.tapped
        if refused and missing and sum(stack.basis_ranks) > 0:
            raise CalibrationError(
                "the layer never ran for one of its LoRAs during calibration.",
                layer=str(stack.target),
                remedy="set unseen_layers to anchor, or calibrate with a prompt and size that reach it.",
            )
        return stats
