"""What a router does to each LoRA's signal, from the statistics alone (no forward pass).

With `B` the stacked ups, `M` a router, `E_k` the selector of block k and `W = B^T B`:
    energy of task k          = tr(B E_k S_k E_k B^T)
    error of M on task k      = tr(B (M - E_k) S_k (M - E_k)^T B^T)
    branch j under task i     = tr(W_jj [M S_i M^T]_jj)          (SSR-Merge, Figure 1)

A router that reads E signals more is (R, R + E), its Grams are (K, R + E, R + E), and E_k selects from
all of them. A diagonal one reads the R coordinates of the blocks alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .router import block_slices


@dataclass(frozen=True)
class RoutingError:
    """Squared Frobenius errors of one router on one layer, by task.

    Attributes:
        error: (K,) sum over tokens of the squared distance to the LoRA alone.
        energy: (K,) sum over tokens of the squared output of the LoRA alone.
    """

    error: Tensor
    energy: Tensor


def routed_signals(router: Tensor, grams: Tensor) -> Tensor:
    """M S_k for every task, (K, R, columns of M): the only cubic part of all diagnostics of one router.

    Args:
        router: (R, R + E), or (R,) for a diagonal router, which costs no matrix product.
        grams: (K, R + E, R + E).
    """
    size = router.shape[0]
    return router[None, :, None] * grams[:, :size, :size] if router.ndim == 1 else router @ grams


def routing_error(
    router: Tensor, grams: Tensor, ranks: Sequence[int], up_gram: Tensor, signals: Tensor | None = None
) -> RoutingError:
    """Error of any router M on every task.

    Args:
        router: (R, R + E), or (R,) for a diagonal one.
        grams: (K, R + E, R + E), scaled as the caller wants tasks and tokens weighted.
        ranks: Rows of each block.
        up_gram: (R, R), `B^T B`.
        signals: `routed_signals(router, grams)` if the caller has it.
    """
    signals = routed_signals(router, grams) if signals is None else signals
    weighted = up_gram * router[None, :] if router.ndim == 1 else up_gram @ router
    errors, energies = [], []
    for k, rows in enumerate(block_slices(ranks)):
        energy = (grams[k][rows, rows] * up_gram[rows, rows]).sum()
        # tr(W M S M^T) - 2 tr(W M S E^T) + tr(W E S E^T)
        cross = (signals[k][:, rows] * up_gram[:, rows]).sum()
        errors.append((signals[k] * weighted).sum() - 2 * cross + energy)
        energies.append(energy)
    return RoutingError(torch.stack(errors).clamp_min(0), torch.stack(energies).clamp_min(0))


def crosstalk(
    router: Tensor, grams: Tensor, ranks: Sequence[int], up_gram: Tensor, signals: Tensor | None = None
) -> Tensor:
    """Energy of branch j under task i, (K tasks, K branches); not normalised, so layers add up."""
    signals = routed_signals(router, grams) if signals is None else signals
    columns = []
    for rows in block_slices(ranks):
        own = up_gram[rows, rows]
        if router.ndim == 1:
            weighted = torch.zeros_like(up_gram[rows])
            weighted[:, rows] = own * router[None, rows]
        else:
            weighted = own @ router[rows]
        columns.append((signals[:, rows] * weighted).sum(dim=(1, 2)))
    return torch.stack(columns, dim=1).clamp_min(0)


def separability(grams: Tensor) -> Tensor:
    """How different two tasks' statistics are, (K, K): 0 the same, 1 nothing in common.

    `1 - <S_i, S_j> / (|S_i| |S_j|)` of the per-token means. Near 0 the router cannot tell the two
    apart and falls back to averaging.
    """
    norms = grams.flatten(1).norm(dim=1).clamp_min(1e-300)
    inner = torch.einsum("iab,jab->ij", grams, grams)
    apart: Tensor = 1 - inner / (norms[:, None] * norms[None, :])
    return apart.clamp(0, 1)
