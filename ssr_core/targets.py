"""Where an adapter acts: a module, or some rows of a fused one, and the names files use for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["model", "clip"]


@dataclass(frozen=True, order=True)
class Target:
    """One linear map that adapters change.

    Attributes:
        module_path: Dotted path of the module below the root of its part.
        out_slice: `(start, length)` of the output rows inside a fused module (q, k or v inside
            qkv), or None for the whole module.
        part: "model" for the diffusion model, "clip" for the text encoder.
    """

    module_path: str
    out_slice: tuple[int, int] | None = None
    part: Part = "model"

    def __str__(self) -> str:
        if self.out_slice is None:
            return self.module_path
        start, length = self.out_slice
        return f"{self.module_path}[{start}:{start + length}]"


@dataclass(frozen=True)
class KeyTarget:
    """What one base name of a LoRA file stands for on the connected model.

    Attributes:
        target: Module and rows.
        weight_shape: Shape of the whole parameter, `(out, in, *kernel)` or `(n,)`.
        row_order: If set, the file's output row `row_order[i]` is the weight's row i (a file
            dialect that stores scale before shift, for instance).
        parameter: Name of the parameter inside the module; adapters only act on "weight".
        tapped: Whether hooks on the module see the weight at work. Not so for embeddings, grouped
            convolutions and weights that the model multiplies with by itself.
        ignored: Why the host applies no change of this parameter, if it does not.
    """

    target: Target
    weight_shape: tuple[int, ...]
    row_order: tuple[int, ...] | None = field(default=None, repr=False)
    parameter: str = "weight"
    tapped: bool = True
    ignored: str = ""

    @property
    def out_features(self) -> int:
        """Rows that an `up` factor must have."""
        return self.weight_shape[0] if self.target.out_slice is None else self.target.out_slice[1]

    @property
    def in_features(self) -> int:
        """Columns that a flattened `down` factor must have: `in * prod(kernel)`."""
        size = 1
        for n in self.weight_shape[1:]:
            size *= n
        return size

    @property
    def is_map(self) -> bool:
        """Whether the parameter is the matrix or kernel of a linear map."""
        return self.parameter == "weight" and len(self.weight_shape) > 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial kernel size; empty for a linear layer."""
        return self.weight_shape[2:]


KeyMap = Mapping[str, KeyTarget]
"""Base name in a LoRA file (without `.lora_up.weight` and the like) -> what it stands for."""
