"""A merge made smaller and put onto MODEL and CLIP."""

from __future__ import annotations

from typing import Any

from ..ssr_core import (
    Calibration,
    CompressionReport,
    CompressOptions,
    IncompatibleError,
    SSRMerge,
    bytes_per_rank,
    compress,
)
from . import host, pipeline
from .loading import Loaded


def compressed(
    origin: pipeline.MergeOrigin,
    loaded: Loaded,
    model: Any,
    clip: Any | None,
    calibration: Calibration | None,
    options: CompressOptions,
    progress: host.Progress,
) -> tuple[pipeline.Merged, CompressionReport]:
    """Compress a merge.

    Args:
        origin: The merge.
        loaded: Its LoRAs, for this MODEL and CLIP.
        model: The base MODEL.
        clip: Its CLIP.
        calibration: Its statistics, if they are known.
        options: How much smaller.
        progress: Moves by layers.

    Raises:
        IncompatibleError: CLIP is missing, the budget is too small, or the calibration is of other LoRAs.
    """
    layers = origin.result.layers
    if clip is None and any(target.part == "clip" for target in layers):
        raise IncompatibleError(
            "the merge changes a text encoder, but no CLIP is connected.", remedy="connect the CLIP that was merged."
        )
    missing = {target.module_path for target in layers} - {e.target.module_path for e in loaded.key_map.values()}
    if missing:
        raise IncompatibleError(
            "the MODEL lacks a layer of the merge.",
            layer=min(missing),
            remedy="connect the base model that was connected to the merge.",
        )
    sizes = bytes_per_rank(layers, loaded.key_map, options.key_style)
    begin = progress.reached
    method = origin.options.method
    result, report = compress(
        origin.result,
        options,
        loaded.tasks,
        calibration,
        balanced=getattr(method, "balance", True),
        joint_weight=getattr(method, "joint_weight", SSRMerge.joint_weight),
        neutral_weight=getattr(method, "neutral_weight", SSRMerge.neutral_weight),
        bytes_per_rank=lambda target, layer: sizes[target],
        device=host.compute_device(model),
        tick=lambda done, total: progress.at(begin + (1 - begin) * done / max(1, total)),
    )
    merged = pipeline.put_on(loaded, model, clip, result, calibration, origin.options, options)
    return merged, report
