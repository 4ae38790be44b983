"""Weights of the connected model, and what ComfyUI's own adapter classes make of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from .names import read_patches

_APPLY_ERRORS = (
    *(RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, ZeroDivisionError),
    NameError,  # GLoRA factors of no known order: a local name is never set
)
"""What the host's adapter classes raise over tensors that do not fit."""

Patcher = Any
"""A MODEL, or the patcher of a CLIP."""


def patcher_of(owner: Any) -> Patcher:
    """The weight patcher of a MODEL or CLIP."""
    return getattr(owner, "patcher", owner)


def current_weight(owner: Any, key: str, device: torch.device) -> Tensor:
    """A parameter as the MODEL or CLIP computes with it: dequantised, with the patches that it carries.

    Returns:
        A float32 copy on `device`.

    Raises:
        ValueError: The layer packs its weight in a way that cannot be read.
    """
    patcher = patcher_of(owner)
    weight = base_weight(patcher, key, device)
    entries = patcher.patches.get(key, [])
    return comfy.lora.calculate_weight(entries, weight, key) if entries else weight


def base_weight(patcher: Patcher, key: str, device: torch.device) -> Tensor:
    """A parameter without any patch, whatever is loaded at the moment."""
    weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    backup, by_hook = patcher.backup.get(key), patcher.hook_backup.get(key)
    if by_hook is not None:
        weight = by_hook[0]
    elif backup is not None:
        weight = backup.weight
    if weight is None:
        raise ValueError("the weight is not loaded yet")
    shape = tuple(weight.shape)
    copy = comfy.model_management.cast_to_device(weight, device, torch.float32, copy=True)
    if convert is not None:
        copy = convert(copy, inplace=True)
    copy = copy.to(torch.float32)
    if tuple(copy.shape) != shape or type(copy) is not Tensor:
        return _probed_weight(patcher, key, device)
    return copy


def _probed_weight(patcher: Patcher, key: str, device: torch.device) -> Tensor:
    """The matrix of a layer that packs its weight (GGUF and the like): what it makes of unit vectors."""
    path, _, parameter = key.rpartition(".")
    module = patcher.model.get_submodule(path)
    width = getattr(module, "in_features", None)
    if parameter != "weight" or width is None:
        raise ValueError(f"the layer packs its {parameter} as {type(getattr(module, parameter)).__name__}")
    # such layers keep patches inside the packed weight; unloading takes them off
    comfy.model_management.unload_model_and_clones(patcher)
    with torch.no_grad():
        unit = torch.eye(width, device=device)
        matrix: Tensor = (module(unit) - module(torch.zeros_like(unit[:1]))).T
    return matrix.to(torch.float32).contiguous()


def change_of(patch: Any, key: Any, weight: Tensor, strength: float) -> Tensor:
    """What one of the host's patches adds to a weight.

    Args:
        patch: An adapter or tuple, as `comfy.lora.load_lora` makes it.
        key: The host's key: a name, or (name, offset[, function]).
        weight: The whole parameter, float32; left as it is.
        strength: The patch's strength.

    Returns:
        The change of the rows that the key speaks of, float32.

    Raises:
        ValueError: The host reports that it cannot apply the patch.
    """
    name, offset, function = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
    with _complaints() as heard:
        try:
            changed = comfy.lora.calculate_weight([(strength, patch, 1.0, offset, function)], weight.clone(), name)
        except _APPLY_ERRORS as err:
            if comfy.model_management.is_oom(err):
                raise
            raise ValueError(f"{type(err).__name__}: {err}") from err
    if heard and "out of memory" in heard[0].lower():  # the adapter classes log what they catch
        raise torch.OutOfMemoryError(heard[0])
    if heard:
        raise ValueError(heard[0])
    if changed.shape != weight.shape:
        raise ValueError(f"the weight would become {tuple(changed.shape)}")
    change = changed.sub_(weight)
    return change if offset is None else change.narrow(*offset)


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """What the host logs as warnings in this thread: its way to say that a patch was not applied."""
    heard: list[str] = []
    thread = threading.get_ident()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread:
                heard.append(record.getMessage())

    root, listener = logging.getLogger(), Listener(logging.WARNING)
    level, disabled = root.level, logging.root.manager.disable
    root.addHandler(listener)
    root.setLevel(min(level, logging.WARNING))
    logging.disable(logging.NOTSET)
    try:
        yield heard
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.removeHandler(listener)


def patches_of(tensors: Mapping[str, Tensor], core: Mapping[str, Any]) -> dict[Any, Any]:
    """Patches by host key, as ComfyUI's LoRA loader makes them of some keys of a file.

    Raises:
        ValueError: A tensor of a pair is missing, or has a form that the loader cannot take.
    """
    try:
        return read_patches(tensors, core)
    except KeyError as err:
        raise ValueError(f"{err.args[0]} is missing beside its partner") from err
    except (RuntimeError, ValueError, TypeError, IndexError) as err:
        raise ValueError(f"{type(err).__name__}: {err}") from err
