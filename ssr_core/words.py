"""Numbers in sentences."""

from __future__ import annotations


def number_of(count: int, one: str, many: str = "") -> str:
    """A count with its noun: 1 layer, 2 layers.

    Args:
        count: How many.
        one: What follows where it is one, "layer is".
        many: What follows otherwise; `one` and an s if empty.
    """
    return f"{count} {one if count == 1 else many or one + 's'}"
