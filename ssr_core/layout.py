"""Where a layer stands in its network: the block, and the kind of layer, read off the module path.

No family's names are known here. A name followed by a number (`double_blocks.7`, `input_blocks.4`,
`layers.12`) is a list of blocks; the first one on the path is the block, those inside it are left
out, and what remains is the kind: `img_attn.qkv`, `attn1.to_q`, `mlp.fc1`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .targets import Part, Target

_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Place:
    """Block and kind of one layer.

    Attributes:
        part: "model" or "clip".
        block: Path of the block; "" for layers outside of any.
        kind: What the layer is inside its block.
    """

    part: Part
    block: str
    kind: str

    def __str__(self) -> str:
        return f"{self.block} {self.kind}".strip()


def place_of(target: Target) -> Place:
    """Read a target's place off its path; the slices of a fused layer share one."""
    words = target.module_path.split(".")
    first = next((i for i in range(1, len(words) - 1) if words[i].isdigit() and not words[i - 1].isdigit()), None)
    if first is None:
        return Place(target.part, "", target.module_path)
    rest = words[first + 1 :]
    kept = []
    for index, word in enumerate(rest):
        number_next = index + 1 < len(rest) - 1 and rest[index + 1].isdigit()
        number_here = word.isdigit() and index < len(rest) - 1
        if not number_next and not number_here:
            kept.append(word)
    return Place(target.part, ".".join(words[: first + 1]), ".".join(kept))


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key by which `blocks.9` comes before `blocks.10`."""
    pieces = _NUMBER.split(text)
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in pieces if piece]
