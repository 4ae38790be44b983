"""What the host's arithmetic on one group of tensors would have to hold, from shapes alone.

A file of a few kilobytes can ask for an outer product of terabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .spelling import split_key


def largest_intermediate(tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> int:
    """Numbers in the largest tensor that the host would make of a group's tensors.

    Args:
        tensors: The group: key -> tensor.
        shape: Shape of the change, `(rows, in, *kernel)`.

    Returns:
        An upper bound for groups that fit the weight; at least the size of each tensor itself.
    """
    parts = {_part(key): value for key, value in tensors.items()}
    found = [value.numel() for value in tensors.values()]
    found += _products(parts)
    for name in ("a1", "a2"):  # GLoRA: the weight times each
        if name in parts:
            found.append(shape[0] * _columns(parts[name]) * math.prod(shape[2:]))
    if "oft_blocks" in parts and parts["oft_blocks"].ndim > 1:
        *blocks, n, m = parts["oft_blocks"].shape
        found.append(math.prod(blocks) * max(n, m) ** 2)
    for name in ("dora_scale", "rescale"):
        if name in parts:
            found.append(_broadcast(parts[name], shape))
    return max(found, default=0)


def kronecker_size(tensors: Mapping[str, Tensor]) -> int | None:
    """Number of values of a LoKr's Kronecker product; None where parts are missing or have no such shape."""
    parts = {_part(key): value for key, value in tensors.items()}
    total = 1
    for name in ("lokr_w1", "lokr_w2"):
        a, b = parts.get(f"{name}_a"), parts.get(f"{name}_b")
        core = parts.get("lokr_t2") if name == "lokr_w2" else None
        if name in parts:
            total *= parts[name].numel()
        elif a is None or b is None or a.ndim != 2 or b.ndim != 2:
            return None
        else:
            total *= _rows(a) * _columns(b) if core is None else _columns(a) * _columns(b) * math.prod(core.shape[2:])
    return total


def _part(key: str) -> str:
    """What a key is within its layer: its role for ordinary factors, else the end of its name."""
    spelled = split_key(key)
    if spelled is None:
        return key
    if spelled.role in ("up", "down", "mid"):
        return spelled.role
    return key[len(spelled.base) + 1 :].removesuffix(".weight")


def _products(parts: Mapping[str, Tensor]) -> Iterator[int]:
    """Sizes of the products of two factors, with a Tucker core between them if there is one."""
    pairs = [("up", "down", None), ("lokr_w1_a", "lokr_w1_b", None), ("lokr_w2_a", "lokr_w2_b", "lokr_t2")]
    pairs += [(f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2)]
    pairs += [("b1", "b2", None), ("b2", "b1", None)]  # GLoRA's two generations
    for first, second, core in pairs:
        if first not in parts or second not in parts:
            continue
        a, b = parts[first], parts[second]
        if core is None or core not in parts:
            yield _rows(a) * _columns(b)
        else:
            t = parts[core]
            kernel = math.prod(t.shape[2:])
            yield kernel * _columns(b) * max(_rows(t), _columns(a))
            yield kernel * _columns(a) * (t.shape[1] if t.ndim > 1 else 1)
    if "down" in parts and "mid" in parts:
        yield _rows(parts["mid"]) * math.prod(parts["mid"].shape[2:]) * _columns(parts["down"])


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 1


def _columns(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:])


def _broadcast(tensor: Tensor, shape: tuple[int, ...]) -> int:
    """Size of a tensor broadcast against a weight; 0 where the two do not go together."""
    try:
        return math.prod(torch.broadcast_shapes(tensor.shape, shape))
    except RuntimeError:
        return 0
