"""Where a graph has its MODEL from, so that a saved merge can be made again without the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import host

MERGES = frozenset({"SSRMerge", "SSRSolve", "SSRMergeFromRecords", "SSRNPLoRAMerge", "SSRCompare", "SSRCompress"})
"""Nodes whose MODEL and CLIP are what a merge was made on."""


def model_source(prompt: Mapping[str, Any] | None, node: str | None) -> dict[str, object] | None:
    """The loader nodes behind the merge that a save node writes, as `model` of a recipe.

    Args:
        prompt: The whole graph in ComfyUI's API format.
        node: Id of the save node.

    Returns:
        None where the graph does not say: a merge inside a loop or an expanded node, or a LORA_MODEL
        that comes through another node.
    """
    link = (prompt or {}).get(str(node), {}).get("inputs", {}).get("lora")
    if prompt is None or not _is_link(link, prompt):
        return None
    merge = prompt[link[0]]
    if merge["class_type"] not in MERGES or not _is_link(merge["inputs"].get("model"), prompt):
        return None
    model, clip = merge["inputs"]["model"], merge["inputs"].get("clip")
    graph: dict[str, Any] = {}
    for start in (model, clip):
        if start is not None and not _collect(start, prompt, graph):
            return None
    packs = host.packs_of({one["class_type"] for one in graph.values()})
    return {"graph": graph, "model": model, "clip_link": clip, "custom_nodes": packs}


def _is_link(value: Any, prompt: Mapping[str, Any]) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[0] in prompt


def _collect(link: Any, prompt: Mapping[str, Any], graph: dict[str, Any]) -> bool:
    """Add all nodes behind a link; False if one of them is not in the graph."""
    if not _is_link(link, prompt):
        return False
    if link[0] in graph:
        return True
    node = prompt[link[0]]
    graph[link[0]] = {"class_type": node["class_type"], "inputs": node["inputs"]}
    links = [value for value in node["inputs"].values() if isinstance(value, list) and len(value) == 2]
    return all(_collect(value, prompt, graph) for value in links if isinstance(value[0], str))
