"""Merged adapter -> tensors of an ordinary LoRA file, in the key style of choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from .adapters import LoRALayer
from .errors import IncompatibleError
from .merge import MergeResult
from .targets import KeyMap, KeyTarget, Part, Target

KeyStyle = Literal["comfy", "kohya", "diffusers"]
KEY_STYLES: tuple[KeyStyle, ...] = ("comfy", "kohya", "diffusers")

_PREFIXES: Mapping[KeyStyle, tuple[str, ...]] = {
    "comfy": ("diffusion_model.", "text_encoders."),
    "kohya": ("lora_unet_", "lora_te"),
    "diffusers": ("transformer.", "unet.", "text_encoder"),
}


def to_tensors(result: MergeResult, key_map: KeyMap, style: KeyStyle = "comfy") -> dict[str, Tensor]:
    """Tensors of a LoRA file that the model of `key_map` loads to exactly this merge.

    Args:
        result: The merge.
        key_map: The connected model's names; every name written is one of them.
        style: "comfy" (`diffusion_model.<path>`), "kohya" (`lora_unet_<path>`) or "diffusers"
            (`transformer.<path>`, split q, k, v). The first two exist for every family.

    Returns:
        Contiguous tensors, none shared; convolutions in four or five dimensions; alpha as a scalar.

    Raises:
        IncompatibleError: The family has no name of this style for a layer.
    """
    return change_tensors(result.layers, result.vectors, key_map, style)


def change_tensors(
    layers: Mapping[Target, LoRALayer],
    vectors: Mapping[tuple[Target, str], Tensor],
    key_map: KeyMap,
    style: KeyStyle = "comfy",
) -> dict[str, Tensor]:
    """As `to_tensors`, of any changes: low-rank ones by target, those of biases and norms by parameter."""
    names = _names(key_map, style)
    shapes = {
        (e.target.part, e.target.module_path): e.weight_shape for e in key_map.values() if e.parameter == "weight"
    }
    tensors: dict[str, Tensor] = {}
    for module, members in _by_module(layers).items():
        shape = shapes[module]
        for entry, layer in _writable(members, names.get(module, []), shape, style):
            tensors.update(_pair(_name_of(entry, names), layer, shape[2:], style))
    for (target, parameter), value in vectors.items():
        tensors.update(_vector(target, parameter, value, names, key_map, style))
    return _unshared(tensors)


def bytes_per_rank(layers: Mapping[Target, LoRALayer], key_map: KeyMap, style: KeyStyle = "comfy") -> dict[Target, int]:
    """Bytes that one rank of each layer takes in the file that `change_tensors` makes.

    A layer whose rows have no name of their own is padded to the whole module; one that is written in
    several named pieces repeats its down.
    """
    names = _names(key_map, style)
    shapes = {
        (e.target.part, e.target.module_path): e.weight_shape for e in key_map.values() if e.parameter == "weight"
    }
    sizes = {}
    for module, members in _by_module(layers).items():
        rows = shapes[module][0]
        tiles = [_tiles(target, names.get(module, []), rows, style) for target, _ in members]
        for (target, layer), pieces in zip(members, tiles, strict=True):
            up = layer.up.shape[0] if all(tiles) else rows
            copies = len(pieces) if all(tiles) else 1
            sizes[target] = (copies * layer.down.shape[1] + up) * layer.down.element_size()
    return sizes


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies only where two names would share memory, which safetensors refuses."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or storage.data_ptr() in seen:
            tensors[name] = tensor.contiguous().clone()
        seen.add(storage.data_ptr())
    return tensors


_Module = tuple[Part, str]
_Named = tuple[str, KeyTarget]


def _names(key_map: KeyMap, style: KeyStyle) -> dict[_Module, list[_Named]]:
    """Names of one style by module; styles fall back to ComfyUI's own where a part has none (text encoders)."""
    found: dict[_Module, list[_Named]] = {}
    generic: dict[_Module, list[_Named]] = {}
    for name, entry in key_map.items():
        if entry.parameter != "weight":
            continue
        module = (entry.target.part, entry.target.module_path)
        if name.startswith(_PREFIXES[style]):
            found.setdefault(module, []).append((name, entry))
        if entry.target.part == "clip" and name.startswith(_PREFIXES["comfy"]):
            generic.setdefault(module, []).append((name, entry))
    return {**generic, **found}


def _by_module(layers: Mapping[Target, LoRALayer]) -> dict[_Module, list[tuple[Target, LoRALayer]]]:
    modules: dict[_Module, list[tuple[Target, LoRALayer]]] = {}
    for target, layer in layers.items():
        modules.setdefault((target.part, target.module_path), []).append((target, layer))
    return modules


def _writable(
    layers: list[tuple[Target, LoRALayer]], named: list[_Named], shape: tuple[int, ...], style: KeyStyle
) -> list[tuple[KeyTarget, LoRALayer]]:
    """Rearrange the rows of one module's layers so that each piece has a name."""
    pieces: list[tuple[KeyTarget, LoRALayer]] = []
    for target, layer in layers:
        tiles = _tiles(target, named, shape[0], style)
        if not tiles:
            whole = next((entry for _, entry in named if _is_plain(entry)), None)
            if whole is None:
                raise IncompatibleError(
                    f"this model family has no {style} name for the layer.",
                    layer=str(target),
                    remedy="choose the key style comfy, which exists for every layer.",
                )
            return [(whole, _fuse(layers, shape[0]))]
        start = 0 if target.out_slice is None else target.out_slice[0]
        for tile in tiles:
            first, length = tile.target.out_slice or (0, shape[0])
            up = layer.up[first - start : first - start + length]
            if tile.row_order is not None:
                order = torch.empty(length, dtype=torch.long)
                order[list(tile.row_order)] = torch.arange(length)
                up = up[order]
            pieces.append((tile, LoRALayer(layer.down, up, layer.alpha, layer.kernel)))
    return pieces


def _is_plain(entry: KeyTarget) -> bool:
    """A name of all rows of a module, in their own order."""
    return entry.target.out_slice is None and entry.row_order is None


def _tiles(target: Target, named: list[_Named], out: int, style: KeyStyle) -> list[KeyTarget]:
    """Named row ranges that cover the target's rows exactly, or nothing.

    The diffusers style prefers split rows: ComfyUI gives Flux.1's fused layers a name that only
    Flux.2 files use.
    """
    start, length = target.out_slice or (0, out)
    exact = [e for _, e in named if (e.target.out_slice or (0, out)) == (start, length)]
    inside: dict[tuple[int, int], KeyTarget] = {}
    for _, entry in named:
        rows = entry.target.out_slice
        if rows is not None and start <= rows[0] and rows[0] + rows[1] <= start + length:
            inside.setdefault(rows, entry)
    at, tiles = start, []
    for rows in sorted(inside):
        if rows[0] == at:
            tiles.append(inside[rows])
            at += rows[1]
    complete = at == start + length
    if exact and not (complete and style == "diffusers"):
        return exact[:1]
    return tiles if complete else []


def _fuse(layers: list[tuple[Target, LoRALayer]], out: int) -> LoRALayer:
    """All slices of one module as one layer over all its rows."""
    ups = []
    for target, layer in layers:
        start = 0 if target.out_slice is None else target.out_slice[0]
        up = layer.up.new_zeros(out, layer.rank)
        up[start : start + layer.up.shape[0]] = layer.up * layer.scale
        ups.append(up)
    return LoRALayer(torch.cat([layer.down for _, layer in layers]), torch.cat(ups, dim=1), None, layers[0][1].kernel)


def _name_of(entry: KeyTarget, names: Mapping[_Module, list[_Named]]) -> str:
    return next(name for name, e in names[(entry.target.part, entry.target.module_path)] if e == entry)


def _pair(name: str, layer: LoRALayer, kernel: tuple[int, ...], style: KeyStyle) -> dict[str, Tensor]:
    up, down = layer.up, layer.down
    if kernel:
        down = down.reshape(layer.rank, -1, *kernel)
        up = up.reshape(*up.shape, *(1 for _ in kernel))
    names = (".lora_B.weight", ".lora_A.weight") if style == "diffusers" else (".lora_up.weight", ".lora_down.weight")
    tensors = {name + names[0]: up, name + names[1]: down}
    if style != "diffusers" or layer.scale != 1:
        alpha = float(layer.rank) if layer.alpha is None else layer.alpha
        tensors[name + ".alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def _vector(
    target: Target,
    parameter: str,
    value: Tensor,
    names: Mapping[_Module, list[_Named]],
    key_map: KeyMap,
    style: KeyStyle,
) -> dict[str, Tensor]:
    """A bias or norm under a plain name: ComfyUI does not load biases under names of rows or reordered rows."""
    owner = "weight" if parameter == "bias" else parameter
    suffix = ".diff_b" if parameter == "bias" else ".diff"
    anywhere = [(name, e) for name, e in key_map.items() if e.target == target and e.parameter == owner]
    anywhere.sort(key=lambda named: not named[0].startswith(_PREFIXES["comfy"]))
    styled = names.get((target.part, target.module_path), []) if owner == "weight" else []
    whole = [name for name, entry in [*styled, *anywhere] if _is_plain(entry)]
    if not whole:
        raise IncompatibleError(
            f"this model family has no {style} name for the {parameter}.",
            layer=str(target),
            remedy="choose the key style comfy.",
        )
    return {whole[0] + suffix: value}
