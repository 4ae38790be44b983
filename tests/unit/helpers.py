"""Builders, and the reference mathematics written from the paper's equations.

Nothing in the reference half calls the engine: bases come from an SVD (the engine uses QR), routers
from lstsq or an explicit inverse (the engine uses Cholesky), convolutions from explicit patches.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from ssr_core import Adapter, Calibration, LoRALayer, MomentOptions, Target, Task, build_stacks, calibrate
from ssr_core.moments import MomentsAccumulator, sketch_matrix

F64 = torch.float64
LAYER = Target("layer")


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=F64).to(dtype)


def rel(value: Tensor, expected: Tensor) -> float:
    """Relative distance in the Frobenius norm."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


# ---------------------------------------------------------------- builders


def lora(seed: int, out: int, inp: int, rank: int, *, alpha: float | None = None, dtype=F64, kernel=()) -> LoRALayer:
    down, up = randn(seed, rank, inp) / inp**0.5, randn(seed + 7919, out, rank) / rank**0.5
    return LoRALayer(down.to(dtype), up.to(dtype), alpha, tuple(kernel))


def task(
    name: str,
    layers: LoRALayer | Mapping[Target, LoRALayer],
    *,
    prompts: Sequence[str] | None = None,
    strength: float = 1.0,
    clip: float = 1.0,
    **more,
) -> Task:
    """A task without a file; its fingerprint is its name."""
    layers = {LAYER: layers} if isinstance(layers, LoRALayer) else layers
    return Task(Adapter(name, name, layers, **more), strength, clip, (name,) if prompts is None else tuple(prompts))


def conflicting_tasks(count: int, out: int, inp: int, rank: int, seed: int = 0, **more) -> list[Task]:
    return [task(f"task{k}", lora(100 * seed + k, out, inp, rank, **more)) for k in range(count)]


def task_tokens(seed: int, count: int, inp: int) -> Tensor:
    """(count, in) float64 tokens around a mean and with a covariance of their own."""
    return randn(seed, count, inp) @ randn(seed + 31, inp, inp) / inp**0.5 + 2 * randn(seed + 62, 1, inp)


def calibrated(module: nn.Module, tasks: Sequence[Task], passes: Sequence[Sequence[Tensor]], **more) -> Calibration:
    """Calibrate one module, called "layer", through real hooks; `passes[k]` are task k's inputs."""
    root = nn.ModuleDict({"layer": module})
    stacks = build_stacks(tasks, fuse_slices=more.pop("fuse_slices", False))

    def run_pass(index, tap):
        for x in passes[index]:
            module(x)

    return calibrate(root, tasks, stacks, run_pass, **more)


def linear64(inp: int, out: int) -> nn.Linear:
    return nn.Linear(inp, out).double().requires_grad_(False)


TOKENS = MomentOptions("tokens")
SKETCH = MomentOptions("tokens", exact_limit=0, sketch=12)


def moments_of(x, options=TOKENS, weight=None):
    """Moments of (S, T, d) inputs without any hook."""
    columns = options.columns(x.shape[-1])
    omega = None if columns == x.shape[-1] else sketch_matrix(x.shape[-1], columns).to(x.dtype)
    accumulator = MomentsAccumulator(x.shape[-1], options, omega, x.device, x.dtype)
    accumulator.add([x], weight)
    return accumulator.result()


def decaying(seed, count, width, rate):
    """(1, N, d) inputs whose spectrum falls off by `rate` a direction."""
    basis = torch.linalg.qr(randn(seed, width, width))[0]
    return (randn(seed + 1, count, width) * rate ** torch.arange(width, dtype=F64) @ basis.T)[None]


# ---------------------------------------------------------------- reference mathematics


def factors_of(tasks: Sequence[Task], target: Target = LAYER) -> list[tuple[Tensor, Tensor]]:
    """(down, up) of each task in float64, alpha / rank and strength folded into up."""
    pairs = []
    for one in tasks:
        layer = one.adapter.layers[target]
        scale = 1.0 if layer.alpha is None else layer.alpha / layer.down.shape[0]
        pairs.append((layer.down.double(), layer.up.double() * scale * one.strength(target.part)))
    return pairs


def deltas_of(tasks: Sequence[Task], target: Target = LAYER) -> list[Tensor]:
    return [up @ down for down, up in factors_of(tasks, target)]


def svd_coordinates(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(basis, up in that basis): orthonormal rows that span the row space of up @ down."""
    _, s, vh = torch.linalg.svd(up @ down, full_matrices=False)
    basis = vh[: int((s > 1e-9 * s.max()).sum())] if s.max() > 0 else vh[:0]
    return basis, up @ down @ basis.T


def weighted_grams(z: Sequence[Tensor], balance: bool) -> list[Tensor]:
    total = sum(len(one) for one in z)
    return [one.T @ one / (len(one) if balance else total) for one in z]


def reference_delta(
    factors: Sequence[tuple[Tensor, Tensor]],
    tokens: Sequence[Tensor],
    *,
    ridge: float,
    anchor: str = "sum",
    balance: bool = True,
) -> Tensor:
    """`up Rt down` with Rt = (Q + mu R0)(G + mu I)^-1, all dense and in an SVD basis of its own."""
    bases, ups = zip(*(svd_coordinates(*pair) for pair in factors), strict=True)
    ranks = [len(basis) for basis in bases]
    basis, up = torch.cat(bases), torch.cat(ups, dim=1)
    grams = weighted_grams([x.double() @ basis.T for x in tokens], balance)
    g, q, r0 = torch.zeros_like(grams[0]), torch.zeros_like(grams[0]), torch.zeros_like(grams[0])
    for gram in grams:
        g += gram
    at = 0
    for gram, rank in zip(grams, ranks, strict=True):
        rows = range(at, at + rank)
        for row in rows:
            q[row] = gram[row]
            own, everywhere = sum(float(gram[i, i]) for i in rows), sum(float(g[i, i]) for i in rows)
            r0[row, row] = {"sum": 1.0, "average": 1 / len(ranks), "gains": own / everywhere, "zero": 0.0}[anchor]
        at += rank
    mu = ridge * float(torch.diagonal(g).mean())
    router = (q + mu * r0) @ torch.linalg.inv(g + mu * torch.eye(len(g), dtype=F64))
    return up @ router @ basis


def least_squares_delta(factors: Sequence[tuple[Tensor, Tensor]], tokens: Sequence[Tensor], balance: bool) -> Tensor:
    """Offline Theorem 3.1: lstsq over the concatenated features; every row weighted as its task is."""
    down, up = torch.cat([d for d, _ in factors]), torch.cat([u for _, u in factors], dim=1)
    features, targets, at = [], [], 0
    for (own, _), x in zip(factors, tokens, strict=True):
        z = x.double() @ down.T
        target = torch.zeros_like(z)
        target[:, at : at + len(own)] = x.double() @ own.T
        weight = len(x) ** -0.5 if balance else 1.0
        features.append(z * weight)
        targets.append(target * weight)
        at += len(own)
    solution = torch.linalg.lstsq(torch.cat(features), torch.cat(targets), driver="gelsd").solution
    return up @ solution.T @ down


def protected_directions(delta: Tensor, energy: float = 1.0, count: int = 0, x: Tensor | None = None) -> Tensor:
    """(in, p): NP-LoRA's V for one protected delta; with inputs x (N, in) from what it does to them, all dense."""
    left, sizes, right = torch.linalg.svd(delta if x is None else delta @ x.T, full_matrices=False)
    shares = sizes.square().cumsum(0) / sizes.square().sum()
    p = min(int((shares < energy - 1e-12).sum()) + 1, int((sizes > 1e-7 * sizes[0]).sum()), count or len(sizes))
    if x is None:
        return right[:p].T
    best = left[:, :p] @ left[:, :p].T @ delta
    return torch.linalg.svd(best, full_matrices=False).Vh[:p].T


def np_lora_delta(others: Sequence[Tensor], protected: Sequence[Tensor], share: float, v: Tensor) -> Tensor:
    """sum of the protected + sum of the others (I - c V V^T), with the d x d projector written out."""
    projector = torch.eye(len(v), dtype=F64) - share * v @ v.T
    return sum(protected) + sum(others) @ projector


def output_error(delta: Tensor, deltas: Sequence[Tensor], tokens: Sequence[Tensor]) -> float:
    """sum_k mean over tokens |delta x - delta_k x|^2 / the same of delta_k x, as a root."""
    error = sum(float(((x @ (delta - own).T) ** 2).sum()) / len(x) for own, x in zip(deltas, tokens, strict=True))
    energy = sum(float(((x @ own.T) ** 2).sum()) / len(x) for own, x in zip(deltas, tokens, strict=True))
    return (error / energy) ** 0.5


def patches(x: Tensor, conv: nn.Module) -> Tensor:
    """(N, in * prod(kernel)): what each output position of a convolution reads, by explicit slicing."""
    pads = [p for size in reversed(conv.padding) for p in (size, size)]
    x = nn.functional.pad(x, pads, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    spans = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    counts = [(n - span) // s + 1 for n, span, s in zip(x.shape[2:], spans, conv.stride, strict=True)]
    columns = []
    for offset in product(*(range(k) for k in conv.kernel_size)):
        index = [
            slice(o * d, o * d + s * (n - 1) + 1, s)
            for o, d, s, n in zip(offset, conv.dilation, conv.stride, counts, strict=True)
        ]
        columns.append(x[(slice(None), slice(None), *index)])
    stacked = torch.stack(columns, dim=2)  # (B, in, prod(kernel), *positions)
    return stacked.flatten(1, 2).flatten(2).transpose(1, 2).reshape(-1, stacked.shape[1] * stacked.shape[2])


def dense_by_module(layers: Mapping[Target, LoRALayer], rows: Mapping[str, int]) -> dict[str, Tensor]:
    """Dense float64 change of each whole module; slices put at their rows, overlaps added."""
    dense: dict[str, Tensor] = {}
    for target, layer in layers.items():
        scale = 1.0 if layer.alpha is None else layer.alpha / layer.down.shape[0]
        part = scale * (layer.up.double() @ layer.down.double())
        whole = dense.setdefault(target.module_path, torch.zeros(rows[target.module_path], part.shape[1], dtype=F64))
        start = 0 if target.out_slice is None else target.out_slice[0]
        whole[start : start + len(part)] += part
    return dense


def patched_copy(make: Callable[[], nn.Module], state: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> nn.Module:
    """A second model whose weights have the deltas added."""
    model = make()
    model.load_state_dict(state)
    with torch.no_grad():
        for path, delta in deltas.items():
            weight = model.get_parameter(path + ".weight")
            weight += delta.reshape(weight.shape).to(weight)
    return model
