"""Which rows of a layer's input are padding of the text, and how much they count."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PaddingMode = Literal["balance", "include", "exclude"]

TEXT_LAYER = re.compile(
    r"(^|[._])(txt|text|context|cap|caption|add|cross_attn|attn2|txtmlp|txtfusion|llm)([._]|$)|txt_"
)
"""Names by which the host's networks call the layers that read only text."""


JOINT_LAYER = re.compile(r"(^|\.)(single_blocks|layers)\.\d")
"""Names of layers that read text and image as one sequence, in the families where the order is known."""


@dataclass(frozen=True)
class TextRows:
    """What the host tells about the text tokens of one calibration pass.

    Attributes:
        real: (T,) bool, False where the prompt was padded.
        joint: Where the text stands in layers that read text and image as one sequence.
        everywhere: True if every layer reads text (a text encoder).
    """

    real: Tensor
    joint: Literal["first", "last", "unknown"] = "unknown"
    everywhere: bool = False


def token_weights(real: Tensor, mode: PaddingMode) -> Tensor | None:
    """Weight of each text token, (..., T) as `real`; None if all count 1.

    "balance" lets all padding together count at most as much as the real tokens: padding then
    cannot drown the prompt, and what flows through those rows is still calibrated.
    """
    real = real.bool()
    padding = int((~real).sum())
    if mode == "include" or padding == 0:
        return None
    share = 0.0 if mode == "exclude" else min(1.0, int(real.sum()) / padding)
    return torch.where(real, 1.0, share)


class RowWeights:
    """Turns what is known about one pass into weights for each layer's rows."""

    def __init__(self, rows: TextRows | None, mode: PaddingMode) -> None:
        self._rows = rows
        self._weights = None if rows is None else token_weights(rows.real, mode)
        self._on_device: dict[tuple[torch.device, tuple[int, ...], str], Tensor] = {}

    def __call__(self, path: str, leading: Sequence[int], device: torch.device) -> Tensor | None:
        """Weights of the rows of an input with leading shape `leading` (batch, sequence), flattened."""
        if self._weights is None or self._rows is None:
            return None
        pattern = self._pattern(path, leading)
        if pattern is None:
            return None
        key = (device, tuple(leading), pattern)
        if key not in self._on_device:
            self._on_device[key] = self._expand(pattern, leading).to(device)
        return self._on_device[key]

    def _pattern(self, path: str, leading: Sequence[int]) -> str | None:
        assert self._weights is not None and self._rows is not None
        length = self._weights.shape[-1]
        if self._rows.everywhere:
            fits = tuple(leading)[-self._weights.ndim :] == tuple(self._weights.shape)
            return "text" if fits else None
        if len(leading) != 2 or leading[1] < length:
            return None
        if leading[1] == length:
            return "text" if TEXT_LAYER.search(path) else None
        if TEXT_LAYER.search(path) or not JOINT_LAYER.search(path) or self._rows.joint == "unknown":
            return None
        return str(self._rows.joint)

    def _expand(self, pattern: str, leading: Sequence[int]) -> Tensor:
        assert self._weights is not None
        if self._rows is not None and self._rows.everywhere:
            return self._weights.expand(*leading).reshape(-1)
        rows = torch.ones(leading[1])
        length = self._weights.shape[0]
        if pattern == "last":
            rows[-length:] = self._weights
        else:
            rows[:length] = self._weights
        return rows.repeat(leading[0])
