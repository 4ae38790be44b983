"""A size for the whole record, spread over its layers by what they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import CalibrationError
from ..targets import Target
from .factor import InputFactor

MB = 10**6


def column_bytes(factor: InputFactor) -> int:
    """What one column takes on disk: half precision, and its length in float32."""
    return 2 * factor.width + 4


def sample_bytes(factor: InputFactor) -> int:
    """What the sampled tokens take on disk: half precision, a scale in float32 and a weight in float64 each."""
    return 0 if factor.sample is None else len(factor.sample.rows) * (2 * factor.width + 12)


def distinct(layers: Mapping[Target, InputFactor]) -> list[tuple[InputFactor, list[Target]]]:
    """The factors, each with the layers that share it."""
    found: dict[int, tuple[InputFactor, list[Target]]] = {}
    for target, factor in layers.items():
        found.setdefault(id(factor), (factor, []))[1].append(target)
    return list(found.values())


def fit_budget(layers: Mapping[Target, InputFactor], budget: int) -> dict[Target, InputFactor]:
    """Cut factors until they fit, column by column where the least is lost.

    A column's worth is its share of the layer's energy for each byte, times the layers that read it.
    Worth falls along each factor, so taking the best columns first takes a prefix of each: the optimum
    up to the last column that no longer fits.

    Args:
        layers: Factors by layer; shared ones count once.
        budget: Bytes; 0 cuts nothing.

    Raises:
        CalibrationError: Not even the LoRA's own columns and the sampled tokens fit; says how much they take.
    """
    if budget <= 0:
        return dict(layers)
    groups = distinct(layers)
    left = budget - sum(factor.own * column_bytes(factor) + sample_bytes(factor) for factor, _ in groups)
    if left < 0:
        raise CalibrationError(
            f"a budget of {budget / MB:g} MB does not hold the LoRA's own directions and the sampled tokens.",
            remedy=f"set budget_mb to {(budget - left) / MB:.3g} or more, or to 0; or lower sampled_tokens.",
        )
    sizes = _best(groups, left)
    cut = {id(factor): factor.cut(size) for (factor, _), size in zip(groups, sizes, strict=True)}
    return {target: cut[id(factor)] for target, factor in layers.items()}


def _best(groups: Sequence[tuple[InputFactor, list[Target]]], left: int) -> list[int]:
    worth = []
    for index, (factor, targets) in enumerate(groups):
        each = len(targets) / (column_bytes(factor) * max(factor.trace, 1e-300))
        energies = factor.norms[factor.own :].double().square() * each
        worth += [(float(value), index) for value in energies]
    sizes = [factor.own for factor, _ in groups]
    closed: set[int] = set()
    for _, index in sorted(worth, key=lambda one: -one[0]):
        price = column_bytes(groups[index][0])
        if price > left:  # a later column of the same layer costs as much
            closed.add(index)
        if index not in closed:
            sizes[index] += 1
            left -= price
    return sizes
