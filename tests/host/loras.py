"""Random LoRA files and the dense float64 deltas that they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .dialects import DIALECTS, TEXT_DIALECTS, Dialect, Entry, Shape, all_names

Span = tuple[int, int]

RANKS = (4, 2, 6)
ALPHAS = (4.0, 1.0, 16.0)


@dataclass
class WeightDelta:
    """What one file adds to one weight at strength 1.

    Attributes:
        delta: float64, in the weight's shape.
        spans: (start, rows) of each entry; one that covers the whole weight appears as such.
    """

    delta: Tensor
    spans: list[Span] = field(default_factory=list)


@dataclass(frozen=True)
class LoraFile:
    """A file in the loras folder and its meaning by the host's weight name."""

    name: str
    path: Path
    tensors: Mapping[str, Tensor]
    truth: Mapping[str, WeightDelta]


def weight_shapes(checkpoint: Path) -> dict[str, Shape]:
    """Module path -> shape of every matrix or kernel in a file; names without ".weight"."""
    with safe_open(checkpoint, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) >= 2
    }


@dataclass(frozen=True)
class Part:
    """The layers of one network that a file adapts.

    Attributes:
        modules: `weight_shapes` of the network.
        dialect: How the file spells them.
        weight_prefix: Turns a module path into the host's weight name.
    """

    modules: Mapping[str, Shape]
    dialect: Dialect
    weight_prefix: str = "diffusion_model."


def write_lora(
    path: Path,
    parts: Sequence[Part],
    *,
    seed: int,
    include: Callable[[str], bool] = lambda module: True,
    dtype: torch.dtype = torch.float32,
) -> LoraFile:
    """Write one file; ranks and alphas vary from layer to layer.

    Args:
        path: Where to; the file name is the LoRA's name.
        parts: Networks and spellings.
        seed: Of the random numbers.
        include: Which modules the LoRA has.
        dtype: Of the stored matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    truth: dict[str, WeightDelta] = {}
    for part in parts:
        for number, entry in enumerate(part.dialect.naming(part.modules)):
            if not include(entry.module):
                continue
            shape = part.modules[entry.module]
            rank, alpha = RANKS[(number + seed) % 3], ALPHAS[number % 3] if part.dialect.alpha else None
            up, down = (factor.to(dtype) for factor in factors((entry.rows, *shape[1:]), rank, generator))
            name = part.dialect.key(entry)
            tensors[name + part.dialect.up], tensors[name + part.dialect.down] = up, down
            if alpha is not None:
                tensors[name + ".alpha"] = torch.tensor(alpha)
            weight = f"{part.weight_prefix}{entry.module}.weight"
            _add(truth.setdefault(weight, _empty(shape)), entry, up, down, alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return LoraFile(path.name, path, tensors, truth)


def model_shapes(base: Path, family: str) -> dict[str, Shape]:
    """Layers of a tiny checkpoint."""
    return weight_shapes(base / "models" / "diffusion_models" / f"tiny_{family}.safetensors")


def family_lora(
    base: Path,
    family: str,
    dialect: str,
    seed: int,
    *,
    name: str | None = None,
    text_encoder: Mapping[str, Shape] | None = None,
    **options,
) -> LoraFile:
    """A LoRA for one of the tiny checkpoints, in the base directory's loras folder."""
    parts = [Part(model_shapes(base, family), DIALECTS[family][dialect])]
    if text_encoder is not None:
        parts.append(Part(text_encoder, TEXT_DIALECTS[family], weight_prefix=""))
    path = base / "models" / "loras" / f"{name or f'{family}_{dialect}_{seed}'}.safetensors"
    return write_lora(path, parts, seed=seed, **options)


def read_lora(path: Path, family: str, modules: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Dense float64 deltas of a file by weight name, in any of the family's spellings.

    Every tensor of the file must be understood; keys of text encoders are ignored.
    """
    stored = load_file(path)
    names = all_names(family, modules)
    truth: dict[str, WeightDelta] = {}
    unknown = {key for key in stored if not key.startswith(("text_encoder", "lora_te"))}
    for key in sorted(unknown):
        for up, down in ((".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")):
            name = key.removesuffix(up)
            if name == key or name not in names:
                continue
            entry, alpha = names[name], stored.get(name + ".alpha")
            weight = f"diffusion_model.{entry.module}.weight"
            delta = truth.setdefault(weight, _empty(modules[entry.module]))
            _add(delta, entry, stored[key], stored[name + down], None if alpha is None else float(alpha))
            unknown -= {key, name + down, name + ".alpha"}
    assert not unknown, f"{path.name} has keys that no trainer would write: {sorted(unknown)[:5]}"
    return {weight: part.delta for weight, part in truth.items()}


def factors(shape: Shape, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random up and down; convolutions as LoCon writes them."""
    out, width = shape[0], torch.Size(shape[1:]).numel()
    up = torch.randn(out, rank, generator=generator) * (0.3 / rank**0.5)
    down = torch.randn(rank, width, generator=generator) / width**0.5
    if len(shape) > 2:
        return up.reshape(out, rank, *[1] * (len(shape) - 2)), down.reshape(rank, *shape[1:])
    return up, down


def dense(up: Tensor, down: Tensor, alpha: float | None) -> Tensor:
    """alpha / rank * up @ down in float64, (out, in * kernel)."""
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    return scale * up.double().flatten(1) @ down.double().flatten(1)


def _empty(shape: Shape) -> WeightDelta:
    return WeightDelta(torch.zeros(shape, dtype=torch.float64))


def _add(truth: WeightDelta, entry: Entry, up: Tensor, down: Tensor, alpha: float | None) -> None:
    part = dense(up, down, alpha)
    if entry.swapped:
        scale, shift = part.chunk(2)
        part = torch.cat([shift, scale])
    rows = truth.delta[entry.start : entry.start + entry.rows]
    rows += part.reshape(rows.shape)
    truth.spans.append((entry.start, entry.rows))
