"""Writing a merged LoRA: to a temporary file, back through ComfyUI's loader, compared, renamed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ssr_core import (
    FileError,
    IncompatibleError,
    KeyStyle,
    MergeResult,
    atomic_path,
    to_tensors,
    with_recipe,
    write_safetensors,
)
from ..ssr_core.files import json_text
from ..ssr_core.words import number_of
from .patches import reload_patches
from .pipeline import MergedLoRA, MergeOrigin

_UNFAITHFUL = "set key_style to comfy; if it stays, report it with the LoRAs' names."

TOLERANCE = 2
"""Allowed difference between file and live merge, in roundings of the file's dtype."""


REPORT_SUFFIX = ".report.json"


class DescribedLoRA(dict[str, Tensor]):
    """Core's LORA_MODEL (a plain dict of tensors) that is no merge, with the metadata of its file."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = metadata


def save_lora(
    lora: Mapping[str, Tensor],
    path: Path,
    style: KeyStyle,
    model: Mapping[str, object] | None = None,
    overwrite: bool = False,
    report: bool = False,
) -> None:
    """Write a LORA_MODEL to a new file.

    Args:
        lora: A merge of this pack, or any LORA_MODEL (written as it is, in its own key style; with its metadata, if
            it is a `DescribedLoRA`).
        path: The file to make.
        style: Key style of a merge.
        model: How the MODEL was loaded, as recipes say it; None where that is not known.
        overwrite: Replace a file of this name.
        report: Also write the report of a merge beside it, as JSON.

    Raises:
        FileError: The file exists, cannot be written, or does not load to what was merged.
        IncompatibleError: The model family lacks this key style.
    """
    if not isinstance(lora, MergedLoRA):
        if style != "comfy":
            raise IncompatibleError(
                f"this LORA_MODEL is no merge of SSR-Merge and cannot be rewritten in the style {style}.",
                remedy="choose comfy, which writes it as it is.",
            )
        with atomic_path(path, overwrite) as temporary:
            metadata = lora.metadata if isinstance(lora, DescribedLoRA) else {"format": "pt"}
            write_safetensors(temporary, lora, metadata)
        return
    origin = lora.origin
    tensors = to_tensors(origin.result, origin.key_map, style)
    metadata = with_recipe(origin.metadata, {"key_style": style, "model": model})
    with atomic_path(path, overwrite) as temporary:
        write_safetensors(temporary, tensors, {**metadata, "ssr_merge.key_style": style})
        _verify(temporary, path, origin)
    if report:
        with atomic_path(path.with_name(path.stem + REPORT_SUFFIX)) as temporary:
            temporary.write_text(json_text(origin.result.report.to_json()), encoding="utf-8")


def _verify(temporary: Path, path: Path, origin: MergeOrigin) -> None:
    """Compare the file, as ComfyUI loads it, with the live merge on random inputs."""
    patches, unused = reload_patches(temporary, origin.core_keys)
    if unused:
        raise FileError(
            f"ComfyUI would not load {number_of(len(unused), 'key')}, e.g. {unused[0]}; nothing was saved.",
            file=path.name,
            remedy=_UNFAITHFUL,
        )
    expected, found = _expected_outputs(origin), _loaded_outputs(patches, origin)
    if expected.keys() != found.keys():
        missing = sorted(expected.keys() ^ found.keys())[0]
        said = "the file does not cover the same layers; nothing was saved."
        raise FileError(said, file=path.name, layer=missing, remedy=_UNFAITHFUL)
    dtypes = {layer.down.dtype for layer in origin.result.layers.values()}
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=1e-6)
    for name, value in expected.items():
        scale = float(value.norm())
        if float((found[name] - value).norm()) > TOLERANCE * eps * max(scale, 1e-30):
            said = "the file does not give the live merge; nothing was saved."
            raise FileError(said, file=path.name, layer=name, remedy=_UNFAITHFUL)


def _probe(width: int) -> Tensor:
    """A fixed random input, float64."""
    return torch.randn(width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)


def _row_counts(origin: MergeOrigin) -> dict[str, int]:
    weights = (entry for entry in origin.key_map.values() if entry.parameter == "weight")
    return {f"{entry.target.module_path}.weight": entry.weight_shape[0] for entry in weights}


def _expected_outputs(origin: MergeOrigin) -> dict[str, Tensor]:
    rows = _row_counts(origin)
    outputs: dict[str, Tensor] = {}
    result: MergeResult = origin.result
    for target, layer in result.layers.items():
        name = f"{target.module_path}.weight"
        out = outputs.setdefault(name, torch.zeros(rows[name], dtype=torch.float64))
        start = 0 if target.out_slice is None else target.out_slice[0]
        change = layer.up.double() @ (layer.down.double() @ _probe(layer.down.shape[1])) * layer.scale
        out[start : start + change.shape[0]] += change
    for (target, parameter), value in result.vectors.items():
        outputs[f"{target.module_path}.{parameter}"] = value.double().flatten()
    return outputs


def _loaded_outputs(patches: Mapping[Any, Any], origin: MergeOrigin) -> dict[str, Tensor]:
    rows = _row_counts(origin)
    outputs: dict[str, Tensor] = {}
    for key, patch in patches.items():
        name, offset, function = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
        if isinstance(patch, tuple):
            outputs[name] = patch[1][0].double().flatten()
            continue
        up, down, alpha = patch.weights[0].double().flatten(1), patch.weights[1].double().flatten(1), patch.weights[2]
        change = up @ (down @ _probe(down.shape[1])) * (1.0 if alpha is None else alpha / down.shape[0])
        if function is not None:
            change = function(change[:, None])[:, 0]
        out = outputs.setdefault(name, torch.zeros(rows[name], dtype=torch.float64))
        start = 0 if offset is None else offset[1]
        out[start : start + change.shape[0]] += change
    return outputs
