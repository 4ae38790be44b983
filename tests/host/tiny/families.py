"""Tiny random checkpoints, a few MB each, that the real UNETLoader accepts."""

from collections.abc import Callable
from pathlib import Path

import comfy.ops
import folder_paths
import torch
from safetensors.torch import save_file

from .flux_kin import FLUX_KIN
from .image_dits import IMAGE_DITS
from .recipe import Family, random_state
from .unets import UNETS
from .video_dits import VIDEO_DITS

FAMILIES: dict[str, Callable[[], Family]] = {**FLUX_KIN, **UNETS, **IMAGE_DITS, **VIDEO_DITS}


def write_missing() -> None:
    """Write every family's checkpoint that is not there yet."""
    folder = Path(folder_paths.models_dir, "diffusion_models")
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, recipe) in enumerate(FAMILIES.items()):
        path = folder / f"tiny_{name}.safetensors"
        family = recipe()
        if path.exists():
            continue
        with torch.no_grad():
            module = family.build(
                **family.config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
            )
            save_file(random_state(module, seed), path, metadata=family.metadata or None)
