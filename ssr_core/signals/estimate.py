"""Records of single LoRAs -> the calibration of any set of them, without a forward pass.

While LoRA k's pass ran, nothing but LoRA k decided its inputs X_k. So `S_k = D X_k X_k^T D^T` in the
stacked coordinates D of any set of LoRAs, cross terms included, is a function of k's record and D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from ..calibration import Calibration
from ..errors import CalibrationError
from ..gram import GramStats
from ..input_hooks import whole_module
from ..records import records_of
from ..router import block_slices
from ..sampling import InputSample, SampleOptions, joined, thinned
from ..stacks import LayerStack, Task, build_stacks
from ..targets import Target
from .factor import InputFactor
from .record_io import RecordFile
from .shares import Share, check_shares, check_width

SmallRecords = Literal["accept", "refuse"]
SMALL_RECORDS: tuple[SmallRecords, ...] = ("accept", "refuse")

RESOLVED = 1e-5
"""Share of a layer's energy that a record may lack and still count as knowing all of it."""


def from_records(
    tasks: Sequence[Task],
    shares: Sequence[Sequence[Share]],
    *,
    small: SmallRecords = "accept",
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """The calibration of LoRAs that were recorded one by one.

    Args:
        tasks: The LoRAs; their prompts are those of the shares, in order.
        shares: For each LoRA its passes (one record for each prompt).
        small: What to do about records that keep fewer directions of a layer than the LoRAs read there:
            accept them (`settings["records"]` counts the layers), or refuse.
        tick: Called with (layers done, layers in all); may raise to cancel.

    Returns:
        As a calibration run would give it, at the strengths of the records.

    Raises:
        IncompatibleError: A record is of another LoRA, model or noise than the others; says which.
        CalibrationError: A record keeps too little, under "refuse"; says how much is needed.
        FileError: A record is damaged.
    """
    used = [[one for one in mine if one.weight > 0] for mine in shares]
    check_shares(tasks, used)
    stacks = [one for one in build_stacks(tasks) if one.tapped and len(one.blocks) > 1]
    found: dict[Target, list[_Sum]] = {stack.target: [] for stack in stacks}
    total, done, missing = sum(len(mine) for mine in used) * len(stacks), 0, _Missing()
    for index, mine in enumerate(used):
        for share in mine:
            with ExitStack() as context:
                read = context.enter_context(share.record.reading())
                for stack in stacks:
                    tick(done, total)
                    done += 1
                    if index not in stack.tasks:
                        continue
                    factor = read(whole_module(stack.target))
                    if factor is not None:
                        check_width(factor, stack, share.record)
                        missing.add(factor, _lacking(factor, stack, share.record, small))
                        found[stack.target].append(_Sum.of(index, factor, stack, share.weight))
    stats = {stack.target: _stats(stack, found[stack.target]) for stack in stacks}
    first = next((mine[0] for mine in used if mine), None)
    settings: dict[str, object] = {} if first is None else dict(first.record.identity.settings)
    unsampled = sum(one.samples is None and one.complete for one in stats.values())
    settings["records"] = {**missing.settings(), "unsampled": unsampled, "passes": _passes(used)}
    return Calibration(
        records_of(tasks),
        stats,
        {stack.target: stack.tasks for stack in stacks},
        "" if first is None else first.record.identity.model,
        settings,
        {stack.target: stack.signature for stack in stacks},
    )


class _Missing:
    """What the records do not hold."""

    def __init__(self) -> None:
        self._sum, self._count, self._small, self._columns = 0.0, 0, 0, 0

    def add(self, factor: InputFactor, columns: int) -> None:
        """Count one layer of one record; `columns` is what its record should have, or 0."""
        self._sum += factor.unknown
        self._count += 1
        self._small += columns > 0
        self._columns = max(self._columns, columns)

    def settings(self) -> dict[str, object]:
        """The mean unknown share of energy; layers known in too few directions, of how many; columns that would do."""
        mean = self._sum / self._count if self._count else 0.0
        return {"unknown_energy": mean, "layers": self._count, "small": self._small, "columns": self._columns}


@dataclass(frozen=True)
class _Sum:
    """What one pass adds to one stack."""

    task: int
    gram: Tensor
    tokens: float
    nonfinite: int
    sample: tuple[InputSample, float] | None

    @staticmethod
    def of(task: int, factor: InputFactor, stack: LayerStack, weight: float) -> _Sum:
        own = stack.basis[block_slices(stack.basis_ranks)[stack.tasks.index(task)]]
        gram = weight * factor.gram_of(stack.basis, own)
        sample = None
        if factor.sample is not None:  # its weights add up to the tokens only on average
            sample = factor.sample, weight * factor.tokens / float(factor.sample.weights.sum())
        return _Sum(task, gram.to(stack.basis.dtype), weight * factor.tokens, factor.nonfinite, sample)


def _stats(stack: LayerStack, sums: Sequence[_Sum]) -> GramStats:
    size = sum(stack.basis_ranks)
    grams, tokens, bad, samples = [], [], [], []
    for task in stack.tasks:
        mine = [one for one in sums if one.task == task]
        empty = torch.zeros(size, size, dtype=stack.basis.dtype)
        grams.append(sum((one.gram for one in mine), start=empty))
        tokens.append(sum(one.tokens for one in mine))
        bad.append(sum(one.nonfinite for one in mine))
        kept = [one.sample for one in mine if one.sample is not None]
        if kept and len(kept) == len(mine):
            samples.append(_together(kept, len(stack.blocks), stack.in_features))
    return GramStats(
        torch.stack(grams),
        torch.tensor(tokens, dtype=torch.float64),
        torch.tensor(bad, dtype=torch.int64),
        stack.basis_ranks,
        tuple(samples) if len(samples) == len(stack.tasks) else None,
    )


def _together(kept: Sequence[tuple[InputSample, float]], loras: int, width: int) -> InputSample:
    """The sampled inputs of one LoRA's passes, as many as one calibration of so many LoRAs would have kept."""
    parts = []
    for sample, weight in kept:
        allowed = SampleOptions(len(sample.rows)).shared_by(loras, width).tokens
        parts.append((thinned(sample, max(1, allowed // len(kept))), weight))
    return joined(parts)


def _lacking(factor: InputFactor, stack: LayerStack, record: RecordFile, small: SmallRecords) -> int:
    """Columns with which a record should be made again; 0 if it knows enough of this layer."""
    rank = sum(stack.basis_ranks)
    if factor.size >= min(rank, factor.width, factor.tokens) or factor.unknown <= RESOLVED:
        return 0
    needed = record.options.columns + rank - factor.size
    if small == "refuse":
        raise CalibrationError(
            f"the record keeps {factor.size} directions of this layer, the merged LoRAs have rank {rank}.",
            file=record.path.name,
            layer=str(stack.target),
            remedy=f"record the LoRA again with columns {needed} or more"
            + (" and a larger budget_mb (or 0)." if record.options.budget_mb else "."),
        )
    return needed


def _passes(shares: Sequence[Sequence[Share]]) -> list[Mapping[str, object]]:
    """What it takes to find or make the same records again."""
    return [
        {
            "key": share.record.identity.key,
            "weight": share.weight,
            "sha256": share.record.identity.task.fingerprint,
            "prompts": list(share.record.identity.task.prompts),
            "options": asdict(share.record.options),
        }
        for mine in shares
        for share in mine
    ]
