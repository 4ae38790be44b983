"""API prompts without the noise, and the graphs that several tests share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SIZE = 128
FRAMES = 5
LATENTS = {
    "flux": "EmptySD3LatentImage",
    "flux2": "EmptyFlux2LatentImage",
    "flux2_klein": "EmptyFlux2LatentImage",
    "chroma": "EmptySD3LatentImage",
    "sdxl": "EmptyLatentImage",
    "sd15": "EmptyLatentImage",
    "zimage": "EmptySD3LatentImage",
    "lumina2": "EmptySD3LatentImage",
    "sd3": "EmptySD3LatentImage",
    "qwen_image": "EmptySD3LatentImage",
    "qwen_image_edit": "EmptySD3LatentImage",
    "hidream": "EmptySD3LatentImage",
    "krea2": "EmptySD3LatentImage",
    "wan21": "EmptyHunyuanLatentVideo",
    "wan22": "EmptyHunyuanLatentVideo",
    "hunyuan_video": "EmptyHunyuanLatentVideo",
    "ltxv": "EmptyLTXVLatentVideo",
    "anima": "EmptySD3LatentImage",
}
"""Core's node for an empty latent, by family."""
FAMILIES = tuple(LATENTS)


@dataclass(frozen=True)
class Node:
    """A node of a graph; as an input value it means its first output."""

    id: str

    def out(self, index: int) -> list[Any]:
        return [self.id, index]

    def __str__(self) -> str:
        return self.id


class Graph:
    """Builds the JSON that POST /prompt expects."""

    def __init__(self) -> None:
        self.prompt: dict[str, Any] = {}

    def add(self, class_type: str, inputs: Mapping[str, Any] | None = None, /, **more: Any) -> Node:
        """Add a node; names that are no identifiers (growing slots) go into the mapping."""
        node = Node(str(len(self.prompt) + 1))
        values = {**(inputs or {}), **more}
        self.prompt[node.id] = {
            "class_type": class_type,
            "inputs": {name: value.out(0) if isinstance(value, Node) else value for name, value in values.items()},
        }
        return node

    def checkpoint(self, family: str) -> Node:
        return self.add("UNETLoader", unet_name=f"tiny_{family}.safetensors", weight_dtype="default")

    def conditioning(self, family: str, seed: int) -> Node:
        return self.add("TinyConditioning", family=family, seed=seed)

    def latent(self, family: str, size: int = SIZE) -> Node:
        kind = LATENTS[family]
        frames = {"length": FRAMES} if kind.endswith("Video") else {}
        return self.add(kind, width=size, height=size, batch_size=1, **frames)

    def core_lora(self, model: Any, name: str, strength: float) -> Node:
        return self.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)

    def dump(self, source: Any, prefix: str, **options: Any) -> Node:
        return self.add("DumpWeights", source=source, prefix=prefix, **options)

    def sample(self, family: str, model: Any, seed: int = 0, steps: int = 1) -> Node:
        """A KSampler and something that saves its latent, to make it run."""
        latent = self.add(
            "KSampler",
            model=model,
            positive=self.conditioning(family, 100),
            negative=self.conditioning(family, 101),
            latent_image=self.latent(family),
            seed=seed,
            steps=steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )
        return self.add("SaveLatent", samples=latent, filename_prefix="host/sample")

    def first_sigmas(self, model: Any, steps: int) -> list[Any]:
        """The first steps of a 20-step schedule."""
        schedule = self.add("BasicScheduler", model=model, scheduler="simple", steps=20, denoise=1.0)
        return self.add("SplitSigmas", sigmas=schedule, step=steps).out(0)
