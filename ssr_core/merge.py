"""Tasks and a calibration in, one merged adapter and its report out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from .accounting import account, layer_report
from .adapters import LoRALayer
from .advice import notes_for, warnings_for
from .calibration import Calibration
from .canonical import balance
from .errors import CalibrationError, IncompatibleError, SolveError
from .gram import GramStats
from .methods import MergedFactors, MergeMethod
from .report import LayerReport, MergeReport
from .stacks import Block, LayerStack, Task, build_stacks
from .targets import Target

Unsupported = Literal["refuse", "pass_through"]
Unseen = Literal["anchor", "refuse"]

LAYERS_AT_ONCE = 64
"""Layers solved between two calls of `tick`."""


@dataclass(frozen=True)
class MergeResult:
    """An ordinary LoRA and how it came about.

    Attributes:
        layers: Low-rank changes by target, strengths folded in.
        vectors: Summed changes of biases and norms by (target, parameter).
        report: What was done.
    """

    layers: Mapping[Target, LoRALayer]
    vectors: Mapping[tuple[Target, str], Tensor]
    report: MergeReport = field(repr=False)


def describe(method: MergeMethod) -> str:
    """Name and parameters of a method, as it stands in reports and metadata."""
    # Protocol members are not dataclass fields; every registered method is a dataclass.
    parameters = ", ".join(f"{f.name}={getattr(method, f.name)}" for f in fields(method))  # type: ignore[arg-type]
    return f"{method.name} ({parameters})" if parameters else method.name


def merge(
    tasks: Sequence[Task],
    method: MergeMethod,
    calibration: Calibration | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    unsupported: Unsupported = "refuse",
    unseen: Unseen = "anchor",
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> MergeResult:
    """Merge LoRAs into one.

    Args:
        tasks: The LoRAs; strength 0 on a part means absent there.
        method: How stacks of two or more are merged.
        calibration: Statistics; needed where `method.needs_calibration` and two LoRAs share a layer.
        dtype: Of the result; None takes the narrowest that holds all inputs.
        device: Where to solve; None is the CPU.
        unsupported: What to do about keys that are not low-rank: refuse, or leave them to the caller.
        unseen: What to do about a routed layer that never ran in calibration.
        tick: Called with (layers done, layers in all) as the solve goes on; may raise to cancel.

    Returns:
        The merged adapter and the report.

    Raises:
        IncompatibleError: Unsupported keys under "refuse", or a calibration of other LoRAs.
        CalibrationError: No calibration, or a layer never ran under "refuse".
        SolveError: A layer has no finite answer.
    """
    if not any(task.strength_model or task.strength_clip for task in tasks):
        raise IncompatibleError("no LoRA is enabled.", remedy="enable at least one LoRA with a strength other than 0.")
    _check_unsupported(tasks, unsupported)
    stacks = build_stacks(tasks, like=calibration.stack_tasks if calibration is not None else ())
    shared = [stack for stack in stacks if len(stack.blocks) > 1]
    stats = _stats(shared, tasks, method, calibration, unseen)
    out_dtype = dtype or _input_dtype(tasks)
    layers: dict[Target, LoRALayer] = {}
    reports: list[LayerReport] = []
    order = sorted(range(len(shared)), key=lambda i: shared[i].rank)
    for at in range(0, len(order), LAYERS_AT_ONCE):
        chunk = order[at : at + LAYERS_AT_ONCE]
        tick(at, len(order))
        answers = method.merge([shared[i] for i in chunk], [stats[i] for i in chunk], device or torch.device("cpu"))
        for i, factors in zip(chunk, answers, strict=True):
            layers[shared[i].target] = _finish(shared[i], factors, out_dtype)
            reports.append(layer_report(shared[i], factors, stats[i], method))
    tick(len(order), len(order))
    for stack in stacks:
        if len(stack.blocks) == 1:
            for target, layer in _pass_through(stack, out_dtype):
                layers[target] = layer
            reports.append(LayerReport(stack.target, "passed_through", stack.tasks, stack.rank))
    reports.sort(key=lambda layer: str(layer.target))
    report = MergeReport(
        describe(method),
        tuple(task.name for task in tasks),
        tuple(reports),
        tuple(account(i, task, reports, unsupported == "pass_through") for i, task in enumerate(tasks)),
        tuple(warnings_for(tasks, reports, shared, stats, method.needs_calibration)),
        tuple(notes_for(tasks, calibration)),
    )
    return MergeResult(layers, _sum_vectors(tasks, out_dtype), report)


def _check_unsupported(tasks: Sequence[Task], unsupported: Unsupported) -> None:
    if unsupported != "refuse":
        return
    for task in tasks:
        records = [
            record
            for record in task.adapter.keys_with("unsupported")
            if record.target is not None and task.strength(record.target.part) != 0
        ]
        if records:
            first = records[0]
            raise IncompatibleError(
                f"{len(records)} of its keys cannot be routed; the first is {first.key}: {first.reason}.",
                file=task.name,
                layer=str(first.target),
                remedy="remove this LoRA, or set unsupported to pass_through: the MODEL then gets these keys "
                "as ordinary patches and the saved file lacks them.",
            )


def _stats(
    shared: Sequence[LayerStack],
    tasks: Sequence[Task],
    method: MergeMethod,
    calibration: Calibration | None,
    unseen: Unseen,
) -> list[GramStats | None]:
    if calibration is None:
        if method.needs_calibration and shared:
            raise CalibrationError(
                f"the method {method.name} needs a calibration.", remedy="calibrate, or use the method sum."
            )
        return [None] * len(shared)
    records = calibration.match(tasks)
    stats = [calibration.stats_for(stack, records) for stack in shared]
    for stack, one in zip(shared, stats, strict=True):
        if unseen == "refuse" and (one is None or bool((one.tokens == 0).any())):
            raise CalibrationError(
                "the layer never ran for one of its LoRAs during calibration.",
                layer=str(stack.target),
                remedy="set unseen_layers to anchor, or calibrate with a prompt and size that reach it.",
            )
    return stats


def _input_dtype(tasks: Sequence[Task]) -> torch.dtype:
    dtypes = {layer.down.dtype for task in tasks for layer in task.adapter.layers.values()}
    result = next(iter(dtypes), torch.float32)
    for dtype in dtypes:
        result = torch.promote_types(result, dtype)
    return result


def _finish(stack: LayerStack, factors: MergedFactors, dtype: torch.dtype) -> LoRALayer:
    down, up = balance(factors.down, factors.up)
    down, up = down.to("cpu", dtype), up.to("cpu", dtype)
    if not bool(torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise SolveError(
            f"the merged factors do not fit into {dtype}.",
            layer=str(stack.target),
            remedy="choose bfloat16 or float32 as the dtype.",
        )
    return LoRALayer(down.contiguous(), up.contiguous(), None, stack.kernel)


def _pass_through(stack: LayerStack, dtype: torch.dtype) -> list[tuple[Target, LoRALayer]]:
    """The file's own tensors, untouched; the strength goes into alpha."""
    block = stack.blocks[0]
    source = block.source
    if source is not None:
        alpha = source.scale * block.strength * source.rank
        layer = LoRALayer(source.down.to(dtype), source.up.to(dtype), alpha, source.kernel)
        return [(stack.target, layer)]
    return [(stack.target, _finish(stack, _plain(block), dtype))]


def _plain(block: Block) -> MergedFactors:
    return MergedFactors(block.down, block.up)


def _sum_vectors(tasks: Sequence[Task], dtype: torch.dtype) -> dict[tuple[Target, str], Tensor]:
    total: dict[tuple[Target, str], Tensor] = {}
    for task in tasks:
        for key, value in task.adapter.vectors.items():
            strength = task.strength(key[0].part)
            if strength:
                scaled = value.to(torch.float32) * strength
                total[key] = total[key] + scaled if key in total else scaled
    return {key: value.to(dtype) for key, value in total.items()}
