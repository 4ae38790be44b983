"""The sampler of calibration passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def evaluate(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Tensor:
    """Euler steps of our own: exactly one model call a sigma, whatever samplers the user has."""
    ones = x.new_ones([x.shape[0]])
    denoised = x
    last = len(sigmas) - 2
    for i in range(last + 1):
        denoised = model(x, sigmas[i] * ones, **(extra_args or {}))
        if callback is not None:
            callback({"i": i, "x": x, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        if i < last:
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return denoised
