"""A merge made smaller: fewer directions in each layer, those that its outputs need least left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from .adapters import LoRALayer
from .allocation import allocate
from .calibration import Calibration
from .compression_report import CompressedLayer, CompressionReport
from .emit import KEY_STYLES, KeyStyle
from .errors import IncompatibleError
from .lookup import Statistics
from .merge import MergeResult, cast
from .methods import SumMerge
from .output_directions import FOREIGN, OutputDirections, Watched, output_directions, saved_error, watched
from .scenes import JOINT_WEIGHT, NEUTRAL_WEIGHT
from .stacks import LayerStack, Task, build_stacks
from .targets import Target

Limit = Literal["rank", "error", "megabytes", "share"]
LIMITS: tuple[Limit, ...] = get_args(Limit)

BytesPerRank = Callable[[Target, LoRALayer], int]


@dataclass(frozen=True)
class CompressOptions:
    """How much smaller.

    Attributes:
        limit: What `value` is: a rank for every layer, a relative error on each layer's calibrated
            outputs, megabytes (10^6 bytes) of all tensors, or a share of the size before.
        value: Its value.
        ridge: Weight of inputs that calibration did not see (`output_directions`); 0 is exact on those
            that it saw.
        key_style: In whose names the file will be written, which matters for its size: diffusers repeats
            the downs of split rows.

    Raises:
        IncompatibleError: A value is out of its range.
    """

    limit: Limit = "rank"
    value: float = 32
    ridge: float = 0.0
    key_style: KeyStyle = "comfy"

    def __post_init__(self) -> None:
        if self.limit not in LIMITS:
            raise _refused(f"the limit is {self.limit!r}.", f"use one of {', '.join(LIMITS)}.")
        if not (math.isfinite(self.value) and self.value > 0):
            raise _refused(f"{self.limit} is {self.value}.", "use a number above 0.")
        if self.key_style not in KEY_STYLES:
            raise _refused(f"the key style is {self.key_style!r}.", f"use one of {', '.join(KEY_STYLES)}.")
        if self.limit == "rank" and self.value != int(self.value):
            raise _refused(f"the rank is {self.value}.", "use a whole number.")
        if self.limit in ("error", "share") and self.value > 1:
            raise _refused(f"{self.limit} is {self.value}.", "use at most 1.")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise _refused(f"the ridge is {self.ridge}.", "use a number from 0 on.")

    def describe(self) -> str:
        """As it stands in reports."""
        unit = {"rank": "rank {:g}", "error": "error {:g}", "megabytes": "{:g} MB", "share": "{:.0%} of the size"}
        named = self.limit in ("megabytes", "share") and self.key_style != "comfy"
        words = [unit[self.limit].format(self.value), *([f"in {self.key_style} names"] if named else [])]
        return ", ".join([*words, *([f"ridge {self.ridge:g}"] if self.ridge else [])])


def _refused(what: str, remedy: str) -> IncompatibleError:
    return IncompatibleError(f"compression: {what}", remedy=remedy)


def plain_bytes(target: Target, layer: LoRALayer) -> int:
    """Bytes of one rank of a layer whose file has a pair of its own for it."""
    return (layer.down.shape[1] + layer.up.shape[0]) * layer.down.element_size()


@dataclass(frozen=True)
class _Candidate:
    """One layer on its way."""

    target: Target
    layer: LoRALayer
    seen: Watched | None
    reason: str
    directions: OutputDirections


def compress(
    result: MergeResult,
    options: CompressOptions,
    tasks: Sequence[Task] = (),
    calibration: Calibration | None = None,
    *,
    balanced: bool = True,
    joint_weight: float = JOINT_WEIGHT,
    neutral_weight: float = NEUTRAL_WEIGHT,
    bytes_per_rank: BytesPerRank = plain_bytes,
    device: torch.device | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[MergeResult, CompressionReport]:
    """Truncate every layer of a merge, by any method.

    Where calibration knows a layer's inputs its rank-p factors minimise the error on them; elsewhere
    (a layer of one LoRA, no calibration) they are the truncated SVD. For a size budget each layer's
    error counts relative to its own outputs, or weights, and bytes go where they remove most of the sum.

    Args:
        result: The merge.
        options: How much smaller.
        tasks: The LoRAs that were merged; without them no statistics are found.
        calibration: Their statistics.
        balanced: Weight tasks equally instead of by their number of tokens.
        joint_weight: How much joint prompts count; that of the merge.
        neutral_weight: How much all neutral prompts count together; that of the merge.
        bytes_per_rank: Size of one rank of a layer as the file will have it.
        device: Where to compute; None is the CPU.
        tick: Called with (layers done, layers in all); may raise to cancel.

    Returns:
        The smaller merge, and what it cost.

    Raises:
        IncompatibleError: The budget is too small, or the calibration is of other LoRAs.
        SolveError: Values do not fit the dtype.
    """
    device = device or torch.device("cpu")
    stacks = _stacks(tasks, calibration)
    lookup = Statistics(tasks, SumMerge(), calibration, "anchor", False)
    found: list[_Candidate] = []
    for done, (target, layer) in enumerate(result.layers.items()):
        tick(done, len(result.layers))
        seen, reason = _seen(target, layer, stacks, lookup, (balanced, joint_weight, neutral_weight), device)
        found.append(_Candidate(target, layer, seen, reason, output_directions(layer, seen, device, options.ridge)))
    tick(len(found), len(found))
    fixed = sum(value.numel() * value.element_size() for value in result.vectors.values())
    costs = [bytes_per_rank(one.target, one.layer) for one in found]
    before = fixed + sum(cost * one.layer.rank for cost, one in zip(costs, found, strict=True))
    ranks = _ranks(options, found, costs, fixed, before)
    layers, reports = {}, []
    for one, rank in zip(found, ranks, strict=True):
        layers[one.target], account = _truncate(one, rank)
        reports.append(account)
    after = fixed + sum(cost * layers[one.target].rank for cost, one in zip(costs, found, strict=True))
    report = CompressionReport(options.describe(), tuple(reports), before, after)
    note = f"Compressed to {options.describe()}: {report.headline()}"
    noted = replace(result.report, notes=(*result.report.notes, note))
    return replace(result, layers=layers, report=noted), report


def _stacks(tasks: Sequence[Task], calibration: Calibration | None) -> Mapping[Target, LayerStack]:
    if not tasks or calibration is None:
        return {}
    return {stack.target: stack for stack in build_stacks(tasks, like=calibration.stack_tasks)}


def _seen(
    target: Target,
    layer: LoRALayer,
    stacks: Mapping[Target, LayerStack],
    lookup: Statistics,
    weighting: tuple[bool, float, float],
    device: torch.device,
) -> tuple[Watched | None, str]:
    """A layer's inputs, or why they are not known."""
    if not stacks:
        return None, "no calibration"
    stack = stacks.get(target)
    if stack is None or len(stack.blocks) < 2:
        return None, "only one LoRA has the layer: calibration does not watch it"
    stats = lookup.of(stack)
    seen = None if stats is None else watched(stack, stats, device, *weighting)
    if seen is None:
        return None, "the layer never ran in calibration for one of its LoRAs"
    outside = seen.coordinates(layer.down.to(seen.rows))[1]
    if outside <= FOREIGN:
        return replace(seen, tokens=None), ""  # exact without them
    if seen.tokens is None:
        return None, f"{outside:.0%} of what the layer reads lies outside the directions that calibration watched"
    return seen, ""


def _ranks(
    options: CompressOptions, found: Sequence[_Candidate], costs: Sequence[int], fixed: int, before: int
) -> list[int]:
    """The rank of every layer; never more than the layer has."""
    if options.limit == "rank":
        wanted = [int(options.value)] * len(found)
    elif options.limit == "error":
        wanted = [one.directions.smallest(options.value) for one in found]
    else:
        budget = int(options.value * 1e6) if options.limit == "megabytes" else int(options.value * before)
        if budget >= before:
            return [one.layer.rank for one in found]
        gains = [_gains(one.directions) for one in found]
        wanted = allocate(gains, costs, budget - fixed)
    return [min(rank, one.layer.rank) for rank, one in zip(wanted, found, strict=True)]


def _gains(directions: OutputDirections) -> list[tuple[float, float]]:
    """What each direction removes of the squared relative errors of outputs and weights."""
    energy, weight = directions.energy, directions.weight
    shares = (part / part.sum().clamp_min(1e-300) for part in (energy, weight))
    return list(zip(*(share.tolist() for share in shares), strict=True))


def _truncate(one: _Candidate, rank: int) -> tuple[LoRALayer, CompressedLayer]:
    """One layer at its rank; left as it is where nothing is cut off."""
    directions, layer = one.directions, one.layer
    rank = min(rank, len(directions.energy))
    small = layer
    if rank < layer.rank:
        small = directions.truncated(layer, rank)
        for factor in (small.down, small.up):
            cast(factor, factor.dtype, str(one.target))
    stored = None if one.seen is None else saved_error(layer, small, one.seen)
    report = CompressedLayer(
        one.target,
        layer.rank,
        small.rank,
        "weights" if one.seen is None else "outputs",
        directions.error(rank),
        directions.weight_error(rank),
        stored,
        one.reason,
    )
    return small, report
