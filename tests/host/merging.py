"""Graphs around the pack's own nodes, as a user would build them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .graphs import FAMILIES, SIZE, Graph, Node
from .loras import LoraFile, WeightDelta, family_lora
from .server import Server

SEED = 7
PAIRS = {
    "flux-fused-split": ("flux", "kohya", "diffusers"),
    "flux-split-split": ("flux", "diffusers", "diffusers"),
    "zimage-fused-split": ("zimage", "kohya", "diffusers"),
    "wan21": ("wan21", "kohya", "native"),
    "sdxl-convolutions": ("sdxl", "kohya", "kohya"),
    "sd15-convolutions": ("sd15", "kohya", "native"),
}

OTHER_FAMILIES = {
    family: (family, "kohya", "native")
    for family in FAMILIES
    if family not in {first for first, _, _ in PAIRS.values()}
}
"""One pair for each family that PAIRS lacks; kohya and native name whole modules in all of them."""


@dataclass(frozen=True)
class Task:
    """One LoRA of a merge: a file, its strength, and the seed of its calibration text."""

    file: LoraFile
    strength: float
    text_seed: int

    def scaled(self) -> dict[str, Tensor]:
        """float64 deltas at this strength."""
        return {name: self.strength * part.delta for name, part in self.file.truth.items()}


def pair(base: Path, name: str) -> tuple[str, tuple[Task, Task]]:
    """A family and two LoRAs for it; the second lacks a third of the modules."""
    family, first, second = {**PAIRS, **OTHER_FAMILIES}[name]
    a = family_lora(base, family, first, seed=21)
    b = family_lora(base, family, second, seed=22, name=f"{name}_second", include=_most)
    return family, (Task(a, 1.0, 501), Task(b, 0.8, 502))


def _most(module: str) -> bool:
    return zlib.crc32(module.encode()) % 3 != 0


def summed(tasks: Sequence[Task]) -> dict[str, Tensor]:
    """Sum of all deltas, weight by weight."""
    total: dict[str, Tensor] = {}
    for task in tasks:
        for name, delta in task.scaled().items():
            total[name] = total[name] + delta if name in total else delta
    return total


def averaged(tasks: Sequence[Task]) -> dict[str, Tensor]:
    """Mean over the LoRAs that have the weight."""
    return {name: delta / sum(name in task.file.truth for task in tasks) for name, delta in summed(tasks).items()}


def row_groups(parts: Sequence[WeightDelta]) -> list[tuple[int, int]]:
    """(start, rows) of the row ranges that are routed on their own: connected where any file's rows overlap."""
    groups: list[tuple[int, int]] = []
    for start, rows in sorted(span for part in parts for span in part.spans):
        if groups and start < sum(groups[-1]):
            first, length = groups[-1]
            groups[-1] = (first, max(first + length, start + rows) - first)
        else:
            groups.append((start, rows))
    return groups


class MergeGraph(Graph):
    """A graph that fills in the defaults of the pack's widgets, as the browser does."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server

    def pack(self, class_type: str, inputs: Mapping[str, Any] | None = None, /, **more: Any) -> Node:
        """Add a node of the pack with the defaults of all widgets that are not given."""
        schemas = self._server.schemas()
        assert class_type in schemas, f"the pack did not load {class_type}; see the server's log"
        defaults = {}
        for name, (kind, *options) in schemas[class_type]["input"].get("required", {}).items():
            settings = options[0] if options else {}
            if "default" in settings:
                defaults[name] = settings["default"]
            elif kind == "COMBO" and settings.get("options"):
                defaults[name] = settings["options"][0]
        return self.add(class_type, {**defaults, **(inputs or {}), **more})

    def lora(self, family: str, task: Task, **options: Any) -> Node:
        """SSR LoRA with a conditioning of its own."""
        values = {
            "lora": task.file.name,
            "strength_model": task.strength,
            "strength_clip": task.strength,
            "conditioning": self.conditioning(family, task.text_seed),
        }
        return self.pack("SSRLoRA", values | options)

    def np_lora(self, family: str, contents: Sequence[Task], style: Task, **options: Any) -> Node:
        """NP-LoRA Merge of a chain of content LoRAs and a style; no prompts."""
        chain: dict[str, Any] = {}
        for task in contents:
            chain = {"previous": self.bare_lora(task, **chain)}
        options.setdefault("model", self.checkpoint(family))
        return self.pack("SSRNPLoRAMerge", {"content": chain["previous"], "style": self.bare_lora(style)} | options)

    def bare_lora(self, task: Task, **options: Any) -> Node:
        """SSR LoRA with a file and strengths, nothing to calibrate by."""
        strengths = {"strength_model": task.strength, "strength_clip": task.strength}
        return self.pack("SSRLoRA", {"lora": task.file.name} | strengths | options)

    def merge(self, family: str, tasks: Sequence[Task], kind: str = "SSRMerge", **options: Any) -> Node:
        """UNETLoader and one SSR LoRA a task into SSR Merge or SSR Calibrate."""
        loras = [self.lora(family, task) for task in tasks]
        options.setdefault("model", self.checkpoint(family))
        options.setdefault("latent", self.latent(family))
        return self.join(kind, loras, **options)

    def join(self, kind: str, loras: Sequence[Node], **options: Any) -> Node:
        """SSR Merge or SSR Calibrate of these SSR LoRA nodes."""
        sockets = {f"loras.lora{index}": node for index, node in enumerate(loras)}
        return self.pack(kind, {"seed": SEED, "steps": 1, "width": SIZE, "height": SIZE} | sockets | options)

    def save(self, merged: Node, prefix: str, style: str = "comfy") -> Node:
        """SSR Save LoRA behind SSR Merge's third output."""
        return self.pack("SSRSaveLoRA", lora=merged.out(2), filename_prefix=f"loras/{prefix}", key_style=style)


def record(server: Server, family: str, task: Task, steps: int, prefix: str) -> None:
    """Sample with one LoRA alone, by core nodes, and keep what every layer saw."""
    graph = MergeGraph(server)
    model = graph.core_lora(graph.checkpoint(family), task.file.name, task.strength)
    watched = graph.add("RecordInputs", model=model, prefix=prefix)
    sampled = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=SEED),
        guider=graph.add("BasicGuider", model=watched, conditioning=graph.conditioning(family, task.text_seed)),
        sampler=graph.add("KSamplerSelect", sampler_name="euler"),
        sigmas=graph.first_sigmas(model, steps),
        latent_image=graph.latent(family),
    )
    graph.add("SaveLatent", samples=sampled, filename_prefix=f"host/{prefix}")
    server.run(graph.prompt).ok()
