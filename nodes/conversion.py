"""Dense changes of LoHa, LoKr, DoRA and the like, as ComfyUI itself computes them on the connected model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ssr_core import Adapter, DenseGroup, IncompatibleError
from ..ssr_core.classify import is_replacement, reads_weight
from ..ssr_core.spelling import split_key
from . import host

_COPIES = 6
"""Of a weight in float32, while its change is computed and factorised."""

NOT_ADDED = "connect the base model that this LoRA was trained for, or remove the LoRA."


class DenseChanges:
    """Computes the changes that one file makes to one MODEL and CLIP.

    Args:
        adapter: The file as it was read.
        tensors: Content of the file.
        owners: MODEL and CLIP by part; absent ones are missing.
        core_keys: The host's key maps by part.
        strengths: The LoRA's strengths by part; only changes that bend with the strength depend on it.
        device: Where to compute.
    """

    def __init__(
        self,
        adapter: Adapter,
        tensors: Mapping[str, Tensor],
        owners: Mapping[str, Any],
        core_keys: Mapping[str, Mapping[str, Any]],
        strengths: Mapping[str, float],
        device: torch.device,
    ) -> None:
        self._name, self._tensors, self._owners = adapter.name, tensors, owners
        self._loader_keys = {record.key: record.loader_key for record in adapter.records}
        self._core_keys, self._strengths, self._device = core_keys, strengths, device

    def __call__(self, group: DenseGroup) -> Tensor:
        """The change at strength 1; of a kind that bends, the change at this strength divided by it.

        Raises:
            IncompatibleError: The host cannot apply the keys, or the layer's weight cannot be read.
        """
        part = group.target.part
        key, patch = self._patch(group)
        host.make_room(_COPIES * 4 * math.prod(group.weight_shape), self._device)
        strength = self._strengths[part] if group.bends else 1.0
        try:
            change = host.change_of(patch, key, self._weight(group), strength)
        except ValueError as err:
            raise self._error(group, f"ComfyUI cannot apply it ({err})") from err
        return change / strength if strength != 1.0 else change

    def _patch(self, group: DenseGroup) -> tuple[Any, Any]:
        """The one patch that the host makes of the group's keys."""
        chosen = {self._loader_keys[key]: self._tensors[key] for key in group.keys}
        every = self._core_keys[group.target.part]
        bases = {spelled.base for spelled in map(split_key, chosen) if spelled is not None}
        core = {base: every[base] for base in bases}  # the loader walks all names that it is given
        try:
            patches = host.patches_of(chosen, core)
        except ValueError as err:
            raise self._error(group, str(err)) from err
        if len(patches) != 1:
            raise self._error(group, f"ComfyUI makes {len(patches)} patches of these keys")
        key, patch = next(iter(patches.items()))
        used = getattr(patch, "loaded_keys", None)
        unused = [] if used is None else [name for name in chosen if name not in used and not _shared(name)]
        if unused:
            raise self._error(group, f"ComfyUI does not use {unused[0]}")
        return key, patch

    def _weight(self, group: DenseGroup) -> Tensor:
        if not reads_weight(group.kind) and not is_replacement(group.kind):
            return torch.zeros(group.weight_shape, device=self._device)
        key = f"{group.target.module_path}.{group.parameter}"
        return host.current_weight(self._owners[group.target.part], key, self._device)

    def _error(self, group: DenseGroup, what: str) -> IncompatibleError:
        return IncompatibleError(
            f"{group.keys[0]} ({group.kind}): {what}.", file=self._name, layer=str(group.target), remedy=NOT_ADDED
        )


def _shared(name: str) -> bool:
    """Keys that the loader reads for any adapter, without listing them."""
    return name.endswith((".alpha", ".dora_scale"))
