"""Passes of LoRAs that are merged, and whether their records fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import IncompatibleError
from ..stacks import LayerStack, Task
from .factor import InputFactor
from .identity import shared_pass
from .record_io import RecordFile


@dataclass(frozen=True)
class Share:
    """One pass of one LoRA, and how much its tokens count.

    Attributes:
        record: The record of that pass.
        weight: 1 as recorded; 0 leaves it out.

    Raises:
        IncompatibleError: A weight below 0, or not finite.
    """

    record: RecordFile
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise IncompatibleError(
                f"{self.weight} is no weight of a prompt.", file=self.record.path.name, remedy="use 0 or more."
            )


def check_shares(tasks: Sequence[Task], shares: Sequence[Sequence[Share]]) -> None:
    """Refuse records that do not belong to their LoRAs, or together.

    Raises:
        IncompatibleError: Says which, and what differs.
    """
    first: Share | None = None
    for task, mine in zip(tasks, shares, strict=True):
        if task.active and not mine:
            raise IncompatibleError("none of its prompts has a record.", file=task.name, remedy="record it.")
        for share in mine:
            recorded = share.record.identity.task
            if recorded.fingerprint != task.adapter.fingerprint:
                raise IncompatibleError(
                    f"the record {share.record.path.name} is of other content (the LoRA {recorded.name}).",
                    file=task.name,
                    remedy="record the LoRA again.",
                )
            if recorded.convert_options != task.adapter.convert_options:
                raise IncompatibleError(
                    f"the record {share.record.path.name} was made with other conversion settings.",
                    file=task.name,
                    remedy="record the LoRA again, or set convert_rank as it was.",
                )
            if first is None or not first.record.identity.text_encoder:  # one without an encoder fits any
                first, known = share, first or share
            else:
                known = first
            off = shared_pass(known.record.identity, share.record.identity)
            if off:
                raise IncompatibleError(
                    f"its record and that of {known.record.identity.task.name} do not belong together: "
                    f"{'; '.join(off)}. A router would learn that difference.",
                    file=task.name,
                    remedy="record both with the same model, seed, steps and size.",
                )
    for task, mine in zip(tasks, shares, strict=True):
        prompts = tuple(prompt for share in mine for prompt in share.record.identity.task.prompts)
        if mine and prompts != task.prompts:
            raise IncompatibleError(
                f"its records are of the prompts {' | '.join(prompts)}.",
                file=task.name,
                remedy="give the LoRA the prompts of its records, in their order.",
            )


def check_width(factor: InputFactor, stack: LayerStack, record: RecordFile) -> None:
    """Refuse a factor of inputs that are not those of a layer.

    Raises:
        IncompatibleError: It has another number of features.
    """
    if factor.width != stack.in_features or factor.own > factor.size:
        raise IncompatibleError(
            f"the record has inputs of {factor.width} features here, the LoRAs read {stack.in_features}.",
            file=record.path.name,
            layer=str(stack.target),
            remedy="delete the record and record the LoRA again.",
        )
