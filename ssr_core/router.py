"""The router: least squares in the R-dimensional space of the stacked coordinates.

`Rt = (Q + mu R0) (G + mu I)^-1` with `G = sum_k S_k` and block row k of `Q` = block row k of `S_k`
(SSR-Merge, Theorem 3.1; the anchor `R0` and the relative ridge `mu` are ours). Free functions on
float64 tensors; nothing here knows about layers, files or devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Anchor = Literal["sum", "average", "gains", "zero"]
ANCHORS: tuple[Anchor, ...] = ("sum", "average", "gains", "zero")


def block_slices(ranks: Sequence[int]) -> list[slice]:
    """Rows of each block in the stacked coordinates."""
    slices, at = [], 0
    for rank in ranks:
        slices.append(slice(at, at + rank))
        at += rank
    return slices


def pooled(grams: Tensor, tokens: Tensor, balanced: bool) -> Tensor:
    """Weigh the tasks' mean second moments (K, R, R) for pooling.

    Balanced: as they are, so that a long prompt weighs no more than a short one. Otherwise all tokens
    weigh the same.

    Args:
        grams: Means over each task's tokens (`GramStats.per_token`).
        tokens: (K,) their numbers.
        balanced: Which of the two.
    """
    return grams if balanced else grams * (tokens / tokens.sum().clamp_min(1e-300))[:, None, None]


def pooled_scenes(scenes: Tensor, counts: Tensor, weights: Tensor, tokens: Tensor, balanced: bool) -> Tensor:
    """Weigh the scenes' Grams (J, R, R) as `pooled` weighs the tasks'.

    Args:
        scenes: Mean second moments of scenes.
        counts: (J,) number of their tokens.
        weights: (J,) how many tasks each weighs as much as, where tasks are balanced.
        tokens: (K,) number of the tasks' tokens.
        balanced: Scenes have these weights; else all tokens weigh the same.
    """
    return scenes * (weights if balanced else counts / tokens.sum().clamp_min(1e-300))[:, None, None]


def correlation(grams: Tensor) -> Tensor:
    """G = sum_k S_k, (R, R)."""
    return grams.sum(dim=0)


def guide(grams: Tensor, ranks: Sequence[int]) -> Tensor:
    """Q: block row k is block row k of S_k, (R, R) of grams (K, R, R)."""
    q = torch.zeros_like(grams[0])
    for k, rows in enumerate(block_slices(ranks)):
        q[rows] = grams[k, rows]
    return q


def with_scenes(q: Tensor, g: Tensor, scenes: Tensor, selectors: Tensor) -> tuple[Tensor, Tensor]:
    """Q and G with what scenes (`scenes.Scene`) add to them.

    Args:
        q: (R, R).
        g: (R, R).
        scenes: (J, R, R), weighted as the tasks' Grams are.
        selectors: (J, R), 1 in the rows of the LoRAs that act in the scene.
    """
    return q + (selectors[:, :, None] * scenes).sum(dim=0), g + scenes.sum(dim=0)


def gains(grams: Tensor, ranks: Sequence[int]) -> Tensor:
    """Best diagonal router: energy of block k on its own task / its energy on all tasks, (K,)."""
    total = correlation(grams).diagonal()
    values = []
    for k, rows in enumerate(block_slices(ranks)):
        everywhere = total[rows].sum()
        own = grams[k].diagonal()[rows].sum()
        values.append(torch.where(everywhere > 0, own / everywhere.clamp_min(1e-300), torch.ones_like(own)))
    return torch.stack(values)


def anchor_router(anchor: Anchor, grams: Tensor, ranks: Sequence[int]) -> Tensor:
    """R0, the router that directions without data keep, (R, R)."""
    k, r = len(ranks), sum(ranks)
    if anchor == "zero":
        return grams.new_zeros(r, r)
    if anchor == "gains":
        per_row = torch.repeat_interleave(gains(grams, ranks), torch.tensor(list(ranks), device=grams.device))
        return torch.diag(per_row)
    return torch.eye(r, dtype=grams.dtype, device=grams.device) / (k if anchor == "average" else 1)


def solve(q: Tensor, g: Tensor, anchor: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solve a batch of layers of equal rank.

    Args:
        q: (L, R, R) guides.
        g: (L, R, R) correlation matrices, symmetric.
        anchor: (L, R, R) anchor routers.
        mu: (L,) absolute ridges.

    Returns:
        Routers (L, R, R); a lower bound of each condition number (L,), from the diagonal of the
        Cholesky factor, which costs nothing; and (L,) bool, True where the factorisation succeeded
        and all is finite. A failed layer's router is not to be used.
    """
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    factor, info = torch.linalg.cholesky_ex(g + mu[:, None, None] * eye)
    right = (q + mu[:, None, None] * anchor).transpose(1, 2)
    router = torch.cholesky_solve(right, factor).transpose(1, 2)
    ok = (info == 0) & torch.isfinite(router).all(dim=(1, 2))
    diagonal = factor.diagonal(dim1=1, dim2=2)
    return router, (diagonal.amax(dim=1) / diagonal.amin(dim=1)).square(), ok
