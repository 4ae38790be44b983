"""Whole adapter files, entry by entry, with what each entry adds to which weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..dialects import Dialect, Entry, Shape
from ..dialects.naming import dotted, native
from ..dialects.unets import unet_diffusers
from . import kinds
from .kinds import KINDS, Layer

Include = Callable[[Entry, int], bool]


@dataclass(frozen=True)
class Piece:
    """What some keys of a file add to some rows of one parameter, float64.

    Attributes:
        keys: The keys, all read or none.
        parameter: The host's name of the parameter.
        start: First row.
    """

    keys: frozenset[str]
    parameter: str
    start: int
    delta: Tensor


@dataclass(frozen=True)
class AdapterFile:
    """A file in the loras folder and its meaning."""

    path: Path
    tensors: Mapping[str, Tensor] = field(repr=False)
    pieces: tuple[Piece, ...] = field(repr=False)
    shapes: Mapping[str, Shape] = field(repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    def truth(self, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Change of every parameter at strength 1, as if the file lacked some keys."""
        total: dict[str, Tensor] = {}
        for piece in self.pieces:
            if not piece.keys.isdisjoint(without):
                assert piece.keys <= set(without), f"read in part: {sorted(piece.keys)}"
                continue
            if piece.parameter not in total:
                total[piece.parameter] = torch.zeros(self.shapes[piece.parameter], dtype=torch.float64)
            total[piece.parameter][piece.start : piece.start + len(piece.delta)] += piece.delta
        return total


class _Writer:
    """Collects tensors and pieces of one file."""

    def __init__(self, weights: Mapping[str, Tensor], dialect: Dialect, seed: int) -> None:
        self.weights, self.dialect = weights, dialect
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        self.pieces: list[Piece] = []

    def entries(self) -> list[Entry]:
        shapes = {
            name.removeprefix("diffusion_model.").removesuffix(".weight"): tuple(value.shape)
            for name, value in self.weights.items()
            if name.endswith(".weight") and value.ndim >= 2
        }
        return list(self.dialect.naming({m: s for m, s in shapes.items() if list(native({m: s}))}))

    def matrix(self, kind: str, entry: Entry, number: int) -> None:
        """The weight of one entry in the given kind."""
        weight = f"diffusion_model.{entry.module}.weight"
        rows = self.weights[weight][entry.start : entry.start + entry.rows].double()
        layer = Layer(rows, number, self.dialect, self.generator, entry.swapped)
        tensors, delta = KINDS[kind](layer)
        base = self.dialect.key(entry)
        self.add({base + suffix: value for suffix, value in tensors.items()}, weight, entry.start, delta)

    def add(self, tensors: Mapping[str, Tensor], parameter: str, start: int, delta: Tensor) -> None:
        self.tensors |= tensors
        self.pieces.append(Piece(frozenset(tensors), parameter, start, delta))

    def noise(self, shape: Shape, scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=self.generator)

    def save(self, path: Path) -> AdapterFile:
        save_file(self.tensors, path)
        shapes = {name: tuple(value.shape) for name, value in self.weights.items()}
        return AdapterFile(path, self.tensors, tuple(self.pieces), shapes)


def write_adapter(
    path: Path,
    weights: Mapping[str, Tensor],
    dialect: Dialect,
    kind: str,
    seed: int,
    include: Include = lambda entry, number: True,
) -> AdapterFile:
    """Write one file of a kind.

    Args:
        path: Where to; the file name is the LoRA's name.
        weights: The base model's parameters by the host's names.
        dialect: How the file spells its layers.
        kind: One of KINDS or EXTRAS.
        seed: Of the random numbers.
        include: Which entries the file has, by entry and number.
    """
    writer = _Writer(weights, dialect, seed)
    chosen = [(entry, number) for number, entry in enumerate(writer.entries()) if include(entry, number)]
    for entry, number in chosen:
        writer.matrix(kind if kind in KINDS else "lora", entry, number)
    if kind in EXTRAS:
        EXTRAS[kind](writer, [entry for entry, _ in chosen])
    return writer.save(path)


def _vectors(writer: _Writer, entries: list[Entry]) -> None:
    """Changes of biases beside the factors, and of norms under names of their own.

    A bias of some rows of a fused module, or of rows in another order, has no name that ComfyUI takes.
    """
    for entry in entries:
        bias = f"diffusion_model.{entry.module}.bias"
        whole = not entry.swapped and entry.rows == len(writer.weights[f"diffusion_model.{entry.module}.weight"])
        if bias in writer.weights and whole:
            change = writer.noise((entry.rows,), 0.05)
            writer.add({writer.dialect.key(entry) + ".diff_b": change}, bias, 0, change.double())
    if writer.dialect.naming not in (native, unet_diffusers):
        return  # the other namings have no words for norms
    norms = {
        name.removeprefix("diffusion_model.").removesuffix(".weight"): tuple(value.shape)
        for name, value in writer.weights.items()
        if name.endswith(".weight") and value.ndim == 1
    }
    for entry in writer.dialect.naming(norms):
        for parameter, suffix in (("weight", ".w_norm"), ("bias", ".b_norm")):
            name = f"diffusion_model.{entry.module}.{parameter}"
            if name in writer.weights:
                change = writer.noise(tuple(writer.weights[name].shape), 0.05)
                writer.add({writer.dialect.key(entry) + suffix: change}, name, 0, change.double())


def _set(writer: _Writer, entries: list[Entry]) -> None:
    """One vector replaced, a bias where the model has one, under the host's own name for it."""
    vectors = [name for name, value in writer.weights.items() if value.ndim == 1]
    name = next((v for v in vectors if v.endswith(".bias")), vectors[0])
    new = 1 + writer.noise(tuple(writer.weights[name].shape), 0.1)
    key = name.removesuffix(".weight") + ".set_weight"
    writer.add({key: new}, name, 0, new.double() - writer.weights[name].double())


def _reshape(writer: _Writer, entries: list[Entry]) -> None:
    """A layer that gets eight more input columns, as control LoRAs do; nothing that a merge could hold."""
    entry = next(e for e in entries if not e.swapped)
    weight = writer.weights[f"diffusion_model.{entry.module}.weight"]
    base, shape = writer.dialect.key(entry), (entry.rows, weight.shape[1] + 8, *weight.shape[2:])
    layer = Layer(torch.zeros(shape, dtype=torch.float64), 0, writer.dialect, writer.generator)
    tensors, _ = kinds.lora(layer)
    writer.tensors |= {base + suffix: value for suffix, value in tensors.items()}
    writer.tensors[base + ".reshape_weight"] = torch.tensor(shape)


def loose_parameters(weights: Mapping[str, Tensor]) -> list[str]:
    """Matrices that belong to no linear layer or convolution: tables, pad tokens, gates, embeddings."""

    def is_layer(name: str) -> bool:
        module = name.removeprefix("diffusion_model.").removesuffix(".weight")
        return name.endswith(".weight") and bool(list(native({module: tuple(weights[name].shape)})))

    return [name for name, value in weights.items() if value.ndim >= 2 and not is_layer(name)]


def _loose(writer: _Writer, entries: list[Entry]) -> None:
    """Factors where the parameter is called weight, a full difference elsewhere; under the host's own names."""
    for number, name in enumerate(loose_parameters(writer.weights)):
        base, weight = name.removesuffix(".weight"), writer.weights[name]
        layer = Layer(weight.double(), number, _PLAIN, writer.generator)
        tensors, delta = (kinds.lora if name.endswith(".weight") else kinds.diff)(layer)
        writer.add({base + suffix: value for suffix, value in tensors.items()}, name, 0, delta)


_PLAIN = dotted(native, "", "up/down", alpha=True)
EXTRAS: dict[str, Callable[[_Writer, list[Entry]], None]] = {
    "vectors": _vectors,
    "loose": _loose,
    "set": _set,
    "reshape": _reshape,
}
ADAPTERS = (*KINDS, *EXTRAS)
