"""Random tensors of each kind of adapter for one layer, and the dense change that they mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..dialects import Dialect
from ..loras import ALPHAS, RANKS, dense, factors
from . import formulas

Made = tuple[dict[str, Tensor], Tensor]
"""Tensors by suffix, and the change of the layer's rows in the weight's own row order, float64."""


@dataclass(frozen=True)
class Layer:
    """One entry of a file that is being written.

    Attributes:
        weight: The base weight's rows of this entry, float64.
        number: Position in the file; ranks, alphas and variants alternate with it.
        swapped: The file's rows are the second half of the weight's before the first.
    """

    weight: Tensor
    number: int
    dialect: Dialect
    generator: torch.Generator
    swapped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    @property
    def rank(self) -> int:
        return RANKS[self.number % 3]

    @property
    def alpha(self) -> float:
        return ALPHAS[self.number % 3]

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=self.generator)

    def placed(self, delta: Tensor) -> Tensor:
        """A change in the file's row order, in the weight's."""
        if not self.swapped:
            return delta
        first, second = delta.chunk(2)
        return torch.cat([second, first])


def lora(layer: Layer) -> Made:
    up, down = factors(layer.shape, layer.rank, layer.generator)
    alpha = layer.alpha if layer.dialect.alpha else None
    tensors = {layer.dialect.up: up, layer.dialect.down: down}
    if alpha is not None:
        tensors[".alpha"] = torch.tensor(alpha)
    return tensors, layer.placed(dense(up, down, alpha).reshape(layer.shape))


def tucker(layer: Layer) -> Made:
    """A core of the kernel's size between two pointwise factors; other layers are plain."""
    if not _is_conv2d(layer):
        return lora(layer)
    out, width, *kernel = layer.shape
    rank, ones = layer.rank, [1] * len(kernel)
    up = layer.random(out, rank, *ones, scale=0.3)
    down = layer.random(rank, width, *ones, scale=width**-0.5)
    mid = layer.random(rank, rank, *kernel, scale=rank**-0.5)
    tensors = {".lora_up.weight": up, ".lora_down.weight": down, ".lora_mid.weight": mid}
    delta = formulas.tucker(mid.double(), up.double(), down.double())
    return {**tensors, ".alpha": torch.tensor(layer.alpha)}, layer.placed(layer.alpha / rank * delta)


def loha(layer: Layer) -> Made:
    """The product, element by element, of two low-rank matrices; on spatial kernels of two Tucker forms."""
    out, width, *_ = layer.shape
    rank, tensors, product = layer.rank, {}, torch.ones(layer.shape, dtype=torch.float64)
    for side in ("w1", "w2"):
        if _is_conv2d(layer):
            core = layer.random(rank, rank, *layer.kernel, scale=rank**-0.5)
            a, b = layer.random(rank, out, scale=0.5), layer.random(rank, width, scale=0.5)
            tensors[f".hada_t{side[1]}"] = core
            product *= formulas.lycoris_tucker(core.double(), a.double(), b.double())
        else:
            a = layer.random(out, rank, scale=0.5)
            b = layer.random(rank, prod(layer.shape[1:]), scale=0.5)
            product *= formulas.low_rank(a.double(), b.double(), layer.shape)
        tensors |= {f".hada_{side}_a": a, f".hada_{side}_b": b}
    return {**tensors, ".alpha": torch.tensor(layer.alpha)}, layer.placed(layer.alpha / rank * product)


def lokr(layer: Layer) -> Made:
    """A Kronecker product; by turns both factors whole, one low-rank, both low-rank.

    Alpha counts only where a factor is low-rank. ComfyUI cannot apply whole factors to three-dimensional
    kernels, so those get flat ones.
    """
    out, width, *kernel = layer.shape
    small_out, small_in = _divisor(out), _divisor(width)
    big_out, big_in, rank, variant = out // small_out, width // small_in, layer.rank, layer.number % 3
    scale = 1.0
    if variant == 2:
        a, b = layer.random(small_out, rank, scale=0.3), layer.random(rank, small_in, scale=0.3)
        tensors, small = {".lokr_w1_a": a, ".lokr_w1_b": b}, a.double() @ b.double()
        scale = layer.alpha / rank
    else:
        small = layer.random(small_out, small_in, scale=0.3)
        tensors, small = {".lokr_w1": small}, small.double()
    if variant == 0 and len(kernel) < 3:
        large = layer.random(big_out, big_in, *kernel, scale=0.1)
        tensors, large = {**tensors, ".lokr_w2": large}, large.double()
    else:
        a, b = layer.random(big_out, rank, scale=0.3), layer.random(rank, big_in * prod(kernel), scale=0.3)
        tensors |= {".lokr_w2_a": a, ".lokr_w2_b": b}
        large = (a.double() @ b.double()).reshape(big_out, big_in, *kernel)
        scale = layer.alpha / rank
    delta = scale * formulas.kronecker(small, large, layer.shape)
    return {**tensors, ".alpha": torch.tensor(layer.alpha)}, layer.placed(delta)


def lokr_tucker(layer: Layer) -> Made:
    """LoKr whose large factor is a Tucker form of the kernel; other layers are plain LoKr."""
    if not _is_conv2d(layer):
        return lokr(layer)
    out, width, *kernel = layer.shape
    small_out, small_in, rank = _divisor(out), _divisor(width), layer.rank
    small = layer.random(small_out, small_in, scale=0.3)
    core = layer.random(rank, rank, *kernel, scale=0.3)
    a, b = layer.random(rank, out // small_out, scale=0.5), layer.random(rank, width // small_in, scale=0.5)
    large = formulas.lycoris_tucker(core.double(), a.double(), b.double())
    delta = layer.alpha / rank * formulas.kronecker(small.double(), large, layer.shape)
    tensors = {".lokr_w1": small, ".lokr_t2": core, ".lokr_w2_a": a, ".lokr_w2_b": b}
    return {**tensors, ".alpha": torch.tensor(layer.alpha)}, layer.placed(delta)


def glora(layer: Layer) -> Made:
    """By turns in the present layout and, for linear layers, in that of the first LyCORIS versions."""
    out, width, *kernel = layer.shape
    rank, ones = layer.rank, [1] * len(kernel)
    a1, a2 = layer.random(width, rank, scale=0.3), layer.random(rank, width, scale=width**-0.5)
    b1, b2 = layer.random(out, rank, scale=0.1), layer.random(rank, prod(layer.shape[1:]), scale=width**-0.5)
    delta = formulas.glora(layer.weight, a1.double(), a2.double(), b1.double(), b2.double())
    if not kernel and layer.number % 4 == 3:
        stored = {"a1": a2, "a2": a1, "b1": b2, "b2": b1}
    else:
        stored = {"a1": a1.reshape(width, rank, *ones), "a2": a2.reshape(rank, width, *ones)}
        stored |= {"b1": b1.reshape(out, rank, *ones), "b2": b2.reshape(rank, width, *kernel)}
    tensors = {f".{name}.weight": value.contiguous() for name, value in stored.items()}
    return {**tensors, ".alpha": torch.tensor(layer.alpha)}, layer.placed(layer.alpha / rank * delta)


_CONSTRAINTS = (0.0, 0.05, 100.0)


def oft(layer: Layer) -> Made:
    """Alpha is the constraint; a file may lack it. Rows that do not divide into blocks get a plain LoRA."""
    size = _divisor(layer.shape[0], 16)
    if size < 2:
        return lora(layer)
    blocks = layer.random(layer.shape[0] // size, size, size, scale=0.1)
    constraint = _CONSTRAINTS[layer.number % 3]
    tensors = {".oft_blocks": blocks}
    if constraint:
        tensors[".alpha"] = torch.tensor(constraint)
    return tensors, layer.placed(formulas.oft(layer.weight, blocks.double(), constraint))


def boft(layer: Layer) -> Made:
    """Blocks of four in three stages, which is what 16 rows divide into; other layers get a plain LoRA.

    ComfyUI fails on files without alpha, so every layer has one.
    """
    out, size, stages = layer.shape[0], 4, 3
    if out % (size << (stages - 1)):
        return lora(layer)
    blocks = layer.random(stages, out // size, size, size, scale=0.1)
    constraint = _CONSTRAINTS[layer.number % 3]
    tensors, rescale = {".oft_blocks": blocks, ".alpha": torch.tensor(constraint)}, None
    if layer.number % 2:
        rescale = 1 + layer.random(out, *[1] * (len(layer.shape) - 1), scale=0.1)
        tensors[".rescale"] = rescale
    delta = formulas.boft(layer.weight, blocks.double(), constraint, None if rescale is None else rescale.double())
    return tensors, layer.placed(delta)


def diff(layer: Layer) -> Made:
    change = layer.random(*layer.shape, scale=0.1 * prod(layer.shape[1:]) ** -0.5)
    return {".diff": change}, layer.placed(change.double())


def dora(layer: Layer) -> Made:
    """By turns a magnitude for each row and one for each input channel."""
    tensors, delta = lora(layer)
    by_rows = layer.number % 2 == 0 or layer.shape[0] == 1
    flat = layer.weight if by_rows else layer.weight.transpose(0, 1)
    norms = flat.flatten(1).norm(dim=1)
    magnitude = (norms * (1 + 0.2 * layer.random(len(norms)).double())).float()
    ones = [1] * (len(layer.shape) - 1)
    magnitude = magnitude.reshape(-1, *ones) if by_rows else magnitude.reshape(1, -1, *ones[1:])
    return {**tensors, ".dora_scale": magnitude}, formulas.dora(layer.weight, delta, magnitude.double())


KINDS: dict[str, Callable[[Layer], Made]] = {
    "lora": lora,
    "tucker": tucker,
    "loha": loha,
    "lokr": lokr,
    "lokr_tucker": lokr_tucker,
    "glora": glora,
    "oft": oft,
    "boft": boft,
    "diff": diff,
    "dora": dora,
}
"""Kinds that change matrices; `files.EXTRAS` has those that also, or only, change vectors."""


def _is_conv2d(layer: Layer) -> bool:
    return len(layer.kernel) == 2 and prod(layer.kernel) > 1


def _divisor(number: int, most: int = 8) -> int:
    return next(d for d in range(min(most, number), 0, -1) if number % d == 0)
