"""A few nodes run without a server: how recipes load their model."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import folder_paths

import nodes as comfy_nodes

from ...ssr_core import FileError, IncompatibleError, pack_path
from .device import is_out_of_memory

Graph = Mapping[str, Mapping[str, Any]]
"""ComfyUI's API format: node id -> class_type and inputs."""


def load_packs(names: Sequence[str]) -> None:
    """Load some of the installed custom node packs.

    Raises:
        FileError: A pack is not one folder of custom_nodes, is not installed, or does not load.
    """
    for name in names:
        path = pack_path(name, folder_paths.get_folder_paths("custom_nodes"))
        if not asyncio.run(comfy_nodes.load_custom_node(str(path))):
            raise FileError("ComfyUI cannot load this pack.", file=name, remedy="look at ComfyUI's message above.")


def packs_of(kinds: Collection[str]) -> list[str]:
    """Folders of the custom node packs that some nodes are from; ComfyUI's own nodes are from none."""
    homes = (getattr(comfy_nodes.NODE_CLASS_MAPPINGS.get(kind), "RELATIVE_PYTHON_MODULE", "") for kind in kinds)
    return sorted({home.removeprefix("custom_nodes.") for home in homes if home.startswith("custom_nodes.")})


def run_graph(graph: Graph, wanted: Sequence[Sequence[Any] | None]) -> list[Any]:
    """Outputs of a graph of loader nodes.

    Args:
        graph: The nodes.
        wanted: Links [node id, output number]; None gives None.

    Raises:
        IncompatibleError: A node, an input or an output does not exist.
        FileError: A file is not there, or is none that its loader knows.
    """
    done: dict[str, Sequence[Any]] = {}
    return [None if link is None else _output(graph, link, done, ()) for link in wanted]


def _output(graph: Graph, link: Sequence[Any], done: dict[str, Sequence[Any]], path: tuple[str, ...]) -> Any:
    node, number = str(link[0]), int(link[1])
    if node in path:
        raise IncompatibleError(f"the graph of the model is a circle at node {node}.", remedy="correct the recipe.")
    if node not in graph:
        raise IncompatibleError(f"the graph of the model has no node {node}.", remedy="correct the recipe.")
    if node not in done:
        inputs = {
            name: _output(graph, value, done, (*path, node)) if _is_link(value) else value
            for name, value in graph[node].get("inputs", {}).items()
        }
        done[node] = _run(str(graph[node].get("class_type")), inputs)
    if not 0 <= number < len(done[node]):
        raise IncompatibleError(f"node {node} has no output {number}.", remedy="correct the recipe.")
    return done[node][number]


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _run(kind: str, inputs: Mapping[str, Any]) -> Sequence[Any]:
    if kind not in comfy_nodes.NODE_CLASS_MAPPINGS:
        asyncio.run(comfy_nodes.init_builtin_extra_nodes())
    node = comfy_nodes.NODE_CLASS_MAPPINGS.get(kind)
    if node is None:
        raise IncompatibleError(
            f"there is no node {kind}.", remedy="name the pack that has it in model.custom_nodes of the recipe."
        )
    try:
        if hasattr(node, "PREPARE_CLASS_CLONE"):
            found = node.PREPARE_CLASS_CLONE(None).execute(**inputs)
        else:
            found = getattr(node(), node.FUNCTION)(**inputs)
    except FileNotFoundError as err:
        raise FileError(
            f"{kind} does not find its file ({err}).", file=_files(inputs), remedy="correct the name in model."
        ) from err
    except (RuntimeError, ValueError) as err:  # what ComfyUI's loaders raise for files that they do not know
        if is_out_of_memory(err):
            raise
        raise FileError(
            f"{kind} cannot load it ({_first_line(err)}).",
            file=_files(inputs),
            remedy="name another file in model, or try it in ComfyUI first.",
        ) from err
    except TypeError as err:
        raise IncompatibleError(f"{kind} does not take these inputs ({err}).", remedy="correct the recipe.") from err
    if inspect.iscoroutine(found):
        found = asyncio.run(found)
    result: Sequence[Any] = getattr(found, "result", found)
    return result


def _first_line(err: Exception) -> str:
    return next(iter(str(err).splitlines()), type(err).__name__).rstrip(".")


def _files(inputs: Mapping[str, Any]) -> str:
    return ", ".join(value for value in inputs.values() if isinstance(value, str))
