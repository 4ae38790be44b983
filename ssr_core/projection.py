"""A low-rank change of one layer in its forward pass: project the input, add to the output.

    z = down x,   output[rows] += up z

for linear layers and convolutions alike. float16 activations are projected in float32: a row of
`down` may sum past 65504 where the layer itself does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .errors import IncompatibleError

_CHUNK = 8192
_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}

Kernel = tuple[int, ...]
"""Spatial size of a convolution's kernel; empty for a linear layer."""


def compute_dtype(activations: torch.dtype) -> torch.dtype:
    """Dtype of factors that multiply activations of this dtype."""
    return torch.float32 if activations == torch.float16 else activations


def project(module: nn.Module, x: Tensor, down: Tensor, kernel: Kernel, path: str) -> Tensor:
    """The input in the rows of down: z = down x.

    Args:
        module: The layer; a convolution lends its stride, padding and dilation.
        x: (..., in), or (B, in, *space) for a convolution, whose batch dimension may be missing.
        down: (R, in * prod(kernel)), in `compute_dtype(x.dtype)`.
        kernel: Of the layer.
        path: Of the layer, for errors.

    Returns:
        (..., R), or (B, R, *positions).

    Raises:
        IncompatibleError: The layer reads another width, or is a grouped convolution.
    """
    if kernel:
        return _convolve(module, x if x.ndim == len(kernel) + 2 else x[None], down, kernel, path)
    if x.shape[-1] != down.shape[1]:
        raise IncompatibleError(f"the layer reads {x.shape[-1]} inputs, the LoRA {down.shape[1]}.", layer=path)
    if x.dtype == down.dtype:
        return functional.linear(x, down)
    chunks = x.reshape(-1, x.shape[-1]).split(_CHUNK)
    return torch.cat([functional.linear(c.to(down.dtype), down) for c in chunks]).reshape(*x.shape[:-1], down.shape[0])


def columns(z: Tensor, which: slice, kernel: Kernel) -> Tensor:
    """Some of the R columns of z."""
    return z[:, which] if kernel else z[..., which]


def add(output: Tensor, z: Tensor, up: Tensor, rows: tuple[int, int] | None, kernel: Kernel, path: str) -> None:
    """output[rows] += up z, in place: the output of a layer is nobody else's yet.

    Args:
        output: What the layer gave, (..., out) or (B, out, *positions).
        z: From `project`.
        up: (rows, R).
        rows: (start, length), or None for all.
        kernel: Of the layer.
        path: Of the layer, for errors.

    Raises:
        IncompatibleError: A convolution that gives other positions than its own parameters say.
    """
    if kernel:
        _add_convolution(output if output.ndim == len(kernel) + 2 else output[None], z, up, rows, path)
        return
    if output.is_contiguous() and output.dtype == up.dtype:
        flat = output.view(-1, output.shape[-1])
        flat = flat if rows is None else flat.narrow(1, *rows)
        flat.addmm_(z.reshape(flat.shape[0], z.shape[-1]), up.T)
        return
    part = output if rows is None else output.narrow(-1, *rows)
    part.add_(functional.linear(z, up).to(output.dtype))


def _add_convolution(output: Tensor, z: Tensor, up: Tensor, rows: tuple[int, int] | None, path: str) -> None:
    if output.shape[2:] != z.shape[2:]:
        raise IncompatibleError(
            f"this convolution pads its input in a way of its own ({tuple(z.shape[2:])} positions, "
            f"not {tuple(output.shape[2:])}).",
            layer=path,
            remedy="leave this layer out of the LoRAs.",
        )
    added = torch.einsum("or,brn->bon", up, z.flatten(2)).reshape(z.shape[0], -1, *z.shape[2:])
    part = output if rows is None else output.narrow(1, *rows)
    part.add_(added.to(output.dtype))


def _convolve(module: nn.Module, x: Tensor, down: Tensor, kernel: Kernel, path: str) -> Tensor:
    conv: Any = module
    if getattr(conv, "groups", 1) != 1:
        raise IncompatibleError("a grouped convolution cannot be routed.", layer=path)
    weight = down.reshape(down.shape[0], down.shape[1] // math.prod(kernel), *kernel)
    if x.shape[1] != weight.shape[1]:
        raise IncompatibleError(f"the layer reads {x.shape[1]} channels, the LoRA {weight.shape[1]}.", layer=path)
    padding = conv.padding
    x = x.to(down.dtype)
    if getattr(conv, "padding_mode", "zeros") != "zeros":
        x = functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    result: Tensor = _CONVOLUTIONS[len(kernel)](x, weight, stride=conv.stride, padding=padding, dilation=conv.dilation)
    return result


def patches(module: nn.Module, x: Tensor, kernel: Kernel, path: str) -> Iterator[Tensor]:
    """What each output position of a convolution reads, some positions at a time.

    Args:
        module: The convolution; it lends its stride, padding and dilation.
        x: (B, in, *space), or without the batch dimension.
        kernel: Of the layer.
        path: Of the layer, for errors.

    Yields:
        (B, T, in * prod(kernel)) views or copies, in the order of `down`'s columns.

    Raises:
        IncompatibleError: A grouped convolution.
    """
    conv: Any = module
    if getattr(conv, "groups", 1) != 1:
        raise IncompatibleError("a grouped convolution cannot be routed.", layer=path)
    x = x if x.ndim == len(kernel) + 2 else x[None]
    padding = conv.padding
    pads = (
        list(conv._reversed_padding_repeated_twice)
        if isinstance(padding, str)
        else [p for p in reversed(padding) for _ in range(2)]
    )
    mode = getattr(conv, "padding_mode", "zeros")
    x = functional.pad(x, pads, mode="constant" if mode == "zeros" else mode)
    for axis, (size, stride, step) in enumerate(zip(kernel, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + axis, step * (size - 1) + 1, stride)[..., ::step]
    n = len(kernel)
    x = x.permute(0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))
    positions = x.shape[0] * math.prod(x.shape[2 : 1 + n])
    for part in x.split(max(1, _CHUNK // positions), dim=1):
        yield part.reshape(x.shape[0], -1, math.prod(x.shape[1 + n :]))
