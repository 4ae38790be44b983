"""Whether a tensor is finite, at the price of reading it once."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no value of a floating-point tensor (any shape) is NaN or infinite.

    The extremes keep NaN; `torch.isfinite` of every value makes several temporaries and takes far longer.
    """
    if tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
