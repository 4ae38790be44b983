"""What is measured: about forty minutes on a quiet CPU core, seconds with `toy`; FLUX.1's dimensions on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .arithmetic import Cell
from .model import Shape

VIDEO_BUDGET = 64 << 20
"""Bytes that calibration may add to a bare pass in the 30k-token case."""

PAPER_SECONDS = {3: 9.5, 5: 16.3, 7: 25.5, 9: 34.3}
"""SSR's merge times on an A100, all FLUX blocks, rank 32 (the paper's table), by K."""

LEFT_OUT = (
    "Left out for time: every K with every r at d = 3072 (the cells here bracket R = 32 to 288), 4608 tokens at "
    "d = 3072, K = 9 at 4608 tokens. The models have one joint block (twelve linear layers): a second one adds "
    "the same to both sides of every ratio."
)


@dataclass(frozen=True)
class Grid:
    """Everything that one run measures.

    Attributes:
        cells: Configurations of calibration and merge.
        video: The 30k-token case.
        widths: d of the solve's square layers.
        counts: K of the solve.
        ranks: r of the solve.
        layers: Layers solved together.
        storage: Configurations whose calibration and LoRA are written and read.
        dtype: Of weights and activations.
    """

    cells: Sequence[Cell]
    video: Cell
    widths: Sequence[int]
    counts: Sequence[int]
    ranks: Sequence[int]
    layers: int
    storage: Sequence[Cell]
    dtype: torch.dtype


def _image(d: int, tokens: int, blocks: int = 1) -> Shape:
    """An eighth of the tokens is text."""
    return Shape(d, blocks, 0, tokens - tokens // 8, tokens // 8)


def _video(d: int, tokens: int, frames: int) -> Shape:
    """No text stream; attention within frames, which leaves out most of the base's own work."""
    return Shape(d, 1, 0, tokens, 0, frames)


def cpu() -> Grid:
    """The CPU's grid."""
    small = [
        Cell(_image(1024, 1024), count, rank, 5, True, (count, rank) in ((2, 16), (2, 128), (4, 32), (9, 32)))
        for count in (2, 4, 9)
        for rank in (16, 32, 128)
    ]
    large = [
        Cell(_image(1024, 4608), 4, 32, 3),
        Cell(_image(3072, 1024), 2, 16, 3, True, True),
        Cell(_image(3072, 1024), 4, 32, 3, True, True),
        Cell(_image(3072, 1024), 2, 128, 3),
        Cell(_image(3072, 1024), 9, 32, 3),
    ]
    return Grid(
        [*small, *large],
        Cell(_video(1024, 30720, 30), 4, 32, 1, False, True),
        (1024, 3072),
        (2, 4, 9),
        (16, 32, 64, 128),
        12,
        [Cell(_image(1024, 128), 4, 32, 5), Cell(_image(1024, 128), 4, 128, 5)],
        torch.float32,
    )


def toy() -> Grid:
    """The same code at a size that only shows that it runs."""
    return Grid(
        [Cell(_image(64, 64), 2, 4, 2, True, True), Cell(_image(32, 32, 2), 3, 2, 2, True, False)],
        Cell(_video(32, 512, 4), 2, 4, 1, False, True),
        (32,),
        (2, 3),
        (2, 4),
        2,
        [Cell(_image(32, 32), 2, 4, 2)],
        torch.float32,
    )


def cuda() -> Grid:
    """FLUX.1's dimensions and depth, at 1024 x 1024 pixels: 4096 image and 512 text tokens, bfloat16."""
    flux = Shape(3072, 19, 38, 4096, 512)
    return Grid(
        [Cell(flux, count, 32, 3, count in (3, 9), count in (3, 9)) for count in PAPER_SECONDS],
        Cell(_video(3072, 30720, 30), 4, 32, 3, False, True),
        (3072,),
        (2, 4, 9),
        (16, 32, 64, 128),
        64,
        [Cell(_image(1024, 128), 4, 32, 5)],
        torch.bfloat16,
    )
