"""LoRA entries -> tasks for the connected MODEL and CLIP, and the keys that only the host can apply."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from ..ssr_core import (
    Adapter,
    Converted,
    DenseGroup,
    IncompatibleError,
    KeyTarget,
    Part,
    Task,
    convert,
    converted_groups,
    read_adapter,
)
from ..ssr_core.classify import reads_weight
from . import host, patches
from .conversion import DenseChanges
from .entries import LoRAEntries, LoRAEntry

CONVERSION_SHARE = 0.2
"""Of the progress bar, where there is anything to convert."""


@dataclass(frozen=True)
class Loaded:
    """LoRAs read for one MODEL and CLIP."""

    entries: LoRAEntries
    tasks: tuple[Task, ...]
    key_map: Mapping[str, KeyTarget] = field(repr=False)
    tensors: tuple[Mapping[str, Tensor], ...] = field(repr=False)


def acting(entries: LoRAEntries, clip: Any | None) -> LoRAEntries:
    """The LoRAs whose strength is not 0 on all that is connected."""
    return tuple(e for e in entries if e.strength_model != 0 or (clip is not None and e.strength_clip != 0))


def load(
    entries: LoRAEntries,
    model: Any,
    clip: Any | None,
    progress: host.Progress,
    known: Sequence[Adapter] = (),
) -> Loaded:
    """Read the LoRAs for the connected MODEL and CLIP; those of strength 0 everywhere are left out.

    Args:
        entries: The LoRAs.
        model: The MODEL.
        clip: The CLIP, if one is connected.
        progress: Moves while LoHa, LoKr, DoRA and the like are converted.
        known: Adapters that were converted earlier for the same weights; their factors are taken over.

    Raises:
        IncompatibleError: Nothing is enabled, or a LoRA does not fit.
        FileError: A file is damaged or refused.
    """
    key_map = host.key_map(model, clip)
    used = acting(entries, clip)
    if not used:
        raise IncompatibleError(
            "no LoRA is enabled.", remedy="connect at least one SSR LoRA that is enabled, with a strength other than 0."
        )
    tensors, adapters = [], []
    for entry in used:
        host.check_cancel()
        content = entry.load()
        adapters.append(read_adapter(content, key_map, name=entry.name, fingerprint=entry.sha256))
        tensors.append(content)
    progress.stage(progress.reached, CONVERSION_SHARE, sum(len(adapter.dense) for adapter in adapters))
    core_keys = dict(zip(("model", "clip"), host.core_key_map(model, clip), strict=True))
    parameters: dict[Part, Collection[str]] = {
        "model": patches.parameters_of(model),
        "clip": patches.parameters_of(clip),
    }
    tasks = []
    for entry, content, adapter in zip(used, tensors, adapters, strict=True):
        strengths: dict[Part, float] = {
            "model": entry.strength_model,
            "clip": 0.0 if clip is None else entry.strength_clip,
        }
        _check_vectors(adapter, strengths, parameters)
        changes = DenseChanges(
            adapter, content, {"model": model, "clip": clip}, core_keys, strengths, host.compute_device(model)
        )
        converted = convert(
            adapter,
            entry.convert,
            changes,
            parts=[part for part, strength in strengths.items() if strength != 0],
            known=_reusable(entry, adapter, known),
            tick=progress.step,
        )
        tasks.append(Task(converted, strengths["model"], strengths["clip"], entry.identity))
    return Loaded(used, tuple(tasks), key_map, tuple(tensors))


def _check_vectors(
    adapter: Adapter, strengths: Mapping[Part, float], parameters: Mapping[Part, Collection[str]]
) -> None:
    """Refuse a bias of a layer that has none before the slow part; ComfyUI drops it in silence."""
    for target, parameter in adapter.vectors:
        name = f"{target.module_path}.{parameter}"
        if strengths[target.part] != 0 and name not in parameters[target.part]:
            raise IncompatibleError(
                "the model has no such parameter.",
                file=adapter.name,
                layer=name,
                remedy="connect the base model that this LoRA was trained for, or remove the LoRA.",
            )


def _reusable(entry: LoRAEntry, adapter: Adapter, known: Sequence[Adapter]) -> dict[DenseGroup, Converted]:
    """Groups that were converted before with the same options, on weights that the caller vouches for."""
    found: dict[DenseGroup, Converted] = {}
    for old in known:
        if old.fingerprint == adapter.fingerprint and old.convert_options == entry.convert:
            found.update(
                (group, one)
                for group, one in converted_groups(old).items()
                if group.target.part == "model" and not group.bends
            )
    return found


def pass_through(loaded: Loaded, index: int, part: Part, owner: Any, core_keys: Mapping[str, Any]) -> Any:
    """MODEL or CLIP with one LoRA's keys that are not low-rank, as the host's own patches at its strength.

    Raises:
        IncompatibleError: The host cannot apply one of them either.
    """
    task = loaded.tasks[index]
    records = task.adapter.keys_with("unsupported")
    keys = [record.key for record in records if record.target is not None and record.target.part == part]
    return _host_patched(loaded, index, part, owner, keys, core_keys)


def rest(
    loaded: Loaded, index: int, part: Part, owner: Any, core_keys: Mapping[str, Any], *, reading: bool | None = None
) -> Any:
    """MODEL or CLIP with what conversion cut off one LoRA.

    Args:
        loaded: The LoRAs.
        index: Which one.
        part: MODEL or CLIP.
        owner: The MODEL or CLIP itself.
        core_keys: The host's key map.
        reading: Only kinds whose change depends on the weight (they have to come first), or only the others.
    """
    task = loaded.tasks[index]
    kept = [one for one in task.adapter.conversions if one.rest_kept and one.group.target.part == part]
    if reading is not None:
        kept = [one for one in kept if reads_weight(one.group.kind) == reading]
    dense = {(one.group.target, "weight"): one.rest for one in kept if one.rest is not None}
    if dense:
        owner = patches.with_vectors(owner, dense, task.strength(part))
    groups = [one.group for one in kept if one.rest is None]
    owner = _host_patched(loaded, index, part, owner, [key for group in groups for key in group.keys], core_keys)
    layers = {group.target: task.adapter.layers[group.target] for group in groups}
    return patches.with_layers(owner, layers, -task.strength(part)) if layers else owner


def _host_patched(
    loaded: Loaded, index: int, part: Part, owner: Any, keys: Sequence[str], core_keys: Mapping[str, Any]
) -> Any:
    task = loaded.tasks[index]
    strength = task.strength(part)
    if not keys or strength == 0:
        return owner
    spelled = {record.key: record.loader_key for record in task.adapter.records}
    try:
        return patches.apply_host_patches(
            owner, loaded.tensors[index], {key: spelled[key] for key in keys}, strength, core_keys
        )
    except IncompatibleError as err:
        raise IncompatibleError(err.what, file=task.name, remedy=err.remedy) from err


def acting_on(loaded: Loaded, indices: Sequence[int], part: Part, owner: Any, core_keys: Mapping[str, Any]) -> Any:
    """MODEL or CLIP with what hooks cannot apply of some LoRAs.

    That is: their biases and norms, layers that the model reads without calling them, keys that are not
    low-rank, and what conversion cut off; in the order in which a merge applies them.
    """
    for apply in (partial(rest, reading=True), partial(rest, reading=False), pass_through):
        for index in indices:
            owner = apply(loaded, index, part, owner, core_keys)
    for task in (loaded.tasks[index] for index in indices):
        strength, adapter = task.strength(part), task.adapter
        vectors = {key: value for key, value in adapter.vectors.items() if key[0].part == part}
        untapped = {t: layer for t, layer in adapter.layers.items() if t in adapter.untapped and t.part == part}
        if vectors and strength != 0:
            owner = patches.with_vectors(owner, vectors, strength)
        if untapped and strength != 0:
            owner = patches.with_layers(owner, untapped, strength)
    return owner
