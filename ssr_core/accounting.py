"""Reports of single layers and accounts of single files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .diagnostics import RoutingError, block_energies, crosstalk, routing_error, scaling_error
from .file_account import FileAccount, KeyFate, count_fates
from .gram import GramStats
from .judging import Trial
from .layer_report import LayerReport, LayerStatus
from .methods import MergedFactors, MergeMethod, RouterView, routes
from .overlap import subspace_overlap
from .router import gains
from .stacks import LayerStack, Task
from .targets import Target


def layer_report(
    stack: LayerStack,
    factors: MergedFactors,
    stats: GramStats | None,
    method: MergeMethod,
    trial: Trial | None = None,
) -> LayerReport:
    """What one stack's answer does, measured on the calibration tokens and on those that were held out.

    Args:
        stack: The stack.
        factors: The method's answer, from all tokens.
        stats: The stack's statistics.
        method: The method.
        trial: Its router from the tokens that were not held out; None where nothing was.
    """
    seen = stats is not None and (stats.complete or not sum(stats.ranks))  # nothing to see where all downs are zero
    status: LayerStatus = "routed" if routes(method) else "merged"
    if method.needs_calibration and not seen:
        status = "anchored"
    overlap = subspace_overlap(stack.basis.to(factors.down.device), stack.basis_ranks)
    report = LayerReport(
        stack.target,
        status,
        stack.tasks,
        stack.rank,
        measures=factors.measures,
        overlap=overlap.shared,
        closest=overlap.closest,
    )
    if stats is None:
        return report
    report = replace(report, tokens=tuple(stats.tokens.tolist()), nonfinite=stats.lost)
    view = factors.view
    if not seen or view is None or view.grams is None or view.ups.shape[1] == 0:
        return report
    grams = view.grams
    energies = block_energies(grams, view.ranks, view.up_gram)
    seen_errors = _errors(view.router, view, grams, energies, gains(grams, view.ranks))
    report = replace(
        report,
        condition=factors.condition,
        errors={name: one.relative() for name, one in seen_errors.items()},
        task_errors={name: one.by_task() for name, one in seen_errors.items()},
        crosstalk={
            "sum": energies.diagonal(dim1=1, dim2=2).clamp_min(0).tolist(),
            "result": crosstalk(view.router, grams, view.ranks, view.up_gram).tolist(),
        },
    )
    if trial is None:
        return report
    known, unknown = trial.view.grams, trial.view.express(trial.held)
    # an answer that sampled inputs correct is only judged by another such
    if known is None or unknown is None or trial.view.router.shape != view.router.shape:
        return report
    energies = block_energies(unknown, view.ranks, view.up_gram)
    unseen = _errors(trial.view.router, view, unknown, energies, gains(known, view.ranks))
    return replace(
        report,
        held_tokens=tuple(trial.held.tokens.tolist()),
        held_errors={name: one.relative() for name, one in unseen.items()},
        held_task_errors={name: one.by_task() for name, one in unseen.items()},
    )


def _errors(router: Tensor, view: RouterView, grams: Tensor, energies: Tensor, best: Tensor) -> dict[str, RoutingError]:
    """Errors of the method's router and of those that every report compares with: sum, average, best gains.

    Args:
        router: The method's router.
        view: Any router of the stack, for its ups.
        grams: What is judged by, per token.
        energies: Their `block_energies`.
        best: (K,), the gains.
    """
    one = torch.ones_like(best)
    scaled = {"sum": one, "average": one / len(one), "gains": best}
    return {
        "result": routing_error(router, grams, view.ranks, view.up_gram),
        **{name: scaling_error(energies, factors) for name, factors in scaled.items()},
    }


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
