"""Pieces of a calibration file: triangles, sampled inputs and scenes, each with the checks for reading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .finite import all_finite
from .sampling import InputSample
from .scenes import Scene, SceneStats
from .triangles import packed_size


def read_triangles(prefix: str, tensors: Mapping[str, Tensor], count: int, size: int) -> tuple[Tensor, Tensor]:
    """(K, n (n + 1) / 2) Grams and their (K,) token counts.

    Raises:
        KeyError: One is missing.
        ValueError: One is damaged.
    """
    packed, tokens = tensors[prefix + "gram"], tensors[prefix + "tokens"].double()
    if packed.shape != (count, packed_size(size)) or packed.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Grams {prefix} have the shape {tuple(packed.shape)}")
    if not all_finite(packed):
        raise ValueError(f"Grams {prefix} are not finite")
    if tokens.shape != (count,) or not bool(torch.isfinite(tokens).all()) or bool((tokens < 0).any()):
        raise ValueError(f"token counts {prefix}")
    return packed, tokens


def read_counts(name: str, tensors: Mapping[str, Tensor], count: int) -> Tensor:
    """(K,) int64 numbers of tokens that were left out.

    Raises:
        KeyError: They are missing.
        ValueError: They are damaged.
    """
    found = tensors[name].long()
    if found.shape != (count,) or bool((found < 0).any()):
        raise ValueError(f"token counts {name}")
    return found


def sample_tensors(prefix: str, sample: InputSample) -> dict[str, Tensor]:
    """What is written of one sample."""
    found = {f"{prefix}.rows": sample.rows, f"{prefix}.weights": sample.weights}
    return found if sample.held is None else {**found, f"{prefix}.held": sample.held}


def read_sample(prefix: str, tensors: Mapping[str, Tensor]) -> InputSample:
    """One sample.

    Raises:
        KeyError: A tensor is missing.
        ValueError: One is damaged.
    """
    rows, weights = (tensors[f"{prefix}.{name}"] for name in ("rows", "weights"))
    fits = rows.ndim == 2 and rows.is_floating_point() and weights.shape == rows.shape[:1] and len(rows) > 0
    held = tensors.get(f"{prefix}.held")
    fits &= held is None or (held.shape == rows.shape[:1] and held.dtype == torch.bool)
    if not fits or not all_finite(rows) or not all_finite(weights) or not bool((weights > 0).all()):
        raise ValueError(f"sampled inputs {prefix}")
    return InputSample(rows, weights.double(), held)


def scene_tensors(index: int, module: int, scenes: SceneStats) -> dict[str, Tensor]:
    """What is written of the scenes of stack `index`; stacks of one module share the samples."""
    prefix = f"{index}.scene_"
    found = {f"{prefix}gram": scenes.packed, f"{prefix}tokens": scenes.tokens, f"{prefix}nonfinite": scenes.nonfinite}
    for number, sample in enumerate(scenes.samples or ()):
        found |= sample_tensors(f"{module}.scene.{number}", sample)
    return found


def read_scenes(stored: Sequence[Mapping[str, Any]], tasks: int) -> tuple[Scene, ...]:
    """The scenes of a file's header.

    Raises:
        ValueError: One names a LoRA that the calibration does not have.
    """
    scenes = tuple(Scene(str(one["prompt"]), tuple(int(task) for task in one["tasks"])) for one in stored)
    for scene in scenes:
        if sorted(set(scene.tasks)) != list(scene.tasks) or not all(0 <= task < tasks for task in scene.tasks):
            raise ValueError(f"scene {scene.tasks}")
    return scenes


def scene_stats(
    index: int, module: int | None, scenes: Sequence[Scene], members: Sequence[int], tensors: Mapping[str, Tensor]
) -> SceneStats:
    """What the scenes saw of stack `index`.

    Raises:
        KeyError: A tensor is missing.
        ValueError: One is damaged.
    """
    packed = tensors[f"{index}.scene_gram"]
    size = int((8 * packed.shape[-1] + 1) ** 0.5 - 1) // 2
    packed, tokens = read_triangles(f"{index}.scene_", tensors, len(scenes), size)
    nonfinite = read_counts(f"{index}.scene_nonfinite", tensors, len(scenes))
    active = torch.tensor([[task in scene.tasks for task in members] for scene in scenes])
    sampled = module is not None and f"{module}.scene.0.rows" in tensors
    samples = [read_sample(f"{module}.scene.{number}", tensors) for number in range(len(scenes))] if sampled else None
    return SceneStats(packed, tokens, nonfinite, active, None if samples is None else tuple(samples))
