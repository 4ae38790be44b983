"""What each kind of adapter adds to a weight, in float64, from the definitions of peft and LyCORIS.

Nothing is asked of ComfyUI. Where its 0.33 departs from the papers, the convention is its own and is said
here: a LoRA file means what the host makes of it. Weights are (out, in, *kernel), all results in their shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT32_EPS = torch.finfo(torch.float32).eps


def low_rank(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).reshape(shape)


def tucker(mid: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """LoCon with a core: mid (r, r, *kernel), up (out, r), down (r, in)."""
    return torch.einsum("ab...,oa,bi->oi...", mid, up.flatten(1), down.flatten(1))


def lycoris_tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """LyCORIS' other order of the same thing: core (r, r, *kernel), a (r, out), b (r, in)."""
    return torch.einsum("pq...,po,qi->oi...", core, a, b)


def kronecker(small: Tensor, large: Tensor, shape: tuple[int, ...]) -> Tensor:
    """LoKr: small (a, m) times large (b, n, *kernel), (a b, m n, *kernel)."""
    return torch.einsum("am,bn...->abmn...", small, large).reshape(shape)


def glora(weight: Tensor, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    """W A + B with A = a1 a2 over the input channels and B = b1 b2."""
    return torch.einsum("oi...,ij->oj...", weight, a1 @ a2) + low_rank(b1, b2, tuple(weight.shape))


def cayley(blocks: Tensor, constraint: float) -> Tensor:
    """Rotations (I + Q)(I - Q)^-1 of Q = B - B^T; Q of all blocks together is cut to the norm `constraint`."""
    q = blocks - blocks.transpose(-1, -2)
    norm = float(q.norm()) + 1e-8
    if 0 < constraint < norm:
        q = q * (constraint / norm)
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    return (identity + q) @ torch.linalg.inv(identity - q)


def oft(weight: Tensor, blocks: Tensor, constraint: float) -> Tensor:
    """Every block of rows turned by the transpose of its rotation, minus the weight."""
    rotations = cayley(blocks, constraint)
    rows = weight.reshape(blocks.shape[0], blocks.shape[1], -1)
    return (rotations.transpose(1, 2) @ rows - rows).reshape(weight.shape)


def boft(weight: Tensor, blocks: Tensor, constraint: float, rescale: Tensor | None) -> Tensor:
    """A butterfly of rotations: stage i pairs rows that are 2^i half-blocks apart; minus the weight.

    Args:
        weight: (out, in, *kernel).
        blocks: (stages, out / b, b, b).
        constraint: Largest norm of the generator of all stages together; 0 for none.
        rescale: Factor of each row, or None.
    """
    rotations = cayley(blocks, constraint)
    stages, _, size, _ = blocks.shape
    rows = weight.reshape(weight.shape[0], -1)
    turned = rows
    for stage in range(stages):
        order = butterfly(weight.shape[0], 2**stage * size // 2)
        gathered = turned[order].reshape(-1, size, rows.shape[1])
        turned = torch.empty_like(rows)
        turned[order] = (rotations[stage] @ gathered).reshape(rows.shape)
    if rescale is not None:
        turned = turned * rescale.reshape(-1, 1)
    return (turned - rows).reshape(weight.shape)


def butterfly(rows: int, stride: int) -> Tensor:
    """Order in which each row stands beside the one `stride` below it, in groups of 2 * stride."""
    group = torch.arange(0, rows, 2 * stride).reshape(-1, 1, 1)
    within = torch.arange(stride).reshape(1, -1, 1)
    return (group + within + torch.tensor([0, stride]).reshape(1, 1, -1)).flatten()


def dora(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """Magnitude times direction, minus the weight.

    A magnitude for each row divides by the norms of the rows of the original weight, one for each input
    channel by the norms of the changed one; so ComfyUI.
    """
    changed = weight + delta
    if magnitude.shape[0] == weight.shape[0]:
        norms = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        norms = changed.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    return changed * (magnitude / (norms + FLOAT32_EPS)) - weight
