"""Subspace Signal Routing from its definition, in dense float64, with nothing taken from the pack.

For one layer, LoRA k adds delta_k = W_k V_k^T (V_k: orthonormal basis of delta_k's row space). With X_k
the layer's inputs while LoRA k alone is active, the router minimises

    sum_k 1/N_k || Rt Z_k - E_k Z_k ||^2 + mu || Rt - a I ||^2,   Z_k = V^T X_k,   V = [V_1 ... V_K]

where E_k keeps the rows of block k, mu = ridge * mean diagonal of sum_k Z_k Z_k^T / N_k, and a is 1 for
the anchor "sum", 1/K for "average", 0 for "zero"; unbalanced, every 1/N_k is 1 / sum_k N_k. The merged
delta is W Rt V^T. Solved as stacked least squares, not through the normal equations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional


def routed(
    inputs: Sequence[Tensor],
    deltas: Sequence[Tensor],
    ridge: float,
    anchor: str = "sum",
    balance: bool = True,
    refine: bool = False,
    scenes: Sequence[tuple[Tensor, Sequence[int]]] = (),
    neutral: float = 0.05,
) -> Tensor:
    """Merged delta of one layer.

    Args:
        inputs: X_k, (N_k, in), float64.
        deltas: delta_k, (rows, in), float64.
        ridge: Relative ridge.
        anchor: "sum", "average" or "zero".
        balance: Tasks count alike, not tokens.
        refine: Add the regression of what is left over on all inputs.
        scenes: Inputs of further passes, (N, in), and the positions of the deltas whose sum is wanted there; each
            counts as so many tasks.
        neutral: Share of all tasks that those without any count together.
    """
    bases = [row_space(delta) for delta in deltas]
    basis = torch.cat(bases, dim=1)
    size = basis.shape[1]
    own = torch.cat([torch.full((b.shape[1],), k) for k, b in enumerate(bases)])
    total = sum(x.shape[0] for x in inputs)
    passes = [(x, [k]) for k, x in enumerate(inputs)] + list(scenes)
    silent = neutral * len(deltas) / max(1, sum(not who for _, who in scenes))
    masses = [len(who) or silent if balance else 1 if who else silent for _, who in passes]
    weights = [mass / (x.shape[0] if balance else total) for mass, (x, _) in zip(masses, passes, strict=True)]
    signals = [x @ basis * weight**0.5 for (x, _), weight in zip(passes, weights, strict=True)]
    acting = [torch.isin(own, torch.tensor(list(who), dtype=own.dtype)) for _, who in passes]
    mu = ridge * sum(float(z.square().sum()) for z in signals) / size
    identity = mu**0.5 * torch.eye(size, dtype=torch.float64)
    seen = torch.cat([*signals, identity])
    pull = {"sum": 1.0, "average": 1 / len(deltas), "zero": 0.0}[anchor]
    wanted = torch.cat([*(z * who for z, who in zip(signals, acting, strict=True)), pull * identity])
    router = torch.linalg.lstsq(seen, wanted, driver="gelsd").solution.T
    weights = torch.cat([delta @ b for delta, b in zip(deltas, bases, strict=True)], dim=1)
    merged = weights @ router @ basis.T
    return merged + _rest(inputs, deltas, merged) if refine else merged


def _rest(inputs: Sequence[Tensor], deltas: Sequence[Tensor], merged: Tensor) -> Tensor:
    """Ridge regression of what the merged delta lacks on each token, by the d x d covariance.

    Of three ridges and none the one whose fit to all other tokens predicts each token best (by the hat matrix).
    """
    x = torch.cat([one / len(one) ** 0.5 for one in inputs])
    lacks = torch.cat([one @ (delta - merged).T / len(one) ** 0.5 for one, delta in zip(inputs, deltas, strict=True)])
    mean = float(x.square().sum()) / len(x)
    found = {float(lacks.square().sum()): torch.zeros_like(merged)}
    for share in (1.0, 0.1):
        inverse = torch.linalg.inv(x.T @ x + share * mean * torch.eye(x.shape[1], dtype=torch.float64))
        fit = lacks.T @ x @ inverse
        leverage = ((x @ inverse) * x).sum(dim=1)
        found[float(((lacks - x @ fit.T) / (1 - leverage)[:, None]).square().sum())] = fit
    return found[min(found)]


def null_projected(
    contents: Sequence[Tensor], style: Tensor, share: float, count: int = 0, inputs: Tensor | None = None
) -> Tensor:
    """NP-LoRA from its definition: style + sum of contents (I - c V V^T), with the d x d projector written out.

    Args:
        contents: Deltas to project, (rows, in), float64.
        style: The protected delta.
        share: c.
        count: Columns of V at most; 0 for all.
        inputs: X, (N, in): V then spans the rows of the best copy of `style` on X of that rank.
    """
    if not bool(style.any()):
        return sum(contents) + style
    v = row_space(style)[:, : count or None]
    if count and inputs is not None:
        left = torch.linalg.svd(style @ inputs.T, full_matrices=False).U[:, :count]
        v = row_space(left @ left.T @ style)[:, :count]
    return style + sum(contents) @ (torch.eye(len(v), dtype=torch.float64) - share * v @ v.T)


def row_space(delta: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Orthonormal basis of a delta's row space, (in, r)."""
    _, values, right = torch.linalg.svd(delta, full_matrices=False)
    return right[values > tolerance * values[0]].T


class Recording:
    """What a RecordInputs node wrote during one sampling run."""

    def __init__(self, base: Path, prefix: str) -> None:
        self._path = base / "output" / "probes" / f"{prefix}.safetensors"
        with safe_open(self._path, "pt") as file:
            self._geometry = json.loads(file.metadata()["geometry"])

    def rows(self, weight: str) -> Tensor:
        """Inputs of a layer as rows that its flattened weight multiplies, float64."""
        with safe_open(self._path, "pt") as file:
            x = file.get_tensor(weight).double()
        if weight not in self._geometry:
            return x
        return patches(x, **self._geometry[weight])


def patches(x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """Receptive fields of a convolution, (positions, in * prod(kernel)); 1 to 3 dimensions."""
    assert all(step == 1 for step in dilation)
    x = functional.pad(x, [side for pad in reversed(padding) for side in (pad, pad)])
    for axis, (size, step) in enumerate(zip(kernel_size, stride, strict=True)):
        x = x.unfold(2 + axis, size, step)
    dims = len(kernel_size)
    order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
    return x.permute(order).reshape(-1, x.shape[1] * torch.Size(kernel_size).numel())
