"""Reports of single layers and accounts of single files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from .diagnostics import crosstalk, routed_signals, routing_error
from .gram import GramStats
from .methods import MergedFactors, MergeMethod, routes
from .report import FileAccount, KeyFate, LayerReport, LayerStatus, count_fates
from .router import Anchor, anchor_router, pooled
from .stacks import LayerStack, Task
from .targets import Target

DIAGONAL: tuple[Anchor, ...] = ("sum", "average", "gains")
"""Routers that every report compares with."""


def layer_report(
    stack: LayerStack, factors: MergedFactors, stats: GramStats | None, method: MergeMethod
) -> LayerReport:
    """What one stack's answer does, measured on the calibration tokens."""
    seen = stats is not None and (stats.complete or not sum(stats.ranks))  # nothing to see where all downs are zero
    status: LayerStatus = "routed" if routes(method) else "merged"
    if method.needs_calibration and not seen:
        status = "anchored"
    view, measures = factors.view, factors.measures
    if stats is None:
        return LayerReport(stack.target, status, stack.tasks, stack.rank, measures=measures)
    tokens, nonfinite = tuple(stats.tokens.tolist()), int(stats.nonfinite.sum())
    if not seen or view is None or view.grams is None or view.ups.shape[1] == 0:
        return LayerReport(stack.target, status, stack.tasks, stack.rank, tokens, nonfinite, measures=measures)
    grams = pooled(view.grams, stats.tokens.to(view.grams.device), balanced=True)
    ups = view.ups.to(torch.float64)
    up_gram = ups.T @ ups
    routers = {"result": view.router}
    for anchor in DIAGONAL:
        routers[anchor] = anchor_router(anchor, grams, view.ranks).diagonal()
    errors, matrices = {}, {}
    for name, router in routers.items():
        signals = routed_signals(router, grams)
        one = routing_error(router, grams, view.ranks, up_gram, signals)
        energy = float(one.energy.sum())
        errors[name] = math.sqrt(float(one.error.sum()) / energy) if energy > 0 else 0.0
        if name in ("sum", "result"):
            matrices[name] = crosstalk(router, grams, view.ranks, up_gram, signals).tolist()
    return LayerReport(
        stack.target,
        status,
        stack.tasks,
        stack.rank,
        tokens,
        nonfinite,
        factors.condition,
        errors,
        matrices,
        measures,
    )


def account(index: int, task: Task, reports: Sequence[LayerReport], passed_through: bool) -> FileAccount:
    """Fate of every key of one LoRA file.

    Args:
        index: The task's index.
        task: The task.
        reports: All merged layers.
        passed_through: Whether the caller applies unsupported keys as the host's own patches.
    """
    by_module: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in reports:
        if index in layer.tasks:
            by_module.setdefault((layer.target.part, layer.target.module_path), []).append(layer)
    fates: list[KeyFate] = []
    details: list[tuple[str, KeyFate, str]] = []
    for record in task.adapter.records:
        fate: KeyFate
        if record.status == "unmatched" or record.target is None:
            fate = "unmatched"
        elif record.status == "shadowed":
            fate = "shadowed"
        elif task.strength(record.target.part) == 0:
            fate = "strength_0"
        elif record.status == "unsupported":
            fate = "host_patch" if passed_through else "refused"
        elif record.status == "converted":
            fate = "converted"
        elif record.status == "vector":
            fate = "summed"
        else:
            fate = _owner(record.target, by_module).status
        fates.append(fate)
        if record.reason:
            details.append((record.key, fate, record.reason))
    errors = [one.error for one in task.adapter.conversions]
    return FileAccount(task.name, len(fates), count_fates(fates), tuple(details), max(errors, default=None))


def _owner(target: Target, by_module: Mapping[tuple[str, str], list[LayerReport]]) -> LayerReport:
    """The merged layer whose rows contain the target's."""
    for layer in by_module[(target.part, target.module_path)]:
        rows = layer.target.out_slice
        mine = target.out_slice
        if rows is None or (mine is not None and rows[0] <= mine[0] and mine[0] + mine[1] <= rows[0] + rows[1]):
            return layer
    raise AssertionError(f"no merged layer contains {target}")
