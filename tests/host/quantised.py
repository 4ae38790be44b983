"""Merges on quantised bases, and what they really add to each layer's output."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from .loras import model_shapes, read_lora
from .merging import PAIRS, MergeGraph, Node, pair
from .reference import patches
from .server import Result, Server
from .weights import facts

STORED = {
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
    "scaled_fp8": "float8_e4m3fn",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
    "nvfp4_smoothed": "nvfp4",
    "int8": "int8_tensorwise",
    "int8_convrot": "int8_tensorwise with convrot",
    "convrot_w4a4": "convrot_w4a4",
    "asym_w4a8_int8": "asym_w4a8_int8",
    "unscaled_fp8_e4m3fn": "float8_e4m3fn",
    "unscaled_fp8_e5m2": "float8_e5m2",
    "packed": "packed uint8",
}
"""Kind of tiny checkpoint -> what the report calls its storage."""


def load_base(graph: MergeGraph, family: str, kind: str | None) -> Node:
    """A loader of one family's tiny model in one storage; None for float32."""
    if kind is None:
        return graph.checkpoint(family)
    if kind == "packed":
        return graph.add("PackedLoader", family=family)
    if kind.startswith("unscaled_"):
        dtype = kind.removeprefix("unscaled_")
        return graph.add("UNETLoader", unet_name=f"tiny_{family}.safetensors", weight_dtype=dtype)
    return graph.add("QuantisedLoader", family=family, kind=kind)


@dataclass(frozen=True)
class Measured:
    """One merge on one base.

    Attributes:
        errors: Relative error of what the merged LoRA adds to a layer's output, by weight name.
        changed: Layers without a LoRA whose output differs from the base model's.
        deltas: The merged LoRA as saved, dense float64.
        report: Of the merge node.
        latent: What KSampler gave.
        hooks: Hooks left on the model afterwards.
        base_hash: Of the base weights afterwards.
    """

    errors: Mapping[str, float]
    changed: tuple[str, ...]
    deltas: Mapping[str, Tensor]
    report: str
    latent: Tensor
    hooks: int
    base_hash: str


def measure(server: Server, base: Path, case: str, kind: str | None, apply: str, scale: float = 1.0) -> Measured:
    """Merge on a base, sample one step, and compare every layer with the base's own on the same input.

    Args:
        server: A running ComfyUI.
        base: Its base directory.
        case: One of PAIRS.
        kind: One of STORED, or None for float32.
        apply: Of SSR Merge.
        scale: Of both LoRAs' strengths.
    """
    family, tasks = pair(base, case)
    tasks = [replace(task, strength=scale * task.strength) for task in tasks]
    prefix = f"{case}_{kind}_{apply}"
    graph = MergeGraph(server)
    model = load_base(graph, family, kind)
    merged = graph.merge(family, tasks, model=model, apply=apply)
    recorded = graph.add("RecordLayers", model=merged, prefix=prefix)
    sample = graph.sample(family, recorded)
    saved = graph.save(merged, prefix)
    text = graph.add("PreviewAny", source=merged.out(4))
    result = server.run(graph.prompt).ok()
    after = MergeGraph(server)
    again = load_base(after, family, kind)
    dump = after.dump(again, f"{prefix}_after", base_only=True)
    after.add("ReplayLayers", model=again, prefix=prefix)
    left = facts(server.run(after.prompt).ok(), dump)
    deltas = saved_deltas(base, family, result, saved)
    errors, changed = compare_layers(base / "output" / "probes", prefix, deltas)
    latent = latent_of(base, result, sample)
    return Measured(errors, changed, deltas, result.text(text), latent, left["hooks"], left["base_hash"])


def base_hash(server: Server, case: str, kind: str | None) -> str:
    """Hash of a base model's weights, without its patches."""
    graph = MergeGraph(server)
    dump = graph.dump(load_base(graph, PAIRS[case][0], kind), f"{case}_{kind}_hash", base_only=True)
    return facts(server.run(graph.prompt).ok(), dump)["base_hash"]


def saved_deltas(base: Path, family: str, result: Result, saved: Node) -> dict[str, Tensor]:
    """What an SSR Save LoRA node wrote, dense float64."""
    path = base / "output" / "loras" / re.split(r"[\\/]", result.text(saved))[-1]
    return read_lora(path, family, model_shapes(base, family))


def latent_of(base: Path, result: Result, node: object) -> Tensor:
    """What a SaveLatent node wrote."""
    (entry,) = result.outputs[str(node)]["latents"]
    return load_file(base / "output" / entry["subfolder"] / entry["filename"])["latent_tensor"].double()


def compare_layers(folder: Path, prefix: str, deltas: Mapping[str, Tensor]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Relative error of each layer's added output against `delta x`, and layers changed that have no delta."""
    errors, changed = {}, []
    with (
        safe_open(folder / f"{prefix}.safetensors", "pt") as seen,
        safe_open(folder / f"{prefix}_base.safetensors", "pt") as plain,
    ):
        geometry = json.loads(seen.metadata()["geometry"])
        for key in seen.keys():  # noqa: SIM118
            if not key.endswith(":out"):
                continue
            name = key.removesuffix(":out")
            added = seen.get_tensor(key).double() - plain.get_tensor(f"{name}:base").double()
            if name not in deltas:
                changed += [name] if added.any() else []
                continue
            expected = _effect(seen.get_tensor(f"{name}:in").double(), deltas[name], geometry.get(name))
            rows = added.movedim(1, -1) if name in geometry else added
            errors[name] = float((rows.reshape(expected.shape) - expected).norm() / expected.norm())
    return errors, tuple(changed)


def _effect(x: Tensor, delta: Tensor, geometry: dict | None) -> Tensor:
    """delta x as rows of outputs, float64."""
    rows = x.reshape(-1, x.shape[-1]) if geometry is None else patches(x, **geometry)
    return rows @ delta.flatten(1).T
