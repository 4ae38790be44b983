"""`python -m benchmarks.quality`: train the world (once), measure, write docs/benchmarks/quality.*."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .ablation import ablation, steps_and_tokens, wording
from .methods import compared
from .protocols import World, composition, preservation, styled
from .quality_world import baseline_figures
from .records import Record


def measure(w: World, seeds: Sequence[int], ks: Sequence[int], many: Sequence[int]) -> Iterator[Record]:
    """All tables."""
    methods = compared()
    yield from baseline_figures(w)
    yield from preservation(w, methods, ks, seeds)
    yield from composition(w, methods, seeds)
    yield from styled(w, methods, seeds)
    yield from preservation(w, methods, many, seeds[:3], table="many subjects")
    yield from ablation(w, seeds)
    yield from steps_and_tokens(w, seeds)
    yield from wording(w, seeds)
