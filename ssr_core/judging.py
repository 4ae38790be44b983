"""A method's answers from the tokens that were not held out: what the others may judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .errors import SolveError
from .gram import GramStats
from .methods import MergedFactors, MergeMethod, RefitMethod, RouterView
from .stacks import LayerStack


@dataclass(frozen=True)
class Trial:
    """What a router of one stack can be judged by.

    Attributes:
        view: The router that was fitted without the held-out tokens, with the Grams of the others.
        held: Statistics of the tokens that were held out.
    """

    view: RouterView
    held: GramStats


@dataclass(frozen=True)
class _Open:
    """A stack that has to be solved again."""

    index: int
    stack: LayerStack
    answer: MergedFactors
    fitted: GramStats
    held: GramStats


def judged(
    method: MergeMethod,
    stacks: Sequence[LayerStack],
    stats: Sequence[GramStats | None],
    answers: Sequence[MergedFactors],
    device: torch.device,
) -> list[Trial | None]:
    """Solve once more, each layer from the tokens that were not held out.

    Args:
        method: The method.
        stacks: Its stacks.
        stats: Their statistics.
        answers: Its answers from all tokens; taken over where the method uses none.
        device: Where to compute.

    Returns:
        One trial for each stack; None where nothing was held out, where the answer is no router, or where
        the others alone leave no solution (few tokens and no ridge): the merge does not depend on this one.
    """
    found: list[Trial | None] = [None] * len(stacks)
    again: list[_Open] = []
    for index, (stack, one, answer) in enumerate(zip(stacks, stats, answers, strict=True)):
        held = None if one is None or answer.view is None else one.held_out()
        fitted = None if one is None or held is None else one.fitted()
        if fitted is not None and held is not None:
            again.append(_Open(index, stack, answer, fitted, held))
    if not method.needs_calibration:
        views: list[RouterView | None] = [_refilled(one) for one in again]
    else:
        try:
            views = _views(method, again, device)
        except SolveError:
            views = [_alone(method, one, device) for one in again]
    for trial, view in zip(again, views, strict=True):
        found[trial.index] = None if view is None else Trial(view, trial.held)
    return found


def _views(method: MergeMethod, again: Sequence[_Open], device: torch.device) -> list[RouterView | None]:
    stacks, stats = [one.stack for one in again], [one.fitted for one in again]
    if isinstance(method, RefitMethod):
        return [*method.refit(stacks, stats, [one.answer for one in again], device)]
    return [factors.view for factors in method.merge(stacks, stats, device)]


def _refilled(one: _Open) -> RouterView | None:
    """The answer itself, of a method that asks no statistics, with the Grams of the tokens that were not held out."""
    view = one.answer.view
    return None if view is None else replace(view, grams=view.express(one.fitted))


def _alone(method: MergeMethod, one: _Open, device: torch.device) -> RouterView | None:
    try:
        return _views(method, [one], device)[0]
    except SolveError:
        return None
