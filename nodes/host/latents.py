"""Latents, noise and sigmas of a calibration pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...ssr_core import IncompatibleError

SCHEDULERS: list[str] = list(comfy.samplers.SCHEDULER_NAMES)


def empty_latent(model: Any, width: int, height: int, frames: int) -> Tensor:
    """An empty latent of the right rank and channels for this model.

    Raises:
        IncompatibleError: The model's latents are no images or videos.
    """
    form = model.get_model_object("latent_format")
    if form.latent_dimensions not in (2, 3):
        raise IncompatibleError("this model's latents are no images.", remedy="connect a LATENT.")
    time = [max(1, (frames - 1) // form.temporal_downscale_ratio + 1)] if form.latent_dimensions == 3 else []
    space = [max(1, size // form.spacial_downscale_ratio) for size in (height, width)]
    return prepare_latent(model, {"samples": torch.zeros(1, form.latent_channels, *time, *space)})


def prepare_latent(model: Any, latent: Mapping[str, Any]) -> Tensor:
    """The samples of a LATENT, fixed for this model the way KSampler does it."""
    return comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    )


def shared_noise(latent: Tensor, seed: int) -> Tensor:
    """The noise that KSampler makes from this seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return comfy.sample.prepare_noise(latent, seed)


def step_sigmas(model: Any, scheduler: str, steps: int) -> Tensor:
    """Sigmas of a short sampling, (steps + 1,); the last one is not evaluated."""
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
