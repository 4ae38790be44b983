"""A merge made again, compared with the file of then."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .errors import FileError
from .files import read_safetensors


def largest_difference(one: Path, other: Path) -> float:
    """Largest relative difference (Frobenius) of the layers' changes in two merged files; 0: the same.

    Raises:
        FileError: They hold other tensors.
    """
    first, second = read_safetensors(one)[0], read_safetensors(other)[0]
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in second.items()}:
        raise FileError("the two files hold other tensors.", file=other.name, remedy="see what their reports say.")
    worst = 0.0
    for key in first:
        pair = _partner(key)
        if pair is None or pair not in first:
            if not key.endswith(_DOWNS):
                worst = max(worst, _distance(first[key].double(), second[key].double()))
            continue
        changes = [one[key].double().flatten(1) @ one[pair].double().flatten(1) for one in (first, second)]
        worst = max(worst, _distance(*changes))
    return worst


def rounding(path: Path) -> float:
    """Largest relative difference of two files that counts as the same merge.

    Two roundings of the coarsest dtype in the file, or 1e-4: passes and solve round in float32, in another order
    on other machines.
    """
    dtypes = {value.dtype for value in read_safetensors(path)[0].values() if value.is_floating_point()}
    return max([1e-4, *(2 * torch.finfo(dtype).eps for dtype in dtypes)])


_DOWNS = (".lora_down.weight", ".lora_A.weight")


def _partner(key: str) -> str | None:
    """The down that belongs to an up."""
    for up, down in zip((".lora_up.weight", ".lora_B.weight"), _DOWNS, strict=True):
        if key.endswith(up):
            return key.removesuffix(up) + down
    return None


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm().clamp_min(1e-300))
