"""Running the calibration passes and keeping what they found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import CalibrationError, IncompatibleError
from .gram import GramAccumulator, GramStats
from .heldout import HELD_OUT, HeldOut
from .padding import PaddingMode
from .ranks import Ranks
from .records import TaskRecord, records_of
from .sampling import InputSample, SampleOptions
from .stacks import LayerStack, Task
from .taps import Tap
from .targets import Target
from .triangles import packed_size

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
    """

    tasks: tuple[TaskRecord, ...]
    stats: Mapping[Target, GramStats]
    stack_tasks: Mapping[Target, tuple[int, ...]]
    model: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    signatures: Mapping[Target, Tensor] = field(default_factory=dict)

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
        picked = stats.subset([known.index(index) for index in wanted])
        if picked.ranks != stack.basis_ranks:
            raise IncompatibleError(
                f"statistics for ranks {picked.ranks}, LoRAs of ranks {stack.basis_ranks}.",
                layer=str(stack.target),
                remedy="calibrate again.",
            )
        widths = {sample.rows.shape[1] for sample in picked.samples or ()} - {stack.in_features}
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


class Calibrator:
    """Gathers statistics task by task; a pass that fails leaves nothing behind.

    Args:
        stacks: The stacks of one part of the model; those that hooks cannot watch are left out.
        padding: How padded text tokens count.
        sample: Keep some whole inputs of the routed layers too, for `refinement`.
        held_out: One token of so many is held out, to judge by; 0 for none, which takes a third less memory.
    """

    def __init__(
        self,
        stacks: Sequence[LayerStack],
        padding: PaddingMode = "balance",
        sample: SampleOptions | None = None,
        held_out: int = HELD_OUT,
    ) -> None:
        self.stacks = [stack for stack in stacks if stack.tapped]
        self.padding: PaddingMode = padding
        self.sample = sample
        self.held_out = held_out
        self._done: dict[tuple[Target, int], GramAccumulator] = {}
        self._samples: dict[tuple[str, int], InputSample] = {}

    @contextmanager
    def task(self, index: int) -> Iterator[Tap]:
        """A tap for one task's passes; its statistics count only if the block succeeds."""
        tap = Tap(self.stacks, index, self.padding, self.sample, self.held_out)
        yield tap
        for target, accumulator in tap.accumulators():
            accumulator.to_host()
            self._done[(target, index)] = accumulator
        for path, sample in tap.samples():
            self._samples[(path, index)] = sample
        check_ran(tap, index)

    def gather(self, ranks: Ranks) -> None:
        """Take over the samples of all processes."""
        if self.sample is not None:
            routed = [stack for stack in self.stacks if len(stack.blocks) > 1]
            keys = sorted({(stack.target.module_path, task) for stack in routed for task in stack.tasks})
            self._samples = ranks.gathered(self._samples, keys)

    def result(self) -> dict[Target, GramStats]:
        """Statistics of every stack with two or more tasks; a layer that never ran has zero tokens.

        Hands the statistics over: call it once, when all passes are done.
        """
        stats = {}
        for stack in self.stacks:
            if len(stack.blocks) < 2:
                continue
            ranks, path = stack.basis_ranks, stack.target.module_path
            size = sum(ranks)
            kept = [self._samples[(path, task)] for task in stack.tasks if (path, task) in self._samples]
            # popped: two copies of all statistics would be alive otherwise
            found = [self._done.pop((stack.target, task), None) for task in stack.tasks]
            held = None
            if self.held_out:
                grams = [None if one is None else one.held_gram for one in found]
                tokens = [None if one is None else one.held_tokens for one in found]
                held = HeldOut(_stacked(grams, packed_size(size)), _counts(tokens))
            stats[stack.target] = GramStats(
                _stacked([None if one is None else one.gram for one in found], size, size),
                _counts([None if one is None else one.tokens for one in found]),
                torch.tensor([0 if one is None else int(one.nonfinite) for one in found], dtype=torch.int64),
                ranks,
                tuple(kept) if len(kept) == len(stack.tasks) else None,
                held,
            )
        return stats


def check_ran(tap: Tap, index: int) -> None:
    """Refuse passes that reached no layer of their LoRA.

    Raises:
        CalibrationError: Says what may be the reason.
    """
    if tap.paths and not tap.calls:
        raise CalibrationError(
            f"none of the {len(tap.paths)} layers of LoRA number {index + 1} ran in its calibration pass.",
            remedy="use at least one step, a CONDITIONING that is active at the calibration's noise level, and a "
            "MODEL that is not compiled or replaced by another engine.",
        )


def _stacked(grams: Sequence[Tensor | None], *shape: int) -> Tensor:
    """(K, *shape) in the widest of the dtypes; zeros for a task that never ran."""
    wide = any(gram is not None and gram.dtype == torch.float64 for gram in grams)
    dtype = torch.float64 if wide else torch.float32
    return torch.stack([torch.zeros(shape, dtype=dtype) if gram is None else gram.to(dtype) for gram in grams])


def _counts(tokens: Sequence[Tensor | None]) -> Tensor:
    return torch.tensor([0.0 if one is None else float(one) for one in tokens], dtype=torch.float64)


def assemble(
    tasks: Sequence[Task],
    calibrators: Sequence[Calibrator],
    *,
    model: str = "",
    settings: Mapping[str, object] | None = None,
    ranks: Ranks | None = None,
) -> Calibration:
    """The calibration that the calibrators of all parts have gathered, on all processes."""
    ranks = ranks or Ranks()
    for calibrator in calibrators:
        calibrator.gather(ranks)
    stats = {target: one for calibrator in calibrators for target, one in calibrator.result().items()}
    stats = ranks.combined(stats)
    stacks = {stack.target: stack for calibrator in calibrators for stack in calibrator.stacks}
    return Calibration(
        records_of(tasks),
        stats,
        {target: stacks[target].tasks for target in stats},
        model,
        dict(settings or {}),
        {target: stacks[target].signature for target in stats},
    )
