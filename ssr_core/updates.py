"""Calibrations changed without running them again: a LoRA leaves, a LoRA joins.

One that leaves takes its rows and columns with it. One that joins needs nothing of the others but how
their inputs look to its rows, and that their records say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .calibration import SAME_BASIS, Calibration
from .errors import IncompatibleError
from .files import json_text
from .gram import GramStats
from .records import TaskRecord
from .rounds import settings_without
from .scenes import scenes_of
from .targets import Target


def keep(calibration: Calibration, tasks: Sequence[int]) -> Calibration:
    """Some of the LoRAs only, in any order, as if the others had never been there; their joint prompts go too.

    Where there were several rounds, the merges of the later ones had all LoRAs: `settings` then say which are gone.

    Raises:
        IncompatibleError: None is left, one twice, or one that is not there.
    """
    if not tasks or len(set(tasks)) != len(tasks) or any(not 0 <= i < len(calibration.tasks) for i in tasks):
        raise IncompatibleError(
            f"LoRAs {[index + 1 for index in tasks]} of {len(calibration.tasks)} cannot be kept.",
            remedy="keep at least one, each once.",
        )
    kept, scenes = scenes_of(calibration.scenes, tasks)
    gone = [record.name for index, record in enumerate(calibration.tasks) if index not in tasks]
    stats: dict[Target, GramStats] = {}
    members: dict[Target, tuple[int, ...]] = {}
    signatures: dict[Target, Tensor] = {}
    for target, one in calibration.stats.items():
        known = calibration.stack_tasks[target]
        left = [index for index in tasks if index in known]
        if len(left) < 2:
            continue
        blocks = [known.index(index) for index in left]
        stats[target] = one.subset(blocks, kept)
        members[target] = tuple(tasks.index(index) for index in left)
        if target in calibration.signatures:
            pieces = calibration.signatures[target].split(list(one.ranks))
            signatures[target] = torch.cat([pieces[block] for block in blocks])
    return replace(
        calibration,
        tasks=tuple(calibration.tasks[index] for index in tasks),
        stats=stats,
        stack_tasks=members,
        signatures=signatures,
        scenes=scenes,
        settings=settings_without(calibration.settings, gone),
    )


def without(calibration: Calibration, tasks: Sequence[int]) -> Calibration:
    """All LoRAs but some."""
    return keep(calibration, [index for index in range(len(calibration.tasks)) if index not in tasks])


def extend(exact: Calibration, estimate: Calibration) -> Calibration:
    """Put what a calibration knows exactly into an estimate from records that has more LoRAs.

    With Z_o what LoRA k's tokens look like to the old LoRAs' rows and Z_n to the new ones',
    regression Z_n ~ A Z_o as the estimate S' knows it, A = S'_no S'_oo^+, gives

        S_no = A S_oo,      S_nn = A S_oo A^T + (S'_nn - A S'_oo A^T),

    which is exact in the old rows and positive semidefinite whatever S_oo is. S' is scaled to the tokens of S
    first: what its tokens leave over has to weigh as much as theirs. Joint and neutral prompts do not stay:
    nobody knows what the new LoRAs read there.

    Args:
        exact: Statistics of some of the LoRAs.
        estimate: Of those and others, all from records (`from_records`).

    Raises:
        IncompatibleError: The two are of different models or noise, or a LoRA of `exact` is missing.
    """
    _check_settings(exact, estimate)
    places = _places(exact.tasks, estimate.tasks)
    known = {places[index]: index for index in range(len(exact.tasks))}
    stats = dict(estimate.stats)
    for target, guess in estimate.stats.items():
        truth = exact.stats.get(target)
        old = [places[index] for index in exact.stack_tasks.get(target, ())]
        members = estimate.stack_tasks[target]
        if truth is None or any(task not in members for task in old):
            continue
        blocks = [members.index(task) for task in old]
        _check_basis(exact, estimate, target, blocks, truth.ranks)
        gram, tokens, bad = guess.gram.double().clone(), guess.tokens.clone(), guess.nonfinite.clone()
        rows = _rows(guess.ranks, blocks)
        for block, task in zip(blocks, old, strict=True):
            mine = exact.stack_tasks[target].index(known[task])
            share = _share(truth.tokens[mine], guess.tokens[block])  # what the records do not know weighs as much
            gram[block] = _completed(share * gram[block], truth.gram[mine].double(), rows)
            tokens[block], bad[block] = truth.tokens[mine], truth.nonfinite[mine]
        samples = None if guess.samples is None else list(guess.samples)
        if samples is not None and truth.samples is not None:
            for block, task in zip(blocks, old, strict=True):
                samples[block] = truth.samples[exact.stack_tasks[target].index(known[task])]
        stats[target] = replace(
            guess,
            gram=gram.to(guess.gram.dtype),
            tokens=tokens,
            nonfinite=bad,
            samples=None if samples is None else tuple(samples),
        )
    return replace(estimate, stats=stats)


def _share(truth: Tensor, guess: Tensor) -> float:
    """How often the estimate's tokens are counted in the truth; 1 where one of the two saw none."""
    return float(truth / guess) if bool((truth > 0) & (guess > 0)) else 1.0


def _completed(guess: Tensor, truth: Tensor, rows: Tensor) -> Tensor:
    """One task's Gram (R, R): the truth in some rows, the regression on them elsewhere."""
    new = torch.ones(len(guess), dtype=torch.bool)
    new[rows] = False
    fresh = new.nonzero().flatten()
    old_part, cross = guess[rows][:, rows], guess[fresh][:, rows]
    weights = cross @ torch.linalg.pinv(old_part, hermitian=True, rtol=1e-7)
    result = guess.clone()
    result[rows[:, None], rows] = truth
    result[fresh[:, None], rows] = weights @ truth
    result[rows[:, None], fresh] = (weights @ truth).T
    change = weights @ (truth - old_part) @ weights.T
    result[fresh[:, None], fresh] = guess[fresh][:, fresh] + change
    return (result + result.T) / 2


def _rows(ranks: Sequence[int], blocks: Sequence[int]) -> Tensor:
    starts = [sum(ranks[:block]) for block in range(len(ranks))]
    return torch.cat([torch.arange(starts[block], starts[block] + ranks[block]) for block in blocks])


def _places(old: Sequence[TaskRecord], new: Sequence[TaskRecord]) -> list[int]:
    """Where each LoRA of a calibration stands in a larger one."""
    identities = [(one.identity, one.strength_model, one.strength_clip) for one in new]
    found = []
    for record in old:
        identity = (record.identity, record.strength_model, record.strength_clip)
        if identity not in identities:
            raise IncompatibleError(
                "the records have no such LoRA with these prompts and strengths.",
                file=record.name,
                remedy="record it as it was calibrated.",
            )
        found.append(identities.index(identity))
    return found


def _check_settings(exact: Calibration, estimate: Calibration) -> None:
    off = ["model"] if exact.model != estimate.model else []
    off += [
        f"{name} {json_text(estimate.settings[name])} instead of {json_text(exact.settings[name])}"
        for name in ("seed", "sigmas", "latent", "custom latent", "padding")
        if name in exact.settings and name in estimate.settings and exact.settings[name] != estimate.settings[name]
    ]
    if off:
        raise IncompatibleError(
            f"the calibration and the records differ in: {'; '.join(off)}.",
            remedy="record the LoRAs with the settings of the calibration.",
        )


def _check_basis(
    exact: Calibration, estimate: Calibration, target: Target, blocks: Sequence[int], ranks: Sequence[int]
) -> None:
    mine, theirs = exact.signatures.get(target), estimate.signatures.get(target)
    if mine is None or theirs is None:
        return
    pieces = theirs.split(list(estimate.stats[target].ranks))
    kept = torch.cat([pieces[block] for block in blocks])
    if kept.shape != mine.shape or float((kept - mine).norm()) > SAME_BASIS * float(mine.norm()):
        raise IncompatibleError(
            f"its LoRAs have other coordinates than when they were calibrated (ranks {tuple(ranks)}).",
            layer=str(target),
            remedy="calibrate again.",
        )
