"""A method's answers from the tokens that were not held out: what the others may judge."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .errors import SolveError
from .gram import GramStats
from .methods import MergedFactors, MergeMethod
from .stacks import LayerStack


def judged(
    method: MergeMethod,
    stacks: Sequence[LayerStack],
    stats: Sequence[GramStats | None],
    answers: Sequence[MergedFactors],
    device: torch.device,
) -> list[MergedFactors | None]:
    """Solve once more, each layer from the tokens that were not held out.

    Args:
        method: The method.
        stacks: Its stacks.
        stats: Their statistics.
        answers: Its answers from all tokens; taken over where the method uses none.
        device: Where to compute.

    Returns:
        One answer for each stack; None where nothing was held out, or where the others alone leave no
        solution (few tokens and no ridge): the merge does not depend on this one.
    """
    found: list[MergedFactors | None] = [None] * len(stacks)
    again: list[tuple[int, GramStats]] = []
    for index, one in enumerate(stats):
        fitted = None if one is None or one.held_out() is None else one.fitted()
        if fitted is not None and method.needs_calibration:
            again.append((index, fitted))
        elif fitted is not None:
            found[index] = answers[index]
    try:
        solved: list[MergedFactors | None] = [
            *method.merge([stacks[index] for index, _ in again], [fitted for _, fitted in again], device)
        ]
    except SolveError:
        solved = [_solved_alone(method, stacks[index], fitted, device) for index, fitted in again]
    for (index, _), factors in zip(again, solved, strict=True):
        found[index] = factors
    return found


def _solved_alone(
    method: MergeMethod, stack: LayerStack, fitted: GramStats, device: torch.device
) -> MergedFactors | None:
    try:
        return method.merge([stack], [fitted], device)[0]
    except SolveError:
        return None
