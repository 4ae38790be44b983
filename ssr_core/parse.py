"""LoRA file -> Adapter: every key is read, refused with its name, or listed as unmatched."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from .adapters import Adapter, KeyRecord, LoRALayer
from .errors import IncompatibleError
from .spelling import Spelled, split_key
from .targets import KeyMap, KeyTarget, Target

MIN_MATCHED = 0.5
"""Below this share of matched layers a file is taken for a LoRA of another base model."""

_TEXT_ENCODER_PREFIXES = ("lora_te", "text_encoder", "text_encoders.", "lora_prior_te", "te1_", "te2_")
_STRIPPED_PREFIX = "base_model.model."


def read_adapter(tensors: Mapping[str, Tensor], key_map: KeyMap, *, name: str, fingerprint: str) -> Adapter:
    """Read a LoRA's tensors for the model that `key_map` describes.

    Args:
        tensors: Content of the file.
        key_map: Base names that the model understands.
        name: The LoRA's name in messages.
        fingerprint: sha256 of the file's content.

    Returns:
        The adapter; `records` has exactly one entry for each key of `tensors`.

    Raises:
        IncompatibleError: No or too few layers match the model, shapes differ, a value is not
            finite.
    """
    groups: dict[str, dict[str, Spelled]] = defaultdict(dict)
    records: dict[str, KeyRecord] = {}
    for key in tensors:
        spelled = split_key(key)
        if spelled is None:
            records[key] = KeyRecord(key, "unmatched", reason="not a tensor name of any known adapter format")
        else:
            groups[spelled.base][key] = spelled

    reader = _Reader(tensors, name)
    order = {base: i for i, base in enumerate(key_map)}
    matched = 0
    for base in sorted(groups, key=lambda b: order.get(_find(b, key_map) or "", -1)):
        found = _find(base, key_map)
        if found is None:
            records.update(_unmatched(groups[base], key_map))
        else:
            matched += any(spelled.role != "alpha" for spelled in groups[base].values())
            records.update(reader.read_group(groups[base], key_map[found]))
    _check_coverage(groups, matched, key_map, name)
    reader.mark_shadowed(records)
    return Adapter(name, fingerprint, reader.layers, reader.vectors, tuple(records[key] for key in tensors))


def _find(base: str, key_map: KeyMap) -> str | None:
    if base in key_map:
        return base
    stripped = base.removeprefix(_STRIPPED_PREFIX)
    return stripped if stripped in key_map else None


def _is_text_encoder(base: str) -> bool:
    return base.startswith(_TEXT_ENCODER_PREFIXES)


def _unmatched(group: Mapping[str, Spelled], key_map: KeyMap) -> dict[str, KeyRecord]:
    has_clip = any(entry.target.part == "clip" for entry in key_map.values())
    reason = "no layer of the connected model has this name"
    if not has_clip and any(_is_text_encoder(spelled.base) for spelled in group.values()):
        reason = "a text-encoder layer, and no CLIP is connected"
    return {key: KeyRecord(key, "unmatched", reason=reason) for key in group}


def _check_coverage(groups: Mapping[str, Mapping[str, Spelled]], matched: int, key_map: KeyMap, name: str) -> None:
    has_clip = any(entry.target.part == "clip" for entry in key_map.values())
    layers = [base for base, group in groups.items() if any(spelled.role != "alpha" for spelled in group.values())]
    counted = [base for base in layers if has_clip or not _is_text_encoder(base)]
    if matched >= max(1, MIN_MATCHED * len(counted)):
        return
    if not counted and layers:
        raise IncompatibleError("all its layers are text-encoder layers.", file=name, remedy="connect CLIP.")
    example = next((base for base in counted if _find(base, key_map) is None), "none")
    raise IncompatibleError(
        f"only {matched} of its {len(counted)} layers exist in the connected model (first unknown: {example}).",
        file=name,
        remedy="connect the base model that this LoRA was trained for, or remove the LoRA.",
    )


class _Reader:
    """Collects what the groups of one file hold."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        self.tensors, self.name = tensors, name
        self.layers: dict[Target, LoRALayer] = {}
        self.vectors: dict[tuple[Target, str], Tensor] = {}
        self._owner: dict[tuple[Target, str], list[str]] = {}
        self._shadowed: dict[str, str] = {}

    def read_group(self, group: Mapping[str, Spelled], entry: KeyTarget) -> dict[str, KeyRecord]:
        """Read the tensors of one base name."""
        roles = {spelled.role for spelled in group.values()}
        if roles == {"alpha"}:  # left over by a tool that pruned the factors; loaders pass over it
            return {key: KeyRecord(key, "unmatched", entry.target, "alpha without factors") for key in group}
        factors = {s.role: key for key, s in group.items() if s.role in ("up", "down", "mid")}
        reason = self._why_unsupported(group, roles, entry)
        if reason:
            return {key: KeyRecord(key, "unsupported", entry.target, reason) for key in group}
        records: dict[str, KeyRecord] = {}
        if factors:
            alpha = next((key for key, s in group.items() if s.role == "alpha"), None)
            keys = [*factors.values(), *([alpha] if alpha else [])]
            self._claim(entry.target, "weight", keys)
            self.layers[entry.target] = self._layer(factors, alpha, entry)
            records.update({key: KeyRecord(key, "low_rank", entry.target) for key in keys})
        for key, spelled in group.items():
            if spelled.role in ("diff", "w_norm", "diff_b", "b_norm"):
                records[key] = self._vector(key, spelled.role, entry)
        return records

    def mark_shadowed(self, records: dict[str, KeyRecord]) -> None:
        """Give the keys that a later alias of the same layer replaced their reason."""
        for key, winner in self._shadowed.items():
            target = records[key].target
            records[key] = KeyRecord(key, "shadowed", target, f"the same layer is also given as {winner}")

    def _why_unsupported(self, group: Mapping[str, Spelled], roles: set[str], entry: KeyTarget) -> str:
        kinds = sorted({s.spelling for s in group.values() if s.role == "unsupported"})
        spellings = sorted({s.spelling for s in group.values() if s.role in ("up", "down")})
        if kinds:
            return f"{'/'.join(kinds)} is not low-rank (up, down)"
        if "dora_scale" in roles:
            return "DoRA rescales the base weight; it is not low-rank"
        if "reshape_weight" in roles:
            return "it changes the shape of the weight"
        if "set_weight" in roles:
            return "it replaces the weight instead of changing it"
        if len(spellings) > 1:
            return f"the layer is given in several spellings ({', '.join(spellings)})"
        if ("up" in roles) != ("down" in roles) or ("mid" in roles and "up" not in roles):
            return "one of the factors up and down is missing"
        if "up" in roles and (entry.parameter != "weight" or len(entry.weight_shape) < 2):
            return f"the parameter {entry.parameter} of shape {entry.weight_shape} is no matrix"
        if "up" in roles and "diff" in roles:
            return "low-rank factors and a full difference of the same weight"
        if ("diff" in roles or "w_norm" in roles) and len(entry.weight_shape) > 1:
            return "a full difference of a matrix is not low-rank"
        return ""

    def _claim(self, target: Target, parameter: str, keys: list[str]) -> None:
        for old in self._owner.get((target, parameter), []):
            self._shadowed[old] = keys[0]
        self._owner[(target, parameter)] = keys

    def _value(self, key: str) -> Tensor:
        tensor = self.tensors[key]
        if not tensor.is_floating_point():
            raise IncompatibleError(f"{key} has the type {tensor.dtype}.", file=self.name)
        if tensor.element_size() == 1:
            tensor = tensor.to(torch.float32)
        if not bool(torch.isfinite(tensor).all()):
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

    def _layer(self, factors: Mapping[str, str], alpha_key: str | None, entry: KeyTarget) -> LoRALayer:
        up, down = self._value(factors["up"]), self._value(factors["down"])
        if "mid" in factors:
            down = _fold_mid(down, self._value(factors["mid"]), self.name, factors["mid"])
        alpha = None if alpha_key is None else self._alpha(alpha_key)
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

    def _vector(self, key: str, role: str, entry: KeyTarget) -> KeyRecord:
        bias = role in ("diff_b", "b_norm")
        parameter = "bias" if bias else entry.parameter
        expected = (entry.weight_shape[0],) if bias else entry.weight_shape
        if bias and entry.target.out_slice is not None:
            return KeyRecord(key, "unsupported", entry.target, "a bias of some rows of a fused module")
        value = self._value(key)
        if tuple(value.shape) != tuple(expected):
            raise IncompatibleError(
                f"{key} has the shape {tuple(value.shape)}, the model's {parameter} has {tuple(expected)}.",
                file=self.name,
                layer=str(entry.target),
            )
        if bias and entry.row_order is not None:
            value = value[list(entry.row_order)]
        self._claim(entry.target, parameter, [key])
        self.vectors[(entry.target, parameter)] = value
        return KeyRecord(key, "vector", entry.target)


def _fold_mid(down: Tensor, mid: Tensor, name: str, key: str) -> Tensor:
    """Fold a Tucker core into `down`: (r, in, 1, 1) and (r, r, *kernel) -> (r, in, *kernel)."""
    pointwise = down.ndim >= 2 and down.numel() == down.shape[0] * down.shape[1]
    if not pointwise or mid.ndim < 3 or tuple(mid.shape[:2]) != (down.shape[0], down.shape[0]):
        raise IncompatibleError(f"{key} {tuple(mid.shape)} does not fit its down {tuple(down.shape)}.", file=name)
    return torch.einsum("abk,bi->aik", mid.flatten(2), down.flatten(1)).reshape(*mid.shape[:1], -1, *mid.shape[2:])
