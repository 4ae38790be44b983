"""LoRA entries -> tasks for the connected MODEL and CLIP, and the keys that only the host can apply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..ssr_core import IncompatibleError, KeyTarget, Part, Task, read_adapter
from . import host, patches
from .entries import LoRAEntries


@dataclass(frozen=True)
class Loaded:
    """LoRAs read for one MODEL and CLIP."""

    entries: LoRAEntries
    tasks: tuple[Task, ...]
    key_map: Mapping[str, KeyTarget] = field(repr=False)
    tensors: tuple[Mapping[str, Tensor], ...] = field(repr=False)


def load(entries: LoRAEntries, model: Any, clip: Any | None) -> Loaded:
    """Read the LoRAs for the connected MODEL and CLIP; those of strength 0 everywhere are left out.

    Raises:
        IncompatibleError: Nothing is enabled, or a LoRA does not fit.
        FileError: A file is damaged or refused.
    """
    key_map = host.key_map(model, clip)
    used = [e for e in entries if e.strength_model != 0 or (clip is not None and e.strength_clip != 0)]
    if not used:
        raise IncompatibleError(
            "no LoRA is enabled.", remedy="connect at least one SSR LoRA that is enabled, with a strength other than 0."
        )
    tensors, tasks = [], []
    for entry in used:
        host.check_cancel()
        content = entry.load()
        adapter = read_adapter(content, key_map, name=entry.name, fingerprint=entry.sha256)
        clip_strength = entry.strength_clip if clip is not None else 0.0
        tasks.append(Task(adapter, entry.strength_model, clip_strength, entry.identity))
        tensors.append(content)
    return Loaded(tuple(used), tuple(tasks), key_map, tuple(tensors))


def pass_through(loaded: Loaded, index: int, part: Part, owner: Any, core_keys: Mapping[str, Any]) -> Any:
    """MODEL or CLIP with one LoRA's keys that are not low-rank, as the host's own patches at its strength.

    Raises:
        IncompatibleError: The host cannot apply one of them either.
    """
    task = loaded.tasks[index]
    records = task.adapter.keys_with("unsupported")
    names = [record.key for record in records if record.target is not None and record.target.part == part]
    strength = task.strength(part)
    if not names or strength == 0:
        return owner
    try:
        return patches.apply_host_patches(owner, loaded.tensors[index], names, strength, core_keys)
    except IncompatibleError as err:
        raise IncompatibleError(err.what, file=task.name, remedy=err.remedy) from err


def alone(loaded: Loaded, index: int, part: Part, owner: Any, core_keys: Mapping[str, Any]) -> Any:
    """MODEL or CLIP with what hooks cannot apply of one LoRA: its biases, norms and keys that are not low-rank."""
    task = loaded.tasks[index]
    vectors = {key: value for key, value in task.adapter.vectors.items() if key[0].part == part}
    strength = task.strength(part)
    if vectors and strength != 0:
        owner = patches.with_vectors(owner, vectors, strength)
    return pass_through(loaded, index, part, owner, core_keys)
