"""What a router cannot see in the LoRAs' own coordinates, learnt from a few whole inputs of each task.

A token x of task k should leave the router as `T = [0 .. V_k x .. 0]`; it leaves as `M V x`. The rest,
`T - M V x`, is a linear function of x and not of `V x` alone: tasks that look alike to the LoRAs may
differ elsewhere. Kernel ridge regression on the sampled tokens X (N, in) finds it,

    C = E^T (X X^T + mu I)^-1 X = E^T X (X^T X + mu I)^-1,        E (N, R) what the router leaves over,

solved in whichever of tokens and inputs are fewer, and the layer becomes `up (M V + C)`: its rank stays
R. Scenes (`scenes`) take part with the targets of the LoRAs that act in them. The ridge is the one with
the least leave-one-out error, which has a closed form (Allen's PRESS); if none beats `C = 0`, that stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .router import block_slices
from .sampling import InputSample, bounded
from .triangles import symmetric_product

LEAST_RIDGE = 0.1
"""Least mu to choose from, as a fraction of the mean squared norm of the weighted tokens.

A scene that counts less than one LoRA counts as so many tokens fewer: it does not lower the mean.
Tokens of one prompt are alike, so that leaving one of them out flatters small ridges: they come a little nearer
to each LoRA under the very prompt that was calibrated and go far astray under others.
"""


SMALLEST_RIDGE = 1e-6
"""Below this the error of a left-out token is lost in rounding."""


def ridges(least: float) -> tuple[float, ...]:
    """What to choose from, in the same fractions: 1, a tenth of that and so on, and the least."""
    steps = max(0, math.ceil(-math.log10(least) - 1e-9))
    return (*(10.0**-step for step in range(steps)), least)


@dataclass(frozen=True)
class Refinement:
    """A correction of one layer's downs.

    Attributes:
        down: C, (R, in), float64.
        ridge: The one that was chosen, as a fraction; infinite if `C = 0` was best.
        left_out: Relative error on sampled tokens that the correction was not fitted on (leave one out).
        uncorrected: The same without a correction.
        grams: (K, 2 R, 2 R): mean second moments of the signals `V x` and `C x` on each task's sample.
    """

    down: Tensor
    ridge: float
    left_out: float
    uncorrected: float
    grams: Tensor


def refine(
    samples: Sequence[InputSample],
    basis: Tensor,
    ranks: Sequence[int],
    router: Tensor,
    up_gram: Tensor,
    scenes: Sequence[tuple[InputSample, Tensor, float]] = (),
    least: float = LEAST_RIDGE,
) -> Refinement | None:
    """Fit the correction of one layer.

    Args:
        samples: One for each task; every task's weights count 1 in all. What goes beyond
            `SampleOptions().room` is drawn from.
        basis: V (R, in), float64, on the device to compute on.
        ranks: Rows of each task's block.
        router: M (R, R), float64.
        up_gram: (R, R), `B^T B` of the stacked ups: errors are measured in what the layer puts out.
        scenes: Sample of each scene; (R,) 1 in the rows of its LoRAs, 0 elsewhere; and what its weights count in all.
        least: The least ridge to choose from.

    Returns:
        The correction; None if the tokens are all zero or the LoRAs put out nothing.
    """
    samples = bounded([*samples, *(sample for sample, *_ in scenes)])  # those of combined runs add up
    masses = [*(1.0 for _ in ranks), *(weight for *_, weight in scenes)]
    x, sizes = weighted_tokens(samples, basis, masses)
    signals = x @ basis.T
    wanted = torch.zeros_like(signals)
    tokens = block_slices(sizes)
    for places, rows in zip(tokens, block_slices(ranks), strict=False):
        wanted[places, rows] = signals[places, rows]
    for places, (_, selector, _) in zip(tokens[len(ranks) :], scenes, strict=True):
        wanted[places] = signals[places] * selector
    rest = wanted - signals @ router.T
    energy = _energy(wanted, up_gram)
    mean = x.square().sum() / sum(size * min(1.0, mass) for size, mass in zip(sizes, masses, strict=True))
    if not bool((mean > 0) & (energy > 0)):
        return None
    fit = _by_tokens if len(x) <= x.shape[1] else _by_inputs
    chosen, ridge, best = None, float("inf"), _energy(rest, up_gram)
    uncorrected, product = best, symmetric_product(x.T, x.T) if fit is _by_tokens else symmetric_product(x, x)
    for share in ridges(least):
        found = fit(x, product, share * mean, rest)
        if found is None:  # lost in rounding
            continue
        loss = _energy(found.errors, up_gram)
        if bool(loss < best):
            chosen, ridge, best = found.down, share, loss
    down = torch.zeros_like(basis) if chosen is None else chosen()
    grams = _both_grams(x, signals, down, tokens[: len(ranks)])
    return Refinement(down, ridge, _root(best / energy), _root(uncorrected / energy), grams)


def _both_grams(x: Tensor, signals: Tensor, down: Tensor, tasks: Sequence[slice]) -> Tensor:
    """(K, 2 R, 2 R): mean second moments of `V x`, which is known, and `C x` on each task's tokens, which weigh 1."""
    both = torch.cat([signals, x @ down.T], dim=1)
    return torch.stack([both[tokens].T @ both[tokens] for tokens in tasks])


def sampled_grams(samples: Sequence[InputSample], rows: Tensor) -> Tensor:
    """(K, n, n): mean second moments of the signals `rows x` on each task's sample.

    Args:
        samples: One for each task.
        rows: (n, in), on the device to compute on.
    """
    x, sizes = weighted_tokens(samples, rows)
    signals = x @ rows.T
    return torch.stack([signals[tokens].T @ signals[tokens] for tokens in block_slices(sizes)])


def weighted_tokens(
    samples: Sequence[InputSample], basis: Tensor, weights: Sequence[float] | None = None
) -> tuple[Tensor, list[int]]:
    """All tokens (N, in), scaled so that each task's weigh 1 in all; and the number of each task's.

    Args:
        samples: One for each task.
        basis: Whose dtype and device the tokens get.
        weights: What each task's weigh in all, if not 1.
    """
    parts = []
    for sample, weight in zip(samples, weights or [1.0] * len(samples), strict=True):
        scale = (weight * sample.weights / sample.weights.sum()).sqrt().to(basis.device)
        parts.append(sample.rows.to(basis) * scale[:, None])
    return torch.cat(parts), [len(part) for part in parts]


@dataclass(frozen=True)
class _Fit:
    """A correction for one ridge.

    Attributes:
        errors: (N, R): what the fit to all other tokens leaves of each (PRESS).
        down: Computes C, which only the chosen ridge needs.
    """

    errors: Tensor
    down: Callable[[], Tensor]


def _half_inverse(product: Tensor, mu: Tensor) -> Tensor | None:
    """H with `H^T H = (P + mu I)^-1`; None if P is lost in rounding."""
    eye = torch.eye(len(product), dtype=product.dtype, device=product.device)
    factor, info = torch.linalg.cholesky_ex(product + mu * eye)
    return torch.linalg.solve_triangular(factor, eye, upper=False) if int(info) == 0 else None


def _by_tokens(x: Tensor, kernel: Tensor, mu: Tensor, rest: Tensor) -> _Fit | None:
    """The fit from `X X^T` (N, N)."""
    half = _half_inverse(kernel, mu)
    if half is None:
        return None
    weights = half.T @ (half @ rest)
    return _Fit(weights / half.square().sum(dim=0)[:, None], lambda: weights.T @ x)


def _by_inputs(x: Tensor, moment: Tensor, mu: Tensor, rest: Tensor) -> _Fit | None:
    """The same from `X^T X` (in, in): the error of token i is its residual over one minus its leverage."""
    half = _half_inverse(moment, mu)
    if half is None:
        return None
    whitened = x @ half.T
    small = rest.T @ whitened
    kept = 1 - whitened.square().sum(dim=1)
    return _Fit((rest - whitened @ small.T) / kept[:, None], lambda: small @ half)


def _root(share: Tensor) -> float:
    """Relative error of a share of squared errors, which rounding may leave below zero."""
    return float(share.clamp_min(0).sqrt())


def _energy(signals: Tensor, up_gram: Tensor) -> Tensor:
    """Squared norm of what signals (N, R) become behind the ups."""
    return ((signals @ up_gram) * signals).sum()
