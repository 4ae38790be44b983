"""What can be read off a MODEL or CLIP without the host's functions: shapes, names, identity."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..ssr_core import KeyTarget, Part, Target

log = logging.getLogger(__name__)

TEXT_FIRST = {"Flux", "Flux2", "Chroma", "LongCatImage", "Lumina2", "ZImage", "HunyuanVideo", "HunyuanImage21"}
"""Model classes whose joint layers read the text tokens before the image tokens."""

KOHYA_AS_DIFFUSERS = {"BaseModel"}
"""Model classes whose layers kohya's trainers name as diffusers does (SD 1.x and 2.x); all others as here."""

FORWARD_ATTACHMENT = "ssr_merge_forward_"
"""Begin of the keys under which a MODEL remembers what it applies in the forward pass: layers by target."""


def joint_text(model: Any) -> Literal["first", "unknown"]:
    """Where the text stands in layers that read text and image together."""
    return "first" if type(model.model).__name__ in TEXT_FIRST else "unknown"


def kohya_key_map(model: Any, key_map: Mapping[str, KeyTarget]) -> dict[str, KeyTarget]:
    """The key map with the one `lora_unet_` name for each layer that kohya's trainers use themselves."""
    if type(model.model).__name__ not in KOHYA_AS_DIFFUSERS:
        return dict(key_map)
    native = {
        f"lora_unet_{name.removeprefix('diffusion_model.').replace('.', '_')}": entry.target
        for name, entry in key_map.items()
        if name.startswith("diffusion_model.")
    }
    named = {e.target for name, e in key_map.items() if name.startswith("lora_unet_") and name not in native}
    return {name: e for name, e in key_map.items() if not (name in native and e.target in named)}


def root_of(part: Part, owner: Any) -> torch.nn.Module:
    """The module that targets of this part are relative to."""
    module: torch.nn.Module = owner.model if part == "model" else owner.cond_stage_model
    return module


def weight_shapes(root: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter as its layer computes with it (a state dict shows how it is packed)."""
    shapes = {key: tuple(value.shape) for key, value in root.state_dict().items()}
    for name, module in root.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and f"{name}.weight" in shapes:
            shapes[f"{name}.weight"] = tuple(weight.shape)
    return shapes


def tapped_modules(root: torch.nn.Module) -> set[str]:
    """Paths of the modules whose call is a linear map with their weight, so that hooks see it at work.

    By what they look like: quantised layers are no `nn.Linear`. Embeddings, gates that multiply with
    a weight of their own and grouped convolutions are none of them.
    """
    return {
        name
        for name, module in root.named_modules()
        if hasattr(module, "in_features") or (hasattr(module, "kernel_size") and getattr(module, "groups", 1) == 1)
    }


def unpatched_parameters(root: torch.nn.Module) -> set[str]:
    """Parameters that ComfyUI's patcher never visits: buffers, and those of modules with layers below them.

    It takes patches of these (a block's own modulation table, a padding token) and never applies
    them, without a word.
    """
    found = {name for name, _ in root.named_buffers()}
    for name, module in root.named_modules():
        own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
        # layers that are built when they are loaded have a weight that is None until then
        if own and any(hasattr(one, "weight") or one._parameters for one in module.modules() if one is not module):
            found |= {f"{name}.{parameter}" for parameter in own}
    return found


def key_target(
    part: Part,
    key: Any,
    shapes: Mapping[str, tuple[int, ...]],
    tapped: Collection[str],
    unpatched: Collection[str],
) -> KeyTarget | None:
    """One entry of the host's key map as the engine takes it; None if the model has no such rows."""
    parameter, offset, function = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
    shape = shapes.get(parameter)
    if shape is None:
        return None
    module_path, _, name = parameter.rpartition(".")
    rows = None
    if offset is not None:
        dim, start, length = offset
        if dim != 0 or start + length > shape[0]:
            # The host's table does not fit this model (grouped-query Lumina2); its own loader would fail later.
            log.warning("SSR-Merge: rows %s of %s do not exist; the name is ignored.", offset, parameter)
            return None
        rows = (start, length)
    order = None
    if function is not None:
        count = shape[0] if rows is None else rows[1]
        order = tuple(int(i) for i in function(torch.arange(count, dtype=torch.float32)[:, None])[:, 0])
    ignored = "ComfyUI takes changes of this parameter and never applies them" if parameter in unpatched else ""
    return KeyTarget(Target(module_path, rows, part), shape, order, name, module_path in tapped, ignored)


def model_identity(model: Any) -> str:
    """Hash of what distinguishes one loaded model from another: class, shapes, some weights, its patches.

    Weights that LoRA patches have overwritten are read from their backup.
    """
    digest = hashlib.sha256(type(model.model).__name__.encode())
    state = model.model.state_dict()
    matrices = [key for key in sorted(state) if key.endswith(".weight") and state[key].ndim > 1]
    for key in sorted(state):
        digest.update(f"{key}{tuple(state[key].shape)}".encode())
    for key in matrices[:: max(1, len(matrices) // 8)]:
        backup = model.backup.get(key)
        digest.update(_sample(state[key] if backup is None else backup.weight))
    for key in sorted(model.patches):
        for strength, patch, *_ in model.patches[key]:
            digest.update(f"{key}{strength}{type(patch).__name__}".encode())
            for value in _tensors_in(getattr(patch, "weights", patch)):
                digest.update(_sample(value))
    for one in sorted(_forward_digests(model.attachments)):
        digest.update(one)
    return digest.hexdigest()


def _forward_digests(attachments: Mapping[str, Any]) -> Iterator[bytes]:
    """One digest for each merge that this MODEL applies in the forward pass, whatever its key."""
    for key, layers in attachments.items():
        if not key.startswith(FORWARD_ATTACHMENT):
            continue
        digest = hashlib.sha256()
        for target, layer in sorted(layers.items(), key=lambda item: str(item[0])):
            digest.update(f"{target}{layer.scale}".encode() + _sample(layer.down) + _sample(layer.up))
        yield digest.digest()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a patch, however its kind nests them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def _sample(weight: Any) -> bytes:
    """Some bytes of a tensor; of a quantised one, of what it stores."""
    stored = getattr(weight, "_qdata", weight)
    if not isinstance(stored, Tensor) or stored.device.type == "meta":
        return b""
    few = stored.detach().flatten()[:64].cpu().contiguous()
    return bytes(few.view(torch.uint8).tolist())
