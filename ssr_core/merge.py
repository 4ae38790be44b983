"""Tasks and a calibration in, one merged adapter and its report out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from .accounting import account, layer_report
from .adapters import LoRALayer
from .advice import Separabilities, note_separability, notes_for, warnings_for
from .calibration import Calibration
from .canonical import balance
from .errors import IncompatibleError, SolveError
from .finite import all_finite
from .joint_advice import together
from .judging import judged
from .lookup import Statistics, Unseen
from .memory import layers_at_once
from .methods import MergedFactors, MergeMethod, RoleMethod, routes
from .report import LayerReport, MergeReport
from .stacks import LayerStack, Task, build_stacks
from .suggestions import suggestions
from .targets import Target
from .words import number_of

Unsupported = Literal["refuse", "pass_through"]


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
    judge: bool = True,
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
        judge: Solve each layer once more from the tokens that were not held out, so that the report can say
            how the method does on those that were. The merge itself uses all tokens either way.
        tick: Called with (layers done, layers in all) as the solve goes on; may raise to cancel.

    Returns:
        The merged adapter and the report.

    Raises:
        IncompatibleError: Unsupported keys under "refuse", a calibration of other LoRAs, or a part that
            the method gives to a LoRA is not taken.
        CalibrationError: No calibration, or a layer never ran under "refuse".
        SolveError: A layer has no finite answer.
    """
    if not any(task.strength_model or task.strength_clip for task in tasks):
        raise IncompatibleError("no LoRA is enabled.", remedy="enable at least one LoRA with a strength other than 0.")
    roles: list[str] = []
    if isinstance(method, RoleMethod):
        method.check_roles([task.active for task in tasks])
        roles.append(method.describe_roles([task.name for task in tasks]))
    check_unsupported(tasks, unsupported)
    stacks = build_stacks(tasks, like=calibration.stack_tasks if calibration is not None else ())
    shared = [stack for stack in stacks if len(stack.blocks) > 1]
    lookup = Statistics(tasks, method, calibration, unseen, bool(shared))
    out_dtype = dtype or _input_dtype(tasks)
    layers: dict[Target, LoRALayer] = {}
    reports: list[LayerReport] = []
    apart: Separabilities = {}
    order = sorted(shared, key=lookup.bytes_to_solve, reverse=True)  # equal ranks together; the largest sizes a chunk
    where = device or torch.device("cpu")
    at = 0
    while at < len(order):
        chunk = order[at : at + layers_at_once(lookup.bytes_to_solve(order[at]), where)]
        tick(at, len(order))
        at += len(chunk)
        stats = [lookup.of(stack) for stack in chunk]
        answers = method.merge(chunk, stats, where)
        trials = judged(method, chunk, stats, answers, where) if judge else [None] * len(chunk)
        for stack, one, factors, trial in zip(chunk, stats, answers, trials, strict=True):
            layers[stack.target] = _finish(stack, factors, out_dtype)
            reports.append(layer_report(stack, factors, one, method, trial))
            if not isinstance(method, RoleMethod):
                note_separability(apart, stack, one)
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
        tuple(warnings_for(tasks, reports, apart, routes(method))),
        (*roles, *notes_for(tasks, calibration)),
        strengths=tuple(task.strength_model or task.strength_clip for task in tasks),
        apart={pair: median(values) for pair, values in apart.items()},
    )
    settings = {} if calibration is None else calibration.settings
    more = together(report, tasks, calibration, method)
    report = replace(report, advice=(*suggestions(report, settings, method), *more))
    return MergeResult(*_one_change_each(layers, _sum_vectors(tasks, out_dtype)), report)


def _one_change_each(
    layers: dict[Target, LoRALayer], vectors: dict[tuple[Target, str], Tensor]
) -> tuple[dict[Target, LoRALayer], dict[tuple[Target, str], Tensor]]:
    """Factors and a difference of the same weight become one difference: files and patches name a weight once."""
    for (target, parameter), value in list(vectors.items()):
        shared = [one for one in layers if (one.part, one.module_path) == (target.part, target.module_path)]
        for one in shared if parameter == "weight" else []:
            rows = one.out_slice or (0, layers[one].up.shape[0])
            if target.out_slice not in (None, one.out_slice):
                said = "one LoRA changes rows of a weight that another changes whole."
                raise IncompatibleError(said, layer=str(one), remedy="merge without one of the two.")
            total = vectors[(target, parameter)].to(torch.float32).clone()
            part = total if target.out_slice is not None else total.narrow(0, *rows)
            part += layers.pop(one).delta(torch.float32).reshape(part.shape)
            vectors[(target, parameter)] = total.to(value.dtype)
    return layers, vectors


def check_unsupported(tasks: Sequence[Task], unsupported: Unsupported) -> None:
    """Refuse keys that cannot be routed, if so wanted; callers do it before the slow part.

    Raises:
        IncompatibleError: Names the first such key and its reason.
    """
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
                f"{number_of(len(records), 'key')} cannot be routed; the first is {first.key}: {first.reason}.",
                file=task.name,
                layer=str(first.target),
                remedy="remove this LoRA, set convert_rank of its SSR LoRA above 0 where it is 0, or set unsupported "
                "to pass_through: the MODEL then gets these keys as ordinary patches and the saved file lacks them.",
            )


def _input_dtype(tasks: Sequence[Task]) -> torch.dtype:
    """The narrowest that holds all factors of the files; converted layers follow if there are others."""
    given: set[torch.dtype] = set()
    made: set[torch.dtype] = set()
    for task in tasks:
        converted = {one.group.target for one in task.adapter.conversions}
        for target, layer in task.adapter.layers.items():
            (made if target in converted else given).update((layer.down.dtype, layer.up.dtype))
    dtypes = given or made
    result = next(iter(dtypes), torch.float32)
    for dtype in dtypes:
        result = torch.promote_types(result, dtype)
    return result


def _finish(stack: LayerStack, factors: MergedFactors, dtype: torch.dtype) -> LoRALayer:
    down, up = balance(factors.down, factors.up)
    if down.shape[0] == 0:  # nothing but zeros; no loader takes a LoRA of rank 0
        down, up = down.new_zeros(1, down.shape[1]), up.new_zeros(up.shape[0], 1)
    name = str(stack.target)
    return LoRALayer(cast(down, dtype, name), cast(up, dtype, name), None, stack.kernel)


def cast(tensor: Tensor, dtype: torch.dtype, layer: str) -> Tensor:
    """A factor as it is stored: in main memory, in its dtype.

    Raises:
        SolveError: The dtype cannot hold it.
    """
    tensor = tensor.to("cpu", dtype).contiguous()
    if not all_finite(tensor):
        raise SolveError(
            f"the merged values do not fit into {dtype}.",
            layer=layer,
            remedy="choose bfloat16 or float32 as the dtype.",
        )
    return tensor


def _pass_through(stack: LayerStack, dtype: torch.dtype) -> list[tuple[Target, LoRALayer]]:
    """The file's own tensors on its own rows, untouched; the strength goes into alpha."""
    block, whole = stack.blocks[0], stack.target
    base = 0 if whole.out_slice is None else whole.out_slice[0]
    layers = []
    for start, source in block.parts:
        rows = source.up.shape[0]
        target = whole if rows == block.rows else Target(whole.module_path, (base + start, rows), whole.part)
        down, up = cast(source.down, dtype, str(target)), cast(source.up, dtype, str(target))
        layers.append((target, LoRALayer(down, up, source.scale * block.strength * source.rank, source.kernel)))
    return layers


def _sum_vectors(tasks: Sequence[Task], dtype: torch.dtype) -> dict[tuple[Target, str], Tensor]:
    total: dict[tuple[Target, str], Tensor] = {}
    for task in tasks:
        for key, value in task.adapter.vectors.items():
            strength = task.strength(key[0].part)
            if strength:
                scaled = value.to(torch.promote_types(value.dtype, torch.float32)) * strength
                total[key] = total[key] + scaled if key in total else scaled
    return {key: cast(value, dtype, f"{key[0]}.{key[1]}") for key, value in total.items()}
