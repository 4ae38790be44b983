"""What a router does to each LoRA's signal, from the statistics alone (no forward pass).

With `B` the stacked ups, `M` a router, `E_k` the selector of block k and `W = B^T B`:
    energy of task k          = tr(B E_k S_k E_k B^T)
    error of M on task k      = tr(B (M - E_k) S_k (M - E_k)^T B^T)
    branch j under task i     = tr(W_jj [M S_i M^T]_jj)          (SSR-Merge, Figure 1)
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


def routing_error(router: Tensor, grams: Tensor, ranks: Sequence[int], up_gram: Tensor) -> RoutingError:
    """Error of any router M on every task.

    Args:
        router: (R, R).
        grams: (K, R, R), scaled as the caller wants tasks and tokens weighted.
        ranks: Rows of each block.
        up_gram: (R, R), `B^T B`.
    """
    errors, energies = [], []
    for k, rows in enumerate(block_slices(ranks)):
        selector = torch.zeros_like(router)
        selector[rows, rows] = torch.eye(ranks[k], dtype=router.dtype, device=router.device)
        off = router - selector
        errors.append(((off @ grams[k] @ off.T) * up_gram).sum())
        energies.append((grams[k][rows, rows] * up_gram[rows, rows]).sum())
    return RoutingError(torch.stack(errors).clamp_min(0), torch.stack(energies).clamp_min(0))


def crosstalk(router: Tensor, grams: Tensor, ranks: Sequence[int], up_gram: Tensor) -> Tensor:
    """Energy of branch j under task i, (K tasks, K branches); not normalised, so layers add up."""
    slices = block_slices(ranks)
    rows = []
    for k in range(len(ranks)):
        routed = router @ grams[k] @ router.T
        rows.append(torch.stack([(routed[s, s] * up_gram[s, s]).sum() for s in slices]))
    return torch.stack(rows).clamp_min(0)


def separability(grams: Tensor) -> Tensor:
    """How different two tasks' statistics are, (K, K): 0 the same, 1 nothing in common.

    `1 - <S_i, S_j> / (|S_i| |S_j|)` of the per-token means. Near 0 the router cannot tell the two
    apart and falls back to averaging.
    """
    norms = grams.flatten(1).norm(dim=1).clamp_min(1e-300)
    inner = torch.einsum("iab,jab->ij", grams, grams)
    apart: Tensor = 1 - inner / (norms[:, None] * norms[None, :])
    return apart.clamp(0, 1)
