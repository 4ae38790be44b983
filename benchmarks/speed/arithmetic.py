"""How many operations calibration adds, and how much memory; everything is predicted from shapes.

Two operations (a multiplication and an addition) for each entry of a product. One linear layer of `i`
inputs and `o` outputs on N tokens, K LoRAs of rank r, R = K r:

    forward        2 N i o
    projection     2 N i R      z = basis x
    Gram           2 N S        G += z^T z; S = R^2 up to 256 rows, less above, where panels of 256 rows leave
                                out what lies below their squares
    held out       2 N/8 S      one token in eight goes into a second Gram
    active LoRA    2 N r o      y += up_k z_k
    attention      4 N^2 d      a block; N^2 / frames where it is windowed

Once for each LoRA and layer, whatever N is: coordinates 4 i r^2 and the ups in them 2 o r^2, divided
among the K passes of a calibration, so these come to 4 i r^2 + 2 o r^2 a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from .model import LINEARS, Shape

PANEL = 256


@dataclass(frozen=True)
class Cell:
    """One configuration.

    Attributes:
        shape: The model and its tokens.
        count: K.
        rank: r.
        repeats: Repetitions.
        against: Whether the published algorithm runs as well.
        memory: Whether peak memory is measured as well.
    """

    shape: Shape
    count: int
    rank: int
    repeats: int = 3
    against: bool = True
    memory: bool = False

    @property
    def name(self) -> dict[str, int]:
        """The configuration as it stands in the .json."""
        return {"d": self.shape.d, "tokens": self.shape.tokens, "K": self.count, "r": self.rank}


def layers(shape: Shape) -> list[tuple[int, int, int]]:
    """(i, o, N) of every linear layer."""
    streams = [shape.image, shape.text] * shape.double + [shape.tokens] * shape.single
    return [(a * shape.d, b * shape.d, n) for n in streams if n for a, b in LINEARS.values()]


def forward_operations(shape: Shape) -> int:
    """Of one bare pass; norms and activations are not counted."""
    attention = 4 * shape.tokens**2 // shape.frames * shape.d * (shape.double + shape.single)
    return sum(2 * n * i * o for i, o, n in layers(shape)) + attention


def gram_entries(rows: int) -> int:
    """Entries of a symmetric product that are computed: from each panel of 256 rows on to the right."""
    return sum(min(PANEL, rows - start) * (rows - start) for start in range(0, rows, PANEL))


def added_operations(cell: Cell) -> int:
    """Of one calibration pass, beyond a bare one."""
    r, total = cell.rank, cell.rank * cell.count
    # one token in eight is counted in a second Gram: the fourth of each eight
    grams = sum(2 * (n + (n + 4) // 8) * gram_entries(total) for _, _, n in layers(cell.shape))
    return grams + sum(2 * n * (i * total + r * o) + 4 * i * r**2 + 2 * o * r**2 for i, o, n in layers(cell.shape))


def predicted_ratio(cell: Cell) -> float:
    """Calibration over bare passes if every operation took the same time."""
    return 1 + added_operations(cell) / forward_operations(cell.shape)


def gram_bytes(cell: Cell, on_cpu: bool) -> int:
    """The sum of R^2 terms, float32: K Grams a layer in main memory, one a layer on a GPU.

    Those of the held-out tokens come on top: as a triangle in main memory, whole on a GPU.
    """
    total = cell.rank * cell.count
    held = total * (total + 1) // 2 if on_cpu else total**2
    kept = cell.count if on_cpu else 1
    return sum(4 * kept * (total**2 + held) for _ in layers(cell.shape))


def factor_bytes(cell: Cell, itemsize: int, on_cpu: bool) -> int:
    """Orthonormal coordinates of all LoRAs and the active one's ups.

    On the CPU the hooks read the coordinates that the solve needs (float32); a GPU gets a copy in the
    activations' dtype, and only that is counted there.
    """
    per_row = 4 if on_cpu else itemsize
    return sum(per_row * cell.rank * cell.count * i + itemsize * cell.rank * o for i, o, _ in layers(cell.shape))


def transient_bytes(cell: Cell, itemsize: int) -> int:
    """z of the layer with the most tokens: N R."""
    return max(itemsize * n * cell.rank * cell.count for _, _, n in layers(cell.shape))
