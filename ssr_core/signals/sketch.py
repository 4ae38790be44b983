"""Sketch matrices that begin with a LoRA's own rows, so that what concerns these is exact."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..input_hooks import InputLayer, SketchMatrices, family_of, whole_module
from ..moments import MomentOptions
from ..sampling import SampleOptions
from ..stacks import LayerStack
from ..targets import Target

SAME_SPAN = 1e-5
"""Rows of sibling layers that differ by less than this span nothing of their own."""


@dataclass(frozen=True)
class RecordOptions:
    """How much a record keeps.

    Attributes:
        columns: Random directions l in which a layer's inputs are sketched, beside the LoRA's own rows.
        exact_limit: Widest layer whose inputs are not sketched at all.
        budget_mb: Most MB (10^6 bytes) of factors and samples in the file; 0 keeps all that was sketched.
        sampled_tokens: Whole inputs of each layer that are kept for `refinement`, as in calibration; 0 for none.

    Raises:
        CalibrationError: A value that leaves nothing.
    """

    columns: int = 64
    exact_limit: int = 256
    budget_mb: float = 0.0
    sampled_tokens: int = SampleOptions().tokens

    def __post_init__(self) -> None:
        counts = self.exact_limit, self.sampled_tokens
        if self.columns < 1 or min(counts) < 0 or not 0 <= self.budget_mb < float("inf"):
            raise CalibrationError(
                f"no record can be made with {self}.",
                remedy="use at least one column; exact_limit, budget_mb and sampled_tokens of 0 or more.",
            )


class OwnSketches(SketchMatrices):
    """Omega = [B^T, random] with B the orthonormal rows of a LoRA on a layer and its siblings.

    Siblings (q, k, v) share one Omega because they may turn out to read one tensor.

    Args:
        layers: Whose inputs are recorded.
        stacks: The LoRA's own, one block each.
        options: How many random columns.
    """

    def __init__(self, layers: Iterable[InputLayer], stacks: Iterable[LayerStack], options: RecordOptions) -> None:
        sample = SampleOptions(options.sampled_tokens) if options.sampled_tokens else None
        super().__init__(MomentOptions("tokens"), sample)
        self._options = options
        by_module: dict[Target, list[Tensor]] = defaultdict(list)
        for stack in stacks:
            by_module[whole_module(stack.target)].append(stack.basis)
        families: dict[object, list[Tensor]] = defaultdict(list)
        for layer in layers:
            families[self._key(layer)] += by_module[layer.target]
        self._own: Mapping[object, Tensor] = {key: _span(rows) for key, rows in families.items()}
        self._placed: dict[tuple[object, torch.device, torch.dtype], Tensor] = {}

    @staticmethod
    def _key(layer: InputLayer) -> object:
        return layer.target if layer.kernel else family_of(layer)

    def own(self, layer: InputLayer) -> Tensor:
        """(o, d) float64, orthonormal: the rows of the LoRA on this layer and its siblings."""
        return self._own[self._key(layer)]

    def exact(self, layer: InputLayer) -> bool:
        """Whether nothing is gained by a sketch."""
        width = layer.in_features
        return width <= self._options.exact_limit or 2 * (len(self.own(layer)) + self._options.columns) >= width

    def columns_of(self, layer: InputLayer) -> int:
        """Columns that are summed up while the passes run."""
        return layer.in_features if self.exact(layer) else len(self.own(layer)) + self._options.columns

    def matrix(self, layer: InputLayer) -> Tensor | None:
        """Omega (d, o + l) in float64 on the CPU; None where the moments are exact."""
        if self.exact(layer):
            return None
        width, columns = layer.in_features, self._options.columns
        generator = torch.Generator().manual_seed(width)
        random = torch.randn(width, columns, generator=generator, dtype=torch.float32).double() / width**0.5
        return torch.cat([self.own(layer).T, random], dim=1)

    def of(self, layer: InputLayer, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """Omega where the layer computes."""
        key = (self._key(layer), device, dtype)
        if key not in self._placed:
            made = self.matrix(layer)
            if made is None:
                return None
            self._placed[key] = made.to(device, dtype)
        return self._placed[key]


def _span(rows: list[Tensor]) -> Tensor:
    stacked = torch.cat(rows).double()
    if len(rows) == 1:
        return stacked
    _, sizes, right = torch.linalg.svd(stacked, full_matrices=False)
    span: Tensor = right[sizes > SAME_SPAN * sizes[:1]]
    return span
