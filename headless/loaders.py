"""How a recipe says that its model is loaded, as nodes of ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..ssr_core import FileError


class ModelGraph(NamedTuple):
    """Loader nodes, the links of MODEL and CLIP in them, and the custom node packs that they are from."""

    graph: Mapping[str, Mapping[str, Any]]
    model: list[Any]
    clip: list[Any] | None
    packs: tuple[str, ...]


_CLIP_LOADERS = {1: "CLIPLoader", 2: "DualCLIPLoader", 3: "TripleCLIPLoader", 4: "QuadrupleCLIPLoader"}


def model_graph(model: Mapping[str, Any]) -> ModelGraph:
    """The nodes of a recipe's `model`.

    Raises:
        FileError: It says nothing.
    """
    packs = tuple(model.get("custom_nodes", ()))
    if "graph" in model:
        return ModelGraph(model["graph"], model["model"], model.get("clip_link"), packs)
    if "checkpoint" in model:
        node = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": model["checkpoint"]}}
        return ModelGraph({"1": node}, ["1", 0], ["1", 1], packs)
    if "unet" not in model:
        raise FileError(
            "the recipe does not say which model it is for.",
            remedy="give --checkpoint, or --unet with --clip and --clip-type, or write model into the recipe.",
        )
    unet = {"unet_name": model["unet"], "weight_dtype": model.get("weight_dtype", "default")}
    graph: dict[str, Mapping[str, Any]] = {"1": {"class_type": "UNETLoader", "inputs": unet}}
    files = list(model.get("clip", ()))
    if not files:
        return ModelGraph(graph, ["1", 0], None, packs)
    names = ["clip_name"] if len(files) == 1 else [f"clip_name{i + 1}" for i in range(len(files))]
    inputs: dict[str, Any] = dict(zip(names, files, strict=True))
    if len(files) < 3:
        if "clip_type" not in model:
            raise FileError(
                "model.clip_type is missing.", remedy="give the type as in ComfyUI's CLIP loader, e.g. flux."
            )
        inputs["type"] = model["clip_type"]
    graph["2"] = {"class_type": _CLIP_LOADERS[len(files)], "inputs": inputs}
    return ModelGraph(graph, ["1", 0], ["2", 0], packs)
