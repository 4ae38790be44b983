"""Graphs and dense references around OSRM Init and OSRM Refit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .graphs import Node
from .merging import SEED, SIZE, MergeGraph
from .server import Result, Server

FAMILIES = ("flux", "sd15", "lumina2")
DOWN, UP = ".lora_down.weight", ".lora_up.weight"


def record(
    server: Server, family: str, text_seed: int, prefix: str, lora: tuple[str, float] | None = None, noise: int = SEED
) -> None:
    """Sample one step with core's nodes, on the base model or with one LoRA, and keep what every layer saw."""
    graph = MergeGraph(server)
    model = graph.checkpoint(family) if lora is None else graph.core_lora(graph.checkpoint(family), *lora)
    sampled = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=noise),
        guider=graph.add(
            "BasicGuider",
            model=graph.add("RecordInputs", model=model, prefix=prefix),
            conditioning=graph.conditioning(family, text_seed),
        ),
        sampler=graph.add("KSamplerSelect", sampler_name="euler"),
        sigmas=graph.first_sigmas(model, 1),
        latent_image=graph.latent(family),
    )
    graph.add("SaveLatent", samples=sampled, filename_prefix=f"host/{prefix}")
    server.run(graph.prompt).ok()


def init(graph: MergeGraph, family: str, text_seeds: tuple[int, ...], prefix: str, **options: object) -> Node:
    """OSRM Init against some conditionings."""
    model = graph.checkpoint(family)
    others = {f"others.other{i}": graph.conditioning(family, seed) for i, seed in enumerate(text_seeds)}
    values = {
        "model": model,
        "filename_prefix": prefix,
        "seed": SEED,
        "width": SIZE,
        "height": SIZE,
        "latent": graph.latent(family),
        "sigmas": graph.first_sigmas(model, 1),
        "layers": "all",
        "rank": 4,
    }
    return graph.pack("SSROSRMInit", {**values, **others, **options})


def init_file(result: Result, node: Node) -> Path:
    """The file that OSRM Init wrote."""
    return Path(result.text(node).splitlines()[0])


def downs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flattened float64 downs by the host's weight name, of a file with comfy names."""
    return {
        name.removesuffix(DOWN) + ".weight": value.double().flatten(1)
        for name, value in tensors.items()
        if name.endswith(DOWN)
    }


def deltas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Dense float64 changes, flattened, of a file with comfy names."""
    found = {}
    for name, down in downs(tensors).items():
        base = name.removesuffix(".weight")
        alpha = float(tensors.get(f"{base}.alpha", torch.tensor(float(len(down)))))
        found[name] = alpha / len(down) * tensors[base + UP].double().flatten(1) @ down
    return found


def train(graph: MergeGraph, family: str, text_seed: int, existing: object, prefix: str, steps: int) -> None:
    """Core's Train LoRA on one conditioning and a sampled latent, and core's SaveLoRA."""
    data = graph.add(
        "KSampler",
        model=graph.checkpoint(family),
        positive=graph.conditioning(family, text_seed + 50),
        negative=graph.conditioning(family, text_seed + 51),
        latent_image=graph.latent(family),
        seed=3,
        steps=1,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    trained = graph.add(
        "TrainLoraNode",
        model=graph.checkpoint(family),
        latents=data,
        positive=graph.conditioning(family, text_seed),
        batch_size=1,
        grad_accumulation_steps=1,
        steps=steps,
        learning_rate=0.001,
        rank=4,
        optimizer="AdamW",
        loss_function="MSE",
        seed=5,
        training_dtype="fp32",
        lora_dtype="fp32",
        quantized_backward=False,
        algorithm="LoRA",
        gradient_checkpointing=True,
        checkpoint_depth=1,
        offloading=False,
        existing_lora=existing,
        bucket_mode=False,
        bypass_mode=False,
    )
    graph.add("SaveLoRA", lora=trained, prefix=f"loras/{prefix}")


def trained_file(base: Path, prefix: str) -> dict[str, Tensor]:
    """Factors of what core's SaveLoRA wrote; biases and norms, which every training changes alike, left out."""
    (path,) = (base / "output" / "loras").glob(f"{prefix}_*.safetensors")
    kept = (DOWN, UP, ".alpha")
    return {name: value for name, value in load_file(path).items() if name.endswith(kept)}


def write_lora_file(base: Path, name: str, tensors: dict[str, Tensor]) -> str:
    """Put tensors into the loras folder."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, base / "models" / "loras" / name)
    return name
