"""Spending a size budget on ranks: the next byte goes where it removes most error."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from .errors import IncompatibleError

Gain = tuple[float, ...]
"""What one more rank removes: of the error that counts, then of the one that decides where the first is equal."""


def allocate(gains: Sequence[Sequence[Gain]], costs: Sequence[int], budget: int) -> list[int]:
    """Ranks that remove as much error as a budget allows.

    Greedy by gain per byte. A layer's gains fall, so that the steps taken are the best ones of all by
    that measure: any other ranks of no more bytes give up steps of a larger ratio than they take, and
    remove less (water filling over singular values, with costs). A step that no longer fits is skipped
    for cheaper ones behind it; the error removed is then less than the best by at most that one step's.

    Args:
        gains: For each layer what each further rank removes, falling; the first rank is always taken.
        costs: Bytes of one rank of each layer.
        budget: Bytes for all of them.

    Returns:
        A rank for each layer, from 1 to its number of gains.

    Raises:
        IncompatibleError: Rank 1 everywhere is more than the budget.
    """
    ranks = [1] * len(gains)
    left = budget - sum(costs)
    if left < 0:
        raise IncompatibleError(
            f"rank 1 in every layer takes {sum(costs) / 1e6:.3f} MB, the budget leaves {budget / 1e6:.3f} MB.",
            remedy=f"allow at least {sum(costs) / 1e6:.3f} MB more than biases and norms take.",
        )
    heap = [(_worth(layer[1], costs[at]), at) for at, layer in enumerate(gains) if len(layer) > 1]
    heapq.heapify(heap)
    while heap:
        _, at = heapq.heappop(heap)
        if costs[at] > left:
            continue
        ranks[at] += 1
        left -= costs[at]
        if ranks[at] < len(gains[at]):
            heapq.heappush(heap, (_worth(gains[at][ranks[at]], costs[at]), at))
    return ranks


def _worth(gain: Gain, cost: int) -> Gain:
    """Order of a step in a heap, whose smallest comes first."""
    return tuple(-value / cost for value in gain)
