"""How a layer's base weight is stored: as numbers that a patch can be added to, or quantised."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def quantised_as(module: Any) -> str | None:
    """Name of the storage of a layer whose weight is quantised; None for float32, bfloat16 and float16.

    A patch on a quantised weight is rounded into its few bits. Recognised by what the weight is,
    not by who made it: a wrapped tensor, a dtype of one byte or no float at all, or a packed tensor
    that shows another shape than it stores.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    dtype = str(weight.dtype).removeprefix("torch.")
    if hasattr(weight, "__tensor_flatten__"):  # ComfyUI's QuantizedTensor, torchao
        name = getattr(module, "quant_format", None) or type(weight).__name__
        return f"{name} with convrot" if getattr(getattr(weight, "_params", None), "convrot", False) else str(name)
    if math.prod(weight.shape) != weight.numel():  # GGUF: the shape is the logical one
        return f"packed {dtype}"
    if weight.dtype.itemsize == 1 or not weight.dtype.is_floating_point:
        return dtype
    return None
