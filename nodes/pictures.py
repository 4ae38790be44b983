"""Drawn pages -> ComfyUI's IMAGE, and the input that chooses their colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..ssr_core.plots import THEMES


def image_batch(pages: Sequence[Image.Image]) -> Tensor:
    """(B, H, W, 3) float32 from 0 to 1; the pages have one size."""
    return torch.stack([torch.from_numpy(numpy.array(page.convert("RGB"))) for page in pages]).to(torch.float32) / 255


def theme_input() -> io.Combo.Input:
    """Light or dark."""
    return io.Combo.Input(
        "theme",
        options=list(THEMES),
        default="dark",
        tooltip="Background of the pictures: dark fits ComfyUI's default look, light is better for documents.",
    )
