"""LoRA file names, the host's patches, and what both stand for on the connected model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.lora_convert
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from ...ssr_core import KeyTarget, LoRALayer, Part
from ..model_info import key_target, root_of, tapped_modules, unpatched_parameters, weight_shapes

CoreKeyMap = Mapping[str, Any]
"""Base name in a LoRA file -> key as ComfyUI's `add_patches` takes it (a string or a tuple)."""


def core_key_map(model: Any | None, clip: Any | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """ComfyUI's own key maps of MODEL and CLIP. A fresh dict each: the default argument is shared."""
    unet = {} if model is None else comfy.lora.model_lora_keys_unet(model.model, {})
    text = {} if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    return unet, text


def key_map(model: Any | None, clip: Any | None) -> dict[str, KeyTarget]:
    """The engine's key map of the connected MODEL and CLIP."""
    unet, text = core_key_map(model, clip)
    entries: dict[str, KeyTarget] = {}
    parts: list[tuple[Part, dict[str, Any], Any]] = [("model", unet, model), ("clip", text, clip)]
    for part, names, owner in parts:
        if owner is None:
            continue
        root = root_of(part, owner)
        shapes, tapped, unpatched = weight_shapes(root), tapped_modules(root), unpatched_parameters(root)
        for name, key in names.items():
            entry = key_target(part, key, shapes, tapped, unpatched)
            if entry is not None:
                entries[name] = entry
    return entries


def convert_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's renaming of the few formats that its key map does not know (BFL control, Wan Fun, USO)."""
    return dict(comfy.lora_convert.convert_lora(tensors))


def lora_adapter(layer: LoRALayer) -> LoRAAdapter:
    """A low-rank change as the host's own weight patch."""
    up, down = layer.up, layer.down
    if layer.kernel:
        down = down.reshape(layer.rank, -1, *layer.kernel)
        up = up.reshape(*up.shape, *(1 for _ in layer.kernel))
    return LoRAAdapter(set(), (up, down, layer.alpha, None, None, None))


def read_patches(tensors: Mapping[str, Tensor], core: CoreKeyMap) -> dict[Any, Any]:
    """Patches by host key, as ComfyUI's LoRA loader makes them."""
    return dict(comfy.lora.load_lora(dict(tensors), dict(core), log_missing=False))
