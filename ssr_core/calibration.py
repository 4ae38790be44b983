"""What the calibration passes found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import IncompatibleError
from .gram import GramStats
from .records import TaskRecord
from .scenes import Scene, scenes_of
from .stacks import LayerStack, Task
from .targets import Target

SAME_BASIS = 1e-3
"""Relative difference of signatures up to which two bases count as the same (rounding stays far below)."""


@dataclass(frozen=True)
class Calibration:
    """Statistics of all routed stacks, and what they were made from.

    Attributes:
        tasks: The LoRAs in order.
        stats: Statistics by stack target.
        stack_tasks: Which tasks have a block in each stack, by target.
        model: Identity of the model that was calibrated.
        settings: How: seed, sigmas, size, padding and so on, as plain JSON values.
        signatures: `LayerStack.signature` of each stack: statistics mean nothing in another basis.
        scenes: Prompts of several LoRAs or none, in the order of every stack's `GramStats.scenes`.
    """

    tasks: tuple[TaskRecord, ...]
    stats: Mapping[Target, GramStats]
    stack_tasks: Mapping[Target, tuple[int, ...]]
    model: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    signatures: Mapping[Target, Tensor] = field(default_factory=dict)
    scenes: tuple[Scene, ...] = ()

    def match(self, tasks: Sequence[Task]) -> list[int]:
        """Find each task's record.

        Returns:
            For each task the index of its record.

        Raises:
            IncompatibleError: A task was not calibrated with this content and these prompts.
        """
        free = list(range(len(self.tasks)))
        found = []
        for task in tasks:
            identity = (task.adapter.fingerprint, task.prompts)
            index = next((i for i in free if self.tasks[i].identity == identity), None)
            if index is None:
                raise IncompatibleError(
                    "the calibration does not know this LoRA with these prompts "
                    f"(it holds {', '.join(record.name for record in self.tasks)}).",
                    file=task.name,
                    remedy="calibrate again.",
                )
            free.remove(index)
            found.append(index)
        return found

    def match_active(self, tasks: Sequence[Task]) -> list[int]:
        """As `match`, with -1 for tasks that act on nothing."""
        found = iter(self.match([task for task in tasks if task.active]))
        return [next(found) if task.active else -1 for task in tasks]

    def stats_for(self, stack: LayerStack, records: Sequence[int]) -> GramStats | None:
        """Statistics for the blocks of a stack; None if the layer never ran or was not routed.

        Args:
            stack: A stack of the tasks that are to be merged.
            records: For each task, the index of its record (`match`).
        """
        origin = stack.origin or stack.target
        wanted = [records[task] for task in stack.tasks]
        off = [index for index in wanted if self.tasks[index].strength(stack.target.part) == 0]
        if len(off) == len(wanted):  # the whole part was not calibrated
            return None
        if off:
            raise IncompatibleError(
                f"it was calibrated at strength 0 on the {stack.target.part}, or without one.",
                file=self.tasks[off[0]].name,
                layer=str(stack.target),
                remedy="calibrate again, with strengths other than 0 and the same MODEL and CLIP connected.",
            )
        stats = self.stats.get(origin)
        known = self.stack_tasks.get(origin, ())
        if stats is None or any(index not in known for index in wanted):
            return None
        picked = stats.subset([known.index(index) for index in wanted], scenes_of(self.scenes, records)[0])
        if picked.ranks != stack.basis_ranks:
            raise IncompatibleError(
                f"statistics for ranks {picked.ranks}, LoRAs of ranks {stack.basis_ranks}.",
                layer=str(stack.target),
                remedy="calibrate again.",
            )
        widths = {sample.rows.shape[1] for sample in picked.all_samples} - {stack.in_features}
        if widths:
            raise IncompatibleError(
                f"its sampled inputs are {min(widths)} wide, the LoRAs read {stack.in_features}.",
                layer=str(stack.target),
                remedy="calibrate again.",
            )
        self._check_signature(stack, origin, [known.index(index) for index in wanted], stats.ranks)
        return picked

    def _check_signature(self, stack: LayerStack, origin: Target, blocks: Sequence[int], ranks: Sequence[int]) -> None:
        if origin not in self.signatures:
            return
        parts = self.signatures[origin].split(list(ranks))
        kept = torch.cat([parts[block] for block in blocks])
        if float((kept - stack.signature).norm()) > SAME_BASIS * float(kept.norm()):
            raise IncompatibleError(
                "the LoRAs' coordinates came out differently than when they were calibrated (a converted LoRA's depend "
                "on the MODEL; those of OFT, BOFT and replaced weights on the strength as well).",
                layer=str(stack.target),
                remedy="calibrate again, here and with this MODEL and these strengths.",
            )
