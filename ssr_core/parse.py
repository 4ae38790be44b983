"""LoRA file -> Adapter: every key is read, refused with its name, or listed as unmatched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from .adapters import Adapter, KeyRecord
from .errors import IncompatibleError
from .naming import NameIndex, is_text_encoder
from .reading import LayerReader
from .spelling import Spelled, split_key
from .targets import KeyMap

MIN_MATCHED = 0.5
"""Below this share of matched layers a file is taken for a LoRA of another base model."""


def read_adapter(tensors: Mapping[str, Tensor], key_map: KeyMap, *, name: str, fingerprint: str) -> Adapter:
    """Read a LoRA's tensors for the model that `key_map` describes.

    Args:
        tensors: Content of the file.
        key_map: Base names that the model understands.
        name: The LoRA's name in messages.
        fingerprint: sha256 of the file's content.

    Returns:
        The adapter; `records` has exactly one entry for each key of `tensors`.

    Raises:
        IncompatibleError: No or too few layers match the model, shapes differ, a value is not
            finite.
    """
    groups: dict[str, dict[str, Spelled]] = defaultdict(dict)
    records: dict[str, KeyRecord] = {}
    for key in tensors:
        spelled = split_key(key)
        if spelled is None:
            records[key] = KeyRecord(key, "unmatched", reason="not a tensor name of any known adapter format")
        else:
            groups[spelled.base][key] = spelled

    reader, index = LayerReader(tensors, name), NameIndex(key_map)
    names = {base: index.find(base) for base in groups}
    order = {base: i for i, base in enumerate(key_map)}
    for base in sorted(groups, key=lambda b: order.get(names[b] or "", -1)):
        found = names[base]
        if found is None:
            records.update(_unmatched(groups[base], key_map))
        else:
            records.update(reader.read_group(groups[base], key_map[found], found))
    _check_coverage(groups, names, key_map, name)
    reader.mark_shadowed(records)
    return Adapter(
        name,
        fingerprint,
        reader.layers,
        reader.vectors(),
        tuple(records[key] for key in tensors),
        tuple(reader.dense.values()),
        untapped=frozenset(reader.untapped),
    )


def _unmatched(group: Mapping[str, Spelled], key_map: KeyMap) -> dict[str, KeyRecord]:
    has_clip = any(entry.target.part == "clip" for entry in key_map.values())
    reason = "no layer of the connected model has this name"
    if not has_clip and any(is_text_encoder(spelled.base) for spelled in group.values()):
        reason = "a text-encoder layer, and no CLIP is connected"
    return {key: KeyRecord(key, "unmatched", reason=reason) for key in group}


def _check_coverage(
    groups: Mapping[str, Mapping[str, Spelled]], names: Mapping[str, str | None], key_map: KeyMap, name: str
) -> None:
    has_clip = any(entry.target.part == "clip" for entry in key_map.values())
    layers = [base for base, group in groups.items() if any(spelled.role != "alpha" for spelled in group.values())]
    matched = sum(names[base] is not None for base in layers)
    counted = [base for base in layers if has_clip or not is_text_encoder(base)]
    if matched >= max(1, MIN_MATCHED * len(counted)):
        return
    if not counted and layers:
        raise IncompatibleError("all its layers are text-encoder layers.", file=name, remedy="connect CLIP.")
    example = next((base for base in counted if names[base] is None), "none")
    raise IncompatibleError(
        f"only {matched} of its {len(counted)} layers exist in the connected model (first unknown: {example}).",
        file=name,
        remedy="connect the base model that this LoRA was trained for, or remove the LoRA.",
    )
