"""The tensors of one layer of a LoRA file -> factors, vectors, or a group that has to be converted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .adapters import DenseGroup, KeyRecord, KeyStatus, LoRALayer
from .classify import bends, fate_of
from .errors import IncompatibleError
from .finite import all_finite
from .intermediates import kronecker_size, largest_intermediate
from .spelling import Spelled
from .targets import KeyTarget, Target

_ROOM = 4
"""Of a weight: what the host may hold at once while it makes a change of it."""

_BIAS_ROLES = frozenset({"diff_b", "b_norm", "lora_bias"})


class LayerReader:
    """Collects what the groups of one file hold.

    Args:
        tensors: Content of the file.
        name: The LoRA's name in messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        self.tensors, self.name = tensors, name
        self.layers: dict[Target, LoRALayer] = {}
        self.dense: dict[tuple[Target, str], DenseGroup] = {}
        self.untapped: set[Target] = set()
        self._vectors: dict[tuple[Target, str], tuple[Tensor, int]] = {}
        self._owner: dict[tuple[Target, str], list[str]] = {}
        self._shadowed: dict[str, str] = {}

    def read_group(self, group: Mapping[str, Spelled], entry: KeyTarget, name: str) -> dict[str, KeyRecord]:
        """Read the tensors of one base name; one record for each.

        Args:
            group: The file's keys of this base name.
            entry: What it stands for.
            name: The host's name for it.
        """
        weight = {key: s for key, s in group.items() if s.role not in _BIAS_ROLES}
        if entry.ignored:
            records = {key: KeyRecord(key, "unmatched", entry.target, entry.ignored) for key in weight}
        else:
            records = self._weight(weight, entry) if weight else {}
        for key, spelled in group.items():
            if spelled.role in _BIAS_ROLES:
                records[key] = self._bias(key, spelled.role, weight, entry)
        return {key: replace(record, loader_key=name + key[len(group[key].base) :]) for key, record in records.items()}

    def mark_shadowed(self, records: dict[str, KeyRecord]) -> None:
        """Give the keys that a later alias of the same layer replaced their reason."""
        for key, winner in self._shadowed.items():
            target = records[key].target
            reason = f"the same layer is also given as {winner}"
            records[key] = KeyRecord(key, "shadowed", target, reason, records[key].loader_key)

    def vectors(self) -> dict[tuple[Target, str], Tensor]:
        """Changes of whole parameters: those of some rows are padded with zeros and added."""
        total: dict[tuple[Target, str], Tensor] = {}
        for (target, name), (value, rows) in self._vectors.items():
            parameter = "bias" if name == "lora_bias" else name
            if target.out_slice is not None and parameter == "bias":
                start, length = target.out_slice
                padded = value.new_zeros(rows)
                padded[start : start + length] = value
                target, value = Target(target.module_path, None, target.part), padded
            key = (target, parameter)
            total[key] = total[key] + value if key in total else value
        return total

    def _weight(self, group: Mapping[str, Spelled], entry: KeyTarget) -> dict[str, KeyRecord]:
        fate = fate_of(group, entry, self.tensors)
        target = entry.target
        status: KeyStatus
        if fate.form in ("unmatched", "unsupported"):
            if fate.form == "unsupported":
                self._claim(target, entry.parameter, list(group))
            status = "unmatched" if fate.form == "unmatched" else "unsupported"
            return {key: KeyRecord(key, status, target, fate.detail) for key in group}
        records = {
            key: KeyRecord(key, "unmatched", target, "an alpha has no meaning here")
            for key, s in group.items()
            if s.role == "alpha" and fate.form in ("vector", "difference")
        }
        used = [key for key in group if key not in records]
        self._claim(target, entry.parameter, used)
        if not entry.tapped:
            self.untapped.add(target)
        if fate.form == "factors":
            self.layers[target] = self._layer(group, entry)
            status, reason = "low_rank", ""
        elif fate.form == "vector":
            self._vectors[(target, entry.parameter)] = (self._whole(used[0], entry), entry.weight_shape[0])
            status, reason = "vector", ""
        else:
            self.dense[(target, entry.parameter)] = self._dense(used, fate.detail, entry)
            status, reason = "unsupported", f"{fate.detail} is not low-rank (up, down)"
        records.update({key: KeyRecord(key, status, target, reason) for key in used})
        return records

    def _claim(self, target: Target, parameter: str, keys: list[str]) -> None:
        """The later name of a layer wins, as in the host."""
        for old in self._owner.get((target, parameter), []):
            self._shadowed[old] = keys[0]
        self._owner[(target, parameter)] = keys
        if parameter == "weight":
            self.layers.pop(target, None)
        self.dense.pop((target, parameter), None)
        self._vectors.pop((target, parameter), None)

    def _value(self, key: str) -> Tensor:
        tensor = self.tensors[key]
        if not tensor.is_floating_point():
            raise IncompatibleError(f"{key} has the type {tensor.dtype}.", file=self.name)
        if tensor.element_size() == 1:
            tensor = tensor.to(torch.float32)
        if not all_finite(tensor):
            raise IncompatibleError(
                f"{key} holds NaN or infinite values.", file=self.name, remedy="export the LoRA again."
            )
        return tensor

    def _alpha(self, key: str) -> float:
        tensor = self.tensors[key]
        real = tensor.numel() == 1 and not tensor.is_complex()
        value = float(tensor.reshape(-1)[0]) if real else math.nan
        if not math.isfinite(value):
            raise IncompatibleError(f"{key} is not one finite number.", file=self.name)
        return value

    def _dense(self, keys: list[str], kind: str, entry: KeyTarget) -> DenseGroup:
        """Check that nothing absurd reaches the host's arithmetic."""
        values = {}
        for key in keys:
            if key.endswith(".alpha"):
                self._alpha(key)
            else:
                values[key] = self._value(key)
        size = math.prod(entry.weight_shape)
        shape = (entry.out_features, *entry.weight_shape[1:])
        made = kronecker_size(values) if kind.startswith("LoKr") else None
        needed = largest_intermediate(values, shape)
        allowed = max(_ROOM * size, entry.out_features**2 if "OFT" in kind else 0)  # rotations of all rows
        if needed > allowed or (made is not None and made != math.prod(shape)):
            raise IncompatibleError(
                f"{keys[0]} and its partners make {made or needed} values, the weight has {size}.",
                file=self.name,
                layer=str(entry.target),
                remedy="connect the base model that this LoRA was trained for.",
            )
        is_map = entry.is_map and entry.tapped
        return DenseGroup(entry.target, entry.parameter, tuple(keys), kind, entry.weight_shape, is_map, bends(kind))

    def _layer(self, group: Mapping[str, Spelled], entry: KeyTarget) -> LoRALayer:
        factors = {s.role: key for key, s in group.items()}
        up, down = self._value(factors["up"]), self._value(factors["down"])
        if "mid" in factors:
            down = _fold_mid(down, self._value(factors["mid"]), entry.in_features, self.name, factors["mid"])
        alpha = self._alpha(factors["alpha"]) if "alpha" in factors else None
        shapes = tuple(up.shape), tuple(down.shape)
        if up.ndim > 1 and down.ndim > 1:
            up, down = up.flatten(1), down.flatten(1)
        rank = down.shape[0] if down.ndim else 0
        if rank == 0 or up.shape != (entry.out_features, rank) or down.shape != (rank, entry.in_features):
            raise IncompatibleError(
                f"up {shapes[0]} and down {shapes[1]} do not fit a weight with "
                f"{entry.out_features} rows and {entry.in_features} columns.",
                file=self.name,
                layer=str(entry.target),
                remedy="connect the base model that this LoRA was trained for.",
            )
        if entry.row_order is not None:
            up = up[list(entry.row_order)]
        return LoRALayer(down, up, alpha, entry.kernel)

    def _whole(self, key: str, entry: KeyTarget) -> Tensor:
        """A difference of a parameter that is no matrix."""
        value = self._value(key)
        rows = entry.weight_shape[0] if entry.target.out_slice is None else entry.target.out_slice[1]
        self._check_shape(key, value, (rows, *entry.weight_shape[1:]), entry.parameter, entry.target)
        return value if entry.row_order is None else value[list(entry.row_order)]

    def _bias(self, key: str, role: str, weight: Mapping[str, Spelled], entry: KeyTarget) -> KeyRecord:
        value = self._value(key)
        if role == "lora_bias":  # peft: the bias of lora_B, scaled like its output
            layer = self.layers.get(entry.target)
            if layer is None or not any(s.role == "up" for s in weight.values()):
                return KeyRecord(key, "unsupported", entry.target, "a bias of lora_B without plain factors")
            value = value * layer.scale
        self._check_shape(key, value, (entry.out_features,), "bias", entry.target)
        if entry.row_order is not None:
            value = value[list(entry.row_order)]
        parameter = role if role == "lora_bias" else "bias"  # both may be there, and add up
        self._claim(entry.target, parameter, [key])
        self._vectors[(entry.target, parameter)] = (value, entry.weight_shape[0])
        return KeyRecord(key, "vector", entry.target)

    def _check_shape(self, key: str, value: Tensor, expected: tuple[int, ...], parameter: str, target: Target) -> None:
        if tuple(value.shape) != expected:
            raise IncompatibleError(
                f"{key} has the shape {tuple(value.shape)}, the model's {parameter} has {expected}.",
                file=self.name,
                layer=str(target),
            )


def _fold_mid(down: Tensor, mid: Tensor, width: int, name: str, key: str) -> Tensor:
    """Fold a Tucker core into `down`: (r, in, 1, 1) and (r, r, *kernel) -> (r, in, *kernel), `width` a row."""
    pointwise = down.ndim >= 2 and down.numel() == down.shape[0] * down.shape[1]
    square = mid.ndim >= 3 and tuple(mid.shape[:2]) == (down.shape[0], down.shape[0]) if pointwise else False
    if not square or down.shape[0] == 0 or down.shape[1] * math.prod(mid.shape[2:]) != width:
        raise IncompatibleError(f"{key} {tuple(mid.shape)} does not fit its down {tuple(down.shape)}.", file=name)
    dtype = torch.promote_types(down.dtype, mid.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    folded = torch.einsum("abk,bi->aik", mid.to(wide).flatten(2), down.to(wide).flatten(1)).to(dtype)
    if not bool(torch.isfinite(folded).all()):
        raise IncompatibleError(f"{key} times its down does not fit into {dtype}.", file=name)
    return folded.reshape(down.shape[0], down.shape[1], *mid.shape[2:])
