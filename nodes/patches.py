"""Merged adapters and other keys of LoRA files as weight patches on MODEL and CLIP."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..ssr_core import IncompatibleError, LoRALayer, MergeResult, Part, Target
from . import host


def apply(owner: Any, part: Part, result: MergeResult, without: Container[Target] = ()) -> Any:
    """A clone of MODEL or CLIP with the merged adapter as ordinary weight patches, `without` some layers.

    Raises:
        IncompatibleError: The host did not take a patch.
    """
    patches: dict[Any, Any] = {}
    for target, layer in result.layers.items():
        if target.part == part and target not in without:
            patches[_patch_key(target, "weight")] = host.lora_adapter(layer)
    for (target, parameter), value in result.vectors.items():
        if target.part == part:
            patches[_patch_key(target, parameter)] = ("diff", (value,))
    return _patched(owner, patches, 1.0)


def with_vectors(owner: Any, vectors: Mapping[tuple[Target, str], Tensor], strength: float) -> Any:
    """A clone with changes of biases and norms as weight patches.

    Raises:
        IncompatibleError: The model lacks one of the parameters.
    """
    return _patched(owner, {_patch_key(*key): ("diff", (value,)) for key, value in vectors.items()}, strength)


def with_layers(owner: Any, layers: Mapping[Target, LoRALayer], strength: float) -> Any:
    """A clone with low-rank layers as weight patches.

    Raises:
        IncompatibleError: The model lacks one of the layers.
    """
    return _patched(owner, {_patch_key(t, "weight"): host.lora_adapter(one) for t, one in layers.items()}, strength)


def parameters_of(owner: Any | None) -> set[str]:
    """Names of all that can be patched on a MODEL or CLIP; nothing where none is connected."""
    return set() if owner is None else set(getattr(owner, "patcher", owner).model.state_dict())


def _patched(owner: Any, patches: Mapping[Any, Any], strength: float) -> Any:
    """A clone with patches, all of which have to be taken: ComfyUI drops unknown ones in silence."""
    clone = owner.clone()
    taken = set(clone.add_patches(patches, strength))
    refused = [key for key in patches if key not in taken]
    if refused:
        raise IncompatibleError("the model has no such parameter.", layer=str(refused[0]))
    return clone


def _patch_key(target: Target, parameter: str) -> Any:
    key = f"{target.module_path}.{parameter}"
    return key if target.out_slice is None else (key, (0, *target.out_slice))


def apply_host_patches(
    owner: Any, tensors: Mapping[str, Tensor], keys: Mapping[str, str], strength: float, core: host.CoreKeyMap
) -> Any:
    """A clone with some keys of a LoRA file as the host's own patches (DoRA, LoHa and the like).

    Args:
        owner: MODEL or CLIP.
        tensors: Content of the file.
        keys: Which keys, and how the host's loader spells each.
        strength: Of the patches.
        core: The host's key map.

    Raises:
        IncompatibleError: The host itself cannot apply one of the keys.
    """
    chosen = {loader_key: tensors[key] for key, loader_key in keys.items()}
    if len(chosen) < len(keys):
        raise IncompatibleError(
            f"{next(iter(keys))} is given under two names.", remedy="remove one of them from the file."
        )
    try:
        patches = host.patches_of(chosen, core)
    except ValueError as err:
        raise IncompatibleError(
            f"ComfyUI cannot load {next(iter(chosen))} and the keys beside it ({err}).",
            remedy="export the LoRA again, or leave it out.",
        ) from err
    clone = owner.clone()
    taken = set(clone.add_patches(patches, strength))
    # ComfyUI makes the nonsense key "().bias" of a bias of some rows; say what the file calls it
    nameless = [name for name in chosen if name.endswith(".diff_b")]
    refused = [str(key) for key in patches if key not in taken]
    lost = _unused(chosen, patches) + [nameless[0] if key.startswith("()") else key for key in refused]
    if lost:
        raise IncompatibleError(
            f"ComfyUI itself cannot apply {lost[0]}.", remedy="leave this LoRA out, or remove these keys from it."
        )
    return clone


def _unused(tensors: Mapping[str, Tensor], patches: Mapping[Any, Any]) -> list[str]:
    """Keys of a file that no patch was made from."""
    used = {name for patch in patches.values() for name in getattr(patch, "loaded_keys", ())}
    plain = (".diff", ".diff_b", ".w_norm", ".b_norm", ".set_weight")
    count = sum(isinstance(patch, tuple) for patch in patches.values())
    vectors = [name for name in tensors if name.endswith(plain) and name not in used]
    lost = [name for name in tensors if name not in used and name not in vectors]
    return lost + vectors[count:]


def reload_patches(path: Path, core: host.CoreKeyMap) -> tuple[dict[Any, Any], list[str]]:
    """Load a LoRA file the way ComfyUI's LoraLoader does.

    Returns:
        Patches by host key, and the keys that the loader did not take.
    """
    tensors = host.load_file(path)
    patches = host.read_patches(tensors, core)
    return patches, _unused(tensors, patches)
