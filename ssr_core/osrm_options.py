"""What a start for training looks like: which layers of a model, and how they are written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from .errors import IncompatibleError
from .input_hooks import InputLayer, input_layers
from .targets import KeyTarget

LayerChoice = Literal["linear", "all", "attention"]
LAYER_CHOICES: tuple[LayerChoice, ...] = ("linear", "all", "attention")
_ATTENTION = re.compile(r"attn|attention")

InitStyle = Literal["comfy", "kohya"]
INIT_STYLES: tuple[InitStyle, ...] = ("comfy", "kohya")


@dataclass(frozen=True)
class InitOptions:
    """What the start looks like.

    Attributes:
        rank: Of every layer.
        alpha: Of every layer.
        layers: Which kinds of layers.
        only: Regular expression that the path of a layer has to contain.
        text_encoder: Whether layers of CLIP get a start too.
        energy: Share of the others' energy that is avoided.
        style: Names inside the file.
        dtype: Of the factors.
    """

    rank: int = 16
    alpha: float = 1.0
    layers: LayerChoice = "linear"
    only: str = ""
    text_encoder: bool = False
    energy: float = 1.0
    style: InitStyle = "comfy"
    dtype: torch.dtype = torch.float32

    def choose(self, key_map: Mapping[str, KeyTarget]) -> list[InputLayer]:
        """The layers of the connected model that get a start.

        Raises:
            IncompatibleError: None does, or `only` is no regular expression.
        """
        try:
            pattern = re.compile(self.only)
        except re.error as err:
            remedy = "write a part of a layer's path, like double_blocks, or leave it empty."
            raise IncompatibleError(f"only = {self.only!r} is no regular expression ({err}).", remedy=remedy) from err
        found = input_layers(key_map, "model") + (input_layers(key_map, "clip") if self.text_encoder else [])
        chosen = [one for one in found if self._takes(one) and pattern.search(one.target.module_path)]
        if not chosen:
            raise IncompatibleError(
                f"none of the model's {len(found)} layers is chosen.", remedy="change layers, or empty the field only."
            )
        return chosen

    def _takes(self, layer: InputLayer) -> bool:
        flat = all(size == 1 for size in layer.kernel)
        named = self.layers != "attention" or _ATTENTION.search(layer.target.module_path) is not None
        return named and (flat or self.layers == "all")
