"""OSRM (arXiv:2505.22934): LoRAs that start where the other tasks send nothing.

    down_t = the r right-singular vectors with the smallest singular values of H,
    H = the layer inputs of the OTHER tasks,   up_t = 0

An update that trains from there hardly moves the other tasks' outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .adapters import LoRALayer
from .errors import IncompatibleError
from .input_hooks import InputLayer
from .moments import InputMoments
from .targets import Target


def pooled(moments: Sequence[InputMoments]) -> InputMoments:
    """Moments of several tasks in one, each with the same weight however many tokens it has.

    Raises:
        IncompatibleError: There are none.
    """
    counted = [one.per_token() for one in moments if one.tokens > 0]
    if not counted:
        raise IncompatibleError("no inputs of other tasks were gathered for this layer.")
    return sum(counted[1:], start=counted[0])


def top_directions(moments: InputMoments, energy: float = 1.0) -> Tensor:
    """The fewest eigenvectors of C that hold a share of its trace.

    Args:
        moments: Of the inputs.
        energy: Share of the trace; 1 takes every direction above rounding.

    Returns:
        (d, p) float64 with orthonormal columns, the strongest first.
    """
    values, vectors, _ = moments.spectrum
    if energy >= 1:
        return vectors
    held = values.cumsum(0) / max(moments.trace, 1e-300)
    count = min(len(values), int((held < energy).sum()) + 1)
    return vectors[:, :count]


def analytic_down(others: InputMoments, rank: int, generator: torch.Generator, energy: float = 1.0) -> Tensor:
    """The directions that the others' inputs excite least.

    Where the inputs leave room for `rank` rows outside their `top_directions`, the smallest singular
    values are all alike (rounding, or unknown to the sketch), and any basis of that complement is
    the paper's answer: a random one is taken, which prefers no direction. Else the eigenvectors with
    the smallest eigenvalues are taken. Of a sketch, the rows see at most `others.spectrum.rest`.

    Args:
        others: Second moments C of the other tasks' inputs.
        rank: Rows r.
        generator: Of the random basis; on the CPU.
        energy: Share of the trace that the rows have to avoid; 1 is the paper's.

    Returns:
        (r, d) float64 with orthonormal rows, on the device of the moments.

    Raises:
        IncompatibleError: The layer is narrower than the rank.
    """
    width = others.width
    if rank > width:
        raise IncompatibleError(f"a layer with {width} inputs has no {rank} orthonormal directions.")
    top = top_directions(others, energy)
    if top.shape[1] + rank > width:
        if others.exact:
            total = others.total.to(torch.float64)
            smallest: Tensor = torch.linalg.eigh((total + total.T) / 2)[1][:, :rank]
            return smallest.T.contiguous()
        top = top[:, : width - rank]
    rows = torch.randn(width, rank, generator=generator, dtype=torch.float64).to(top)
    for _ in range(2):  # twice is enough
        rows = torch.linalg.qr(rows - top @ (top.T @ rows))[0]
    return rows.T.contiguous()


@dataclass(frozen=True)
class InitReport:
    """What one layer of an Init file starts with.

    Attributes:
        target: The layer.
        tokens: Samples or tokens of the others that it saw.
        seen: Energy of the others' inputs in down's rows, relative to that in random orthonormal rows
            (rank / d of the trace).
        likely: The same with an estimate of what a sketch does not know; equal to `seen` where the moments
            are exact.
        bound: The same at most.
    """

    target: Target
    tokens: float
    seen: float
    likely: float
    bound: float


@dataclass(frozen=True)
class InitResult:
    """A LoRA to start training from.

    Attributes:
        layers: down analytic, up zero.
        reports: One entry for each of `layers`.
        skipped: Layers without a start of their own, with the reason.
        nonfinite: Tokens left out because they were NaN or infinite, by layer; layers that share inputs
            count once.
    """

    layers: Mapping[Target, LoRALayer]
    reports: tuple[InitReport, ...]
    skipped: Mapping[Target, str]
    nonfinite: Mapping[Target, int] = field(default_factory=dict)


def layer_generator(seed: int, target: Target, salt: str = "") -> torch.Generator:
    """Random numbers of one layer: equal on every machine, different for every layer and salt."""
    digest = hashlib.sha256(f"{seed}|{target.part}|{target}|{salt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


def osrm_init(
    layers: Sequence[InputLayer],
    others: Sequence[Mapping[Target, InputMoments]],
    rank: int,
    *,
    energy: float = 1.0,
    alpha: float = 1.0,
    seed: int = 0,
    salt: str = "",
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> InitResult:
    """Make the start of a LoRA that will merge well with the others.

    Args:
        layers: Layers that get a start.
        others: Moments of each of the other tasks, by module.
        rank: Of the LoRA.
        energy: Share of the others' energy that down avoids; 1 is the paper's.
        alpha: Of every layer.
        seed: Of the random bases.
        salt: Makes LoRAs with the same seed start from different bases.
        dtype: Of the factors.
        device: Where to compute; None is the CPU.
        tick: Called with (layers done, layers in all); may raise to cancel.
    """
    made: dict[Target, LoRALayer] = {}
    reports: list[InitReport] = []
    skipped: dict[Target, str] = {}
    done = 0
    for group, gathered in _by_input(layers, others):
        moments = pooled(gathered).to(device or torch.device("cpu")) if gathered else None
        for layer in group:
            tick(done, len(layers))
            done += 1
            if moments is None:
                lost = any(one[layer.target].nonfinite for one in others if layer.target in one)
                skipped[layer.target] = "all their inputs were NaN or infinite" if lost else "they never ran"
            elif rank > layer.in_features:
                skipped[layer.target] = "they have fewer inputs than the rank"
            else:
                down = analytic_down(moments, rank, layer_generator(seed, layer.target, salt), energy)
                up = torch.zeros(layer.out_features, rank, dtype=dtype)
                made[layer.target] = LoRALayer(down.to("cpu", dtype), up, alpha, layer.kernel)
                reports.append(_init_report(layer.target, down, moments, sum(one.tokens for one in gathered)))
    reports.sort(key=lambda one: one.target)
    return InitResult(made, tuple(reports), skipped, lost_tokens(others))


def lost_tokens(moments: Sequence[Mapping[Target, InputMoments]]) -> dict[Target, int]:
    """Tokens that were not finite, by layer; moments that layers share (q, k, v) are counted once."""
    lost: dict[Target, int] = {}
    for one in moments:
        distinct = {id(found): (target, found.nonfinite) for target, found in one.items() if found.nonfinite}
        for target, count in distinct.values():
            lost[target] = lost.get(target, 0) + count
    return lost


def _by_input(
    layers: Sequence[InputLayer], others: Sequence[Mapping[Target, InputMoments]]
) -> list[tuple[list[InputLayer], list[InputMoments]]]:
    """Layers together with their moments; those that share them are decomposed once."""
    groups: dict[tuple[int, ...], tuple[list[InputLayer], list[InputMoments]]] = {}
    for layer in layers:
        gathered = [one[layer.target] for one in others if layer.target in one and one[layer.target].tokens > 0]
        groups.setdefault(tuple(id(one) for one in gathered), ([], gathered))[0].append(layer)
    return list(groups.values())


def _init_report(target: Target, down: Tensor, moments: InputMoments, tokens: float) -> InitReport:
    chance = moments.trace * down.shape[0] / moments.width
    if chance <= 0:
        return InitReport(target, tokens, 0.0, 0.0, 0.0)
    seen = max(0.0, float(moments.gram_of(down).trace()))
    most = seen + (0.0 if moments.exact else moments.spectrum.rest)
    likely = min(max(seen, float(moments.filled_gram(down).trace())), most)
    return InitReport(target, tokens, seen / chance, likely / chance, most / chance)
