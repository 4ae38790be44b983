"""Truncation of a merged layer by what it does to real inputs.

Of all factors U V of rank p, those with the smallest `||(up down - U V) X||_F` are `P P^T up down`,
where P holds the first p left-singular vectors of `up down X` (Eckart and Young; the projection needs no
inverse, so X may be of any rank). With `up = Q T` and `(down x)(down x)^T` summed to `W W^T` they are
`Q` times those of `T W`: nothing larger than R x R is factorised, and the inputs X are never seen, only
their Gram in the coordinates that calibration kept.

What a refined down reads beside those coordinates (`refinement`) is estimated: its regression on them
over the sampled tokens goes with the exact Gram, and what the regression leaves over with the sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import LoRALayer
from .canonical import balance
from .gram import GramStats
from .refinement import weighted_tokens
from .router import correlation, pooled, pooled_scenes
from .scenes import JOINT_WEIGHT, NEUTRAL_WEIGHT
from .stacks import LayerStack

FOREIGN = 0.02
"""Share of a merged down outside the rows that calibration watched, above which its statistics do not speak of it."""

REGRESSION_RIDGE = 1e-6
"""Of the regression on sampled tokens, as a fraction of the mean energy of a coordinate."""

_NOISE = 4.0
"""Eigenvalues of a Gram below this many roundings of its largest one are noise."""


@dataclass(frozen=True)
class Watched:
    """Inputs of a layer as calibration saw them.

    Attributes:
        rows: (n, in): the stack's coordinates, float64.
        root: (n, m), float64: `root @ root.T` is the Gram of `rows @ x`, summed over tasks.
        level: Mean energy of one coordinate.
        tokens: (N, in), sampled inputs, weighted as in `root`; None where none are needed.
    """

    rows: Tensor
    root: Tensor
    level: float
    tokens: Tensor | None = None

    def outputs(self, down: Tensor) -> Tensor:
        """(r, m'): a square root of the second moments of `down @ x`, its columns the same for every down."""
        inside, _ = self.coordinates(down)
        if self.tokens is None:
            found: Tensor = inside @ self.root
            return found
        signals = self.rows @ self.tokens.T
        rest = (down - inside @ self.rows) @ self.tokens.T
        kernel = signals @ signals.T
        kernel.diagonal().add_(REGRESSION_RIDGE * kernel.diagonal().mean())
        slope = torch.linalg.solve(kernel, signals @ rest.T).T
        return torch.cat([(inside + slope) @ self.root, rest - slope @ signals], dim=1)

    def coordinates(self, down: Tensor) -> tuple[Tensor, float]:
        """`down = c @ rows`, by least squares.

        Returns:
            c (r, n), and the share of `down` that the rows do not span.
        """
        kernel = self.rows @ self.rows.T
        values, vectors = torch.linalg.eigh(kernel)
        keep = values > 64 * torch.finfo(torch.float32).eps * values[-1]
        inverse = (vectors[:, keep] / values[keep]) @ vectors[:, keep].T
        found: Tensor = down @ self.rows.T @ inverse
        rest = float((down - found @ self.rows).norm() / down.norm().clamp_min(1e-300))
        return found, rest


def watched(
    stack: LayerStack,
    stats: GramStats,
    device: torch.device,
    balanced: bool = True,
    joint_weight: float = JOINT_WEIGHT,
    neutral_weight: float = NEUTRAL_WEIGHT,
) -> Watched | None:
    """What calibration knows about a stack's inputs; None where it saw nothing.

    Args:
        stack: The stack.
        stats: Its statistics.
        device: Where to compute.
        balanced: Weight tasks equally instead of by their number of tokens.
        joint_weight: How much joint prompts count, as in `SSRMerge`.
        neutral_weight: How much all neutral prompts count together, likewise.
    """
    if not stats.complete or stats.gram.shape[1] == 0:
        return None
    rows = stack.basis.to(device, torch.float64)
    gram = correlation(pooled(stats.per_token(device), stats.tokens.to(device), balanced))
    seen = stats.scenes
    emphasis = stats.tokens[:0] if seen is None else seen.emphasis(joint_weight, neutral_weight)
    if seen is not None:
        scenes = seen.per_token(device)
        more = pooled_scenes(scenes, seen.tokens.to(gram), seen.weights.to(gram), stats.tokens.to(gram), balanced)
        gram = gram + correlation(more * emphasis.to(gram)[:, None, None])
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    keep = values > _NOISE * torch.finfo(stats.gram.dtype).eps * values[-1]
    if not bool(values[-1] > 0) or not bool(torch.isfinite(values).all()):
        return None
    root = vectors[:, keep] * values[keep].sqrt()
    tokens = None
    if stats.samples is not None and (seen is None or seen.samples is not None):
        tokens = weighted_tokens(stats.all_samples, rows, _weights(stats, balanced, emphasis))[0]
    return Watched(rows, root, float(gram.diagonal().mean()), tokens)


def _weights(stats: GramStats, balanced: bool, emphasis: Tensor) -> list[float]:
    """What the samples of tasks and scenes weigh: as their Grams do in `pooled` and `pooled_scenes`."""
    seen = stats.scenes
    if balanced:
        return [*(1.0 for _ in stats.ranks), *([] if seen is None else (seen.weights * emphasis).tolist())]
    counts = stats.tokens if seen is None else torch.cat([stats.tokens, seen.tokens * emphasis])
    shares: list[float] = (counts / stats.tokens.sum()).tolist()
    return shares


@dataclass(frozen=True)
class OutputDirections:
    """A layer's outputs, the most important directions first.

    Attributes:
        columns: (rows, q), orthonormal, float64.
        reads: (q, r): `columns @ reads @ down` is the layer's whole change.
        energy: (q,): energy of the calibrated outputs along each direction, falling; zeros behind it for
            directions that calibration never saw. Of weights where nothing is known about the inputs.
        weight: (q,): squared Frobenius norm of the change along each direction.
    """

    columns: Tensor
    reads: Tensor
    energy: Tensor
    weight: Tensor

    def error(self, rank: int) -> float:
        """Relative error on the calibrated outputs that this many directions leave."""
        return _left(self.energy, rank)

    def weight_error(self, rank: int) -> float:
        """Relative error of the weights (Frobenius) that this many directions leave."""
        return _left(self.weight, rank)

    def smallest(self, error: float) -> int:
        """The smallest rank, at least 1, that keeps the relative error on calibrated outputs within a bound."""
        tail = self.energy.flip(0).cumsum(0).flip(0)
        enough = (tail <= error**2 * float(self.energy.sum())).nonzero()
        return max(1, int(enough[0]) if len(enough) else len(self.energy))

    def truncated(self, layer: LoRALayer, rank: int) -> LoRALayer:
        """The best change of this rank, with balanced factors in the layer's dtype."""
        down = self.reads[:rank] @ layer.down.to(self.reads)
        down, up = balance(down, self.columns[:, :rank])
        dtype = layer.down.dtype
        return LoRALayer(down.to("cpu", dtype).contiguous(), up.to("cpu", dtype).contiguous(), None, layer.kernel)


def _left(energy: Tensor, rank: int) -> float:
    total = float(energy.sum())
    return (float(energy[rank:].sum()) / total) ** 0.5 if total > 0 else 0.0


def output_directions(layer: LoRALayer, seen: Watched | None, device: torch.device, ridge: float) -> OutputDirections:
    """Order a merged layer's output directions.

    Where calibration leaves outputs unseen, directions that only they use come last, by their weight:
    of all changes that are equal on the calibrated inputs the one nearest to the whole change is kept.

    Args:
        layer: Merged factors.
        seen: Its inputs; None orders by the weights alone (a plain SVD through QR of both factors).
        device: Where to compute.
        ridge: Inputs that calibration did not see, as a fraction of the mean energy of those that it saw:
            `G + ridge * mean * I`. 0 minimises the error on calibrated outputs exactly.
    """
    down, up = layer.down.to(device, torch.float64), layer.up.to(device, torch.float64) * layer.scale
    q, t = torch.linalg.qr(up)
    plain = t @ torch.linalg.qr(down.T).R.T
    if seen is None:
        metric = plain
    else:
        metric = t @ seen.outputs(down)
        if ridge > 0:
            metric = torch.cat([metric, (ridge * seen.level) ** 0.5 * plain], dim=1)
    left, sizes, _ = torch.linalg.svd(metric, full_matrices=False)
    kept = sizes > 1e-12 * sizes[:1]
    left, sizes = left[:, kept], sizes[kept]
    rest = plain
    for _ in range(2):  # twice is enough
        rest = rest - left @ (left.T @ rest)
    more, more_sizes, _ = torch.linalg.svd(rest, full_matrices=False)
    fresh = more_sizes > 1e-9 * plain.norm()
    left = torch.cat([left, more[:, fresh]], dim=1)
    energy = torch.cat([sizes.square(), sizes.new_zeros(int(fresh.sum()))])
    if left.shape[1] == 0:  # a change of zeros
        left, energy = torch.eye(t.shape[0], 1).to(t), torch.zeros(1).to(t)
    return OutputDirections(q @ left, left.T @ t, energy, (left.T @ plain).square().sum(dim=1))


def saved_error(layer: LoRALayer, small: LoRALayer, seen: Watched) -> float:
    """Relative error on calibrated outputs of factors as they are stored, their rounding included.

    What rounding adds outside the rows that calibration watched is in it only where tokens were sampled.
    """
    down, up = layer.down.to(seen.rows), layer.up.to(seen.rows) * layer.scale
    new_down, new_up = small.down.to(seen.rows), small.up.to(seen.rows) * small.scale
    whole, other = seen.outputs(down), seen.outputs(new_down)
    left = torch.cat([up, -new_up], dim=1)
    right = torch.cat([whole, other])
    energy = float((whole * (up.T @ up @ whole)).sum())
    error = float((right * (left.T @ left @ right)).sum())
    return (max(0.0, error) / energy) ** 0.5 if energy > 0 else 0.0
