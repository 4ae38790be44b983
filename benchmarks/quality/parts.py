"""The benchmark's parts, and the jobs that they fall into: one number of LoRAs and one seed each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from .ablation import data, neutral, scales, solve, wording
from .case import Sampling
from .methods import Method, careful, compared, protecting, protecting_several, quick, sampling_of, started, told
from .protocols import baseline, composition, preservation
from .records import Record
from .sisters import starts, styled
from .world.building import Scale, World

Measure = Callable[[World, Mapping[str, Method], Sequence[int], Sequence[int]], Iterator[Record]]


@dataclass(frozen=True)
class Part:
    """Tables that are measured together.

    Attributes:
        measure: Yields what is measured of each method with so many LoRAs and each seed.
        methods: What is compared.
        ks: Numbers of LoRAs.
        seeds: Runs.
    """

    measure: Measure
    methods: Callable[[Sampling], dict[str, Method]]
    ks: Callable[[Scale], tuple[int, ...]]
    seeds: Callable[[Scale], Iterable[int]]


def _tested(scale: Scale) -> range:
    return range(scale.first_seed, scale.first_seed + scale.seeds)


def _tuned(scale: Scale) -> range:
    """Ablations, by which settings are chosen, have other seeds than the comparisons."""
    return range(min(scale.seeds, 3))


def _ablation(table: str, methods: Callable[[Sampling], dict[str, Method]]) -> Part:
    return Part(partial(preservation, table=table), methods, lambda scale: scale.ablation_ks, _tuned)


PARTS: dict[str, Part] = {
    "baseline": Part(baseline, lambda _: {}, lambda _: (1,), lambda _: (0,)),
    "preservation": Part(preservation, lambda s: compared(s) | careful(s), lambda scale: scale.ks, _tested),
    "composition": Part(composition, lambda s: compared(s) | told(s), lambda scale: scale.together, _tested),
    "styled": Part(
        partial(styled, table="subject and style"),
        lambda s: compared(s) | told(s) | protecting(s),
        lambda _: (2,),
        _tested,
    ),
    "starts": Part(starts, started, lambda scale: (scale.osrm,), lambda scale: _tested(scale)[:3]),
    "scales": _ablation("ablation: other methods' settings", scales),
    "solve": _ablation("ablation: solve", solve),
    "data": _ablation("ablation: calibration data", data),
    "neutral": _ablation("ablation: neutral prompts", neutral),
    "wording": _ablation("calibration prompts", wording),
    "many": Part(
        partial(preservation, table="many subjects"),
        lambda s: quick(compared(s) | careful(s)),
        lambda scale: scale.many,
        lambda scale: _tested(scale)[:2],
    ),
    "crowd": Part(
        partial(styled, table="two subjects and a style"),
        lambda s: compared(s) | told(s) | protecting_several(s),
        lambda _: (3,),
        lambda scale: _tested(scale)[:2],
    ),
}
"""Parts by name."""


@dataclass(frozen=True)
class Job:
    """What one process measures at a time.

    Attributes:
        part: A name in `PARTS`.
        k: Number of LoRAs.
        seed: The run's seed.
        methods: Names of what is compared.
    """

    part: str
    k: int
    seed: int
    methods: tuple[str, ...]

    @property
    def name(self) -> str:
        """`preservation-5-11`."""
        return f"{self.part}-{self.k}-{self.seed}"

    def place(self, record: Record) -> int:
        """Where a value stands in tables: as its method does in the list, what is no method first."""
        return self.methods.index(record.method) if record.method in self.methods else -1

    def records(self, world: World) -> list[Record]:
        """Measure."""
        part = PARTS[self.part]
        methods = part.methods(sampling_of(world.scale))
        return list(part.measure(world, {name: methods[name] for name in self.methods}, (self.k,), (self.seed,)))


def jobs_of(scale: Scale, parts: Sequence[str], only: Sequence[str] = ()) -> list[Job]:
    """All jobs of some parts; of each seed, those with many LoRAs first, for they take long.

    Args:
        scale: How much is measured.
        parts: Names in `PARTS`.
        only: Compare these methods only; parts that have none of them have no jobs.
    """
    found = []
    for name in parts:
        part = PARTS[name]
        names = tuple(part.methods(sampling_of(scale)))
        methods = tuple(one for one in names if not only or one in only)
        if only and not methods:
            continue
        ks = sorted(part.ks(scale), reverse=True)
        found += [Job(name, k, seed, methods) for seed in part.seeds(scale) for k in ks]
    return found


def method_names(scale: Scale) -> set[str]:
    """Everything that any part compares."""
    return {name for part in PARTS.values() for name in part.methods(sampling_of(scale))}
