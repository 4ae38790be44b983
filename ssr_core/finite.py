"""Whether a tensor is finite, at the price of reading it once; what to say of tokens that are not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .targets import Target


def all_finite(tensor: Tensor) -> bool:
    """Whether no value of a floating-point tensor (any shape) is NaN or infinite.

    The extremes keep NaN; `torch.isfinite` of every value makes several temporaries and takes far longer.
    """
    if tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def nonfinite_warnings(lost: Mapping[Target, int]) -> list[str]:
    """A sentence on tokens that were left out, by layer; none where nothing was."""
    bad = sum(lost.values())
    if not bad:
        return []
    worst = max(lost, key=lost.__getitem__)
    return [
        f"{bad} tokens were NaN or infinite and were left out, most of them in {worst}. "
        "Run the model in bfloat16 or float32."
    ]
