"""How far the `model` of a merged file is followed: files are passed on, and their graphs are run as code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import FileError

LOADERS = frozenset(
    {
        "CheckpointLoader",
        "CheckpointLoaderSimple",
        "unCLIPCheckpointLoader",
        "UNETLoader",
        "CLIPLoader",
        "DualCLIPLoader",
        "TripleCLIPLoader",
        "QuadrupleCLIPLoader",
        "LTXAVTextEncoderLoader",
        "LoraLoader",
        "LoraLoaderModelOnly",
        "CLIPSetLastLayer",
        "CLIPMergeSimple",
        "ModelMergeSimple",
        "ModelSamplingDiscrete",
        "ModelSamplingContinuousEDM",
        "ModelSamplingContinuousV",
        "ModelSamplingStableCascade",
        "ModelSamplingSD3",
        "ModelSamplingAuraFlow",
        "ModelSamplingFlux",
        "ModelNoiseScale",
        "ModelComputeDtype",
        "ModelAttentionBackend",
        "RescaleCFG",
        "FreeU",
        "FreeU_V2",
        "PrimitiveBoolean",
        "PrimitiveFloat",
        "PrimitiveInt",
        "PrimitiveString",
    }
)
"""Nodes of ComfyUI that load a model by a listed name, or change one in memory; none of them writes or downloads."""


def check_graph(model: Mapping[str, Any], file: str) -> None:
    """Refuse what a merged file's metadata may not start without being trusted.

    Args:
        model: `model` of the recipe in the metadata.
        file: Name of the merged file.

    Raises:
        FileError: A node is none of `LOADERS`, or a custom node pack is to be loaded; names both.
    """
    kinds = {str(node.get("class_type")) for node in model.get("graph", {}).values()}
    strange = [f"runs the nodes {', '.join(sorted(kinds - LOADERS))}"] if kinds - LOADERS else []
    packs = [str(name) for name in model.get("custom_nodes", ())]
    strange += [f"loads the custom node packs {', '.join(packs)}"] if packs else []
    if strange:
        raise FileError(
            f"the graph in its metadata {' and '.join(strange)}, which are no loaders of ComfyUI.",
            file=file,
            remedy="give --trust-graph if you trust the file, or name the model by --checkpoint or --unet.",
        )


def pack_path(name: str, roots: Sequence[str]) -> Path:
    """Where a custom node pack is installed.

    Args:
        name: Folder (or file) directly in one of the roots.
        roots: ComfyUI's custom_nodes folders.

    Raises:
        FileError: It is not the name of one folder, or no root has it.
    """
    if name in ("", ".", "..") or any(mark in name for mark in "/\\:\0"):
        raise FileError(
            f"the custom node pack {name!r} is not the name of one folder in custom_nodes.",
            remedy="correct model.custom_nodes.",
        )
    found = next((path for path in (Path(root) / name for root in roots) if path.exists()), None)
    if found is None:
        raise FileError(
            "no custom_nodes folder has this pack.", file=name, remedy="install it, or correct model.custom_nodes."
        )
    return found
