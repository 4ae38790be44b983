"""Changes that are not low-rank (LoHa, LoKr, DoRA, OFT, full differences ...) -> low-rank factors.

The host computes the dense change, on the weights of the connected model, with its own adapter
classes; here it becomes a layer like any other, routed like the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .adapters import Adapter, Conversion, ConvertOptions, DenseGroup, KeyRecord, LoRALayer
from .classify import is_replacement
from .errors import IncompatibleError
from .targets import Part, Target
from .truncation import truncate

Converted = tuple[LoRALayer | Tensor, Conversion]
"""Factors (of a matrix) or the exact difference (of anything else), and how good they are."""

DenseChange = Callable[[DenseGroup], Tensor]
"""Dense change of a group's rows at strength 1, `group.change_shape`, float32 or float64, on any device."""


def convert(
    adapter: Adapter,
    options: ConvertOptions,
    dense_change: DenseChange,
    *,
    parts: Collection[Part] = ("model", "clip"),
    known: Mapping[DenseGroup, Converted] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Adapter:
    """Turn the groups of `adapter.dense` into factors or vectors.

    Args:
        adapter: A LoRA as `read_adapter` read it.
        options: Rank, tolerance, and what becomes of the rest.
        dense_change: Computes one group's change.
        parts: Parts of the model to convert for; groups of the others stay as they are.
        known: What groups became earlier on the same weights, to be taken over.
        tick: Called before each group; may raise to cancel.

    Returns:
        The adapter with these groups among its layers and vectors, their keys marked "converted".

    Raises:
        IncompatibleError: A change has the wrong shape or is not finite.
    """
    wanted = [group for group in adapter.dense if group.target.part in parts and options.max_rank > 0]
    if not wanted:
        return adapter
    layers, vectors = dict(adapter.layers), dict(adapter.vectors)
    done: list[Conversion] = []
    words: dict[str, tuple[Target, str]] = {}
    for group in wanted:
        tick()
        result, conversion = (known or {}).get(group) or _converted(adapter.name, group, options, dense_change(group))
        if isinstance(result, LoRALayer):
            layers[group.target] = result
        else:
            vectors[(group.target, group.parameter)] = result
        done.append(conversion)
        words.update(dict.fromkeys(group.keys, (group.target, _in_words(conversion))))
    records = tuple(
        KeyRecord(r.key, "converted", *words[r.key], r.loader_key)
        if r.status == "unsupported" and r.key in words
        else r
        for r in adapter.records
    )
    rest = tuple(group for group in adapter.dense if group not in wanted)
    found = (*adapter.conversions, *done)
    return replace(
        adapter,
        layers=layers,
        vectors=vectors,
        records=records,
        dense=rest,
        conversions=found,
        convert_options=options,
    )


def converted_groups(adapter: Adapter) -> dict[DenseGroup, Converted]:
    """What an adapter's groups became, to be taken over by `convert` as `known`."""
    found: dict[DenseGroup, Converted] = {}
    for one in adapter.conversions:
        group = one.group
        result = adapter.layers[group.target] if group.is_map else adapter.vectors[(group.target, group.parameter)]
        found[group] = (result, one)
    return found


def _converted(name: str, group: DenseGroup, options: ConvertOptions, change: Tensor) -> Converted:
    _check(change, group, name)
    if group.is_map:
        return _factorise(change, group, options)
    return change.cpu(), Conversion(group, 0, 0.0)


def _check(change: Tensor, group: DenseGroup, name: str) -> None:
    problem = ""
    if tuple(change.shape) != group.change_shape:
        problem = f"its change has the shape {tuple(change.shape)}, not {group.change_shape}"
    elif not bool(torch.isfinite(change).all()):
        problem = "its change is not finite on this model"
    if problem:
        raise IncompatibleError(
            f"{group.keys[0]} ({group.kind}): {problem}.",
            file=name,
            layer=str(group.target),
            remedy="connect the base model that this LoRA was trained for, or remove the LoRA.",
        )


def _factorise(change: Tensor, group: DenseGroup, options: ConvertOptions) -> tuple[LoRALayer, Conversion]:
    found = truncate(change.flatten(1), options.max_rank, options.bound)
    layer = LoRALayer(found.down.cpu(), found.up.cpu(), None, group.weight_shape[2:])
    short = found.error > options.bound and found.rank >= options.max_rank
    kept = short and options.rest == "pass_through"
    rest = None
    if kept and is_replacement(group.kind):  # the host's own patch would wipe out what others added
        rest = (change - (found.up @ found.down).reshape(change.shape)).cpu()
    return layer, Conversion(group, found.rank, found.error, kept, rest)


def _in_words(conversion: Conversion) -> str:
    kind = conversion.group.kind
    if not conversion.group.is_map:
        return f"{kind}: turned into the exact difference on this model"
    rest = "; the host applies the rest as its own patch" if conversion.rest_kept else ""
    return f"{kind}: turned into rank {conversion.rank}, relative error {conversion.error:.1e}{rest}"
