"""What a router does to each LoRA's signal, from the statistics alone (no forward pass).

With `B` the stacked ups, `M` a router, `E_k` the selector of block k and `W = B^T B`:
    energy of task k          = tr(B E_k S_k E_k B^T)
    error of M on task k      = tr(B (M - E_k) S_k (M - E_k)^T B^T)
    branch j under task i     = tr(W_jj [M S_i M^T]_jj)          (SSR-Merge, Figure 1)

A router that reads E signals more is (R, R + E), its Grams are (K, R + E, R + E), and E_k selects from
all of them. One that only scales the LoRAs is its K factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .router import block_slices
from .triangles import symmetric_product


@dataclass(frozen=True)
class RoutingError:
    """Squared Frobenius errors of one router on one layer, by task.

    Attributes:
        error: (K,) squared distance to the LoRA alone, weighted as the Grams are (per token: the mean).
        energy: (K,) squared output of the LoRA alone, likewise.
    """

    error: Tensor
    energy: Tensor

    def relative(self) -> float:
        """Root of the error over the energy, all tasks together; 0 where there is no energy."""
        energy = float(self.energy.sum())
        return math.sqrt(float(self.error.sum()) / energy) if energy > 0 else 0.0

    def by_task(self) -> list[float]:
        """The same for each task."""
        ratios = torch.where(self.energy > 0, self.error / self.energy.clamp_min(1e-300), torch.zeros_like(self.error))
        values: list[float] = ratios.sqrt().tolist()
        return values


def gram_of(ups: Tensor) -> Tensor:
    """W = B^T B, (R, R), of the stacked ups (rows, R), in float64: LoRAs that are nearly the same cancel in it."""
    ups = ups.to(torch.float64)
    return symmetric_product(ups, ups)


def block_energies(grams: Tensor, ranks: Sequence[int], up_gram: Tensor) -> Tensor:
    """What branches a and b put out in common under task i, `<W_ab, [S_i]_ab>`: (K tasks, K, K).

    All that is to be known about routers that only scale the LoRAs; one pass over the Grams.

    Args:
        grams: (K, R + E, R + E), weighted as the caller wants tasks to be.
        ranks: Rows of each block.
        up_gram: (R, R), `B^T B`.
    """
    size = len(up_gram)
    owner = torch.block_diag(*(torch.ones(rank, 1) for rank in ranks)).to(up_gram)
    return torch.stack([owner.T @ ((up_gram * one[:size, :size]) @ owner) for one in grams])


def scaling_error(energies: Tensor, factors: Tensor) -> RoutingError:
    """Error of the router that scales each LoRA, on every task.

    Args:
        energies: (K, K, K), `block_energies`.
        factors: (K,), of the LoRAs.
    """
    own = energies.diagonal(dim1=0, dim2=1)  # (K b, K task): row `task` of each task
    energy = own.diagonal()
    error = torch.einsum("a,iab,b->i", factors, energies, factors) - 2 * factors @ own + energy
    return RoutingError(error.clamp_min(0), energy.clamp_min(0))


def routing_error(router: Tensor, grams: Tensor, ranks: Sequence[int], up_gram: Tensor) -> RoutingError:
    """Error of any router M on every task: one product of R^3 whatever the number of tasks.

    tr(W (M - E) S (M - E)^T) = <M^T W M, S> - 2 <[W M]_k, [S]_k> + <W_kk, S_kk> with block rows k.

    Args:
        router: (R, R + E).
        grams: (K, R + E, R + E), weighted as the caller wants tasks to be.
        ranks: Rows of each block.
        up_gram: (R, R), `B^T B`.
    """
    weighted = up_gram @ router
    form = symmetric_product(router, weighted)
    whole = grams.flatten(1) @ form.flatten()
    errors, energies = [], []
    for k, rows in enumerate(block_slices(ranks)):
        energies.append((grams[k][rows, rows] * up_gram[rows, rows]).sum())
        errors.append(whole[k] - 2 * (weighted[rows] * grams[k][rows]).sum() + energies[k])
    return RoutingError(torch.stack(errors).clamp_min(0), torch.stack(energies).clamp_min(0))


def scene_errors(router: Tensor, grams: Tensor, selectors: Tensor, up_gram: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance of a router M from the plain sum of the LoRAs that act in each scene.

    Args:
        router: (R, R + E).
        grams: (J, R + E, R + E).
        selectors: (J, R), 1 in the rows of the LoRAs that act.
        up_gram: (R, R), `B^T B`.

    Returns:
        (J,) errors; and what they are to be compared with, (J,): the energy of that sum, or for a neutral
        scene, where nobody should act, of the sum of all LoRAs.
    """
    size = len(up_gram)
    wanted = torch.zeros(len(grams), *router.shape).to(router)
    wanted[:, :, :size] = torch.diag_embed(selectors.to(router))
    neutral = selectors.sum(dim=1) == 0
    whole = wanted.clone()
    whole[neutral, :, :size] = torch.eye(size).to(router)

    def energy(change: Tensor) -> Tensor:
        return ((up_gram @ change @ grams) * change).sum(dim=(1, 2)).clamp_min(0)

    return energy(router - wanted), energy(whole)


def crosstalk(router: Tensor, grams: Tensor, ranks: Sequence[int], up_gram: Tensor) -> Tensor:
    """Energy of branch j under task i, (K tasks, K branches); not normalised, so layers add up."""
    columns = []
    for rows in block_slices(ranks):
        form = symmetric_product(router[rows], up_gram[rows, rows] @ router[rows])
        columns.append(grams.flatten(1) @ form.flatten())
    return torch.stack(columns, dim=1).clamp_min(0)


_ENTRIES = 1 << 16
"""Of each Gram, looked at together: the whole of them in float64 would be the largest tensor of a merge."""


def separability(grams: Tensor) -> Tensor:
    """How different two tasks' statistics are, (K, K), float64: 0 the same, 1 nothing in common.

    `1 - <S_i, S_j> / (|S_i| |S_j|)`, whatever the number of tokens. Near 0 the router cannot tell the two
    apart and falls back to averaging.
    """
    inner = torch.zeros(len(grams), len(grams), dtype=torch.float64, device=grams.device)
    for part in grams.flatten(1).split(_ENTRIES, dim=1):
        part = part.to(torch.float64)
        inner += part @ part.T
    norms = inner.diagonal().sqrt()
    apart: Tensor = 1 - inner / (norms[:, None] * norms[None, :]).clamp_min(1e-300)
    return apart.clamp(0, 1)
