"""A trained world small enough for one core: its layer inputs fall off as trained ones do, random ones do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quality.case import Case, Sampling, reading
from benchmarks.quality.world.loras import lora
from benchmarks.quality.world.pool import subjects
from benchmarks.quality.world.training import base_model
from ssr_core import GramStats, InputSample, SampleOptions, SSRMerge
from ssr_core.sampling import TokenSampler
from ssr_core.stacks import LayerStack

GramOf = Callable[[int, str, Tensor, Tensor], Tensor]
"""(task, layer, stacked rows (R, d), the task's own rows) -> its Gram (R, R)."""


@dataclass(frozen=True)
class Size:
    """How much is trained.

    Attributes:
        base_steps: Training steps of the model.
        lora_steps: Of each LoRA.
        width: Of the model; its MLP is four times as wide.
        depth: Blocks.
        loras: How many are merged.
        images: Pictures in a pass, 64 tokens each.
        steps: Of the sampling that is recorded; as many as the nodes take.
    """

    base_steps: int = 150
    lora_steps: int = 60
    width: int = 256
    depth: int = 2
    loras: int = 4
    images: int = 16
    steps: int = 4


TOY = Size(2, 2, 32, 1, 2, 2, 2)
CALIBRATION, HELD_OUT = 0, 5
"""Seeds of the noise."""


@dataclass(frozen=True)
class Found:
    """What one way of keeping moments comes to.

    Attributes:
        error: Held-out reconstruction error of the merge, root mean square over the layers.
        router: Relative distance of the routers from the exact ones, the same way.
    """

    error: float
    router: float


class World:
    """LoRAs, their inputs with each alone, and what a merge is worth on noise that calibration did not see."""

    def __init__(self, size: Size, cache: Path) -> None:
        base = base_model(cache, ((size.base_steps, 1.5e-3),), size.depth, size.width)
        loras = [lora(base, who, cache, size.lora_steps) for who in subjects()[: size.loras]]
        self.case = Case(base, loras, CALIBRATION)
        self._sampling = Sampling(steps=size.steps, images=size.images)
        self.inputs = self._inputs(CALIBRATION)
        self.held_out = [{path: x.float() for path, x in one.items()} for one in self._inputs(HELD_OUT)]
        acts = [any(float((one[path] @ one[path].T).trace()) > 0 for one in self.case.deltas) for path in self.paths]
        self.stacks: dict[str, LayerStack] = {
            stack.target.module_path: stack
            for stack, act in zip(self.case.stacks, acts, strict=True)
            if act  # the last block's text goes nowhere: nothing was learned there
        }
        self.moments = [{path: x.T @ x for path, x in one.items()} for one in self.inputs]

    @property
    def paths(self) -> list[str]:
        """All layers that LoRAs change."""
        return [stack.target.module_path for stack in self.case.stacks]

    def _inputs(self, seed: int) -> list[dict[str, Tensor]]:
        case = Case(self.case.base, self.case.loras, seed)
        found = []
        for index, model in enumerate(self.case.singles):
            steps: dict[str, list[Tensor]] = {}
            with reading(model) as inputs:
                for _ in case.passes(model, index, self._sampling):
                    for path, x in inputs.items():
                        steps.setdefault(path, []).append(x.double())
            found.append({path: torch.cat(parts) for path, parts in steps.items()})
        return found

    @cached_property
    def exact(self) -> tuple[float, Mapping[str, Tensor]]:
        """Held-out error and routers with the Grams of the tokens themselves."""
        return self._merge(self._true_gram)

    def _true_gram(self, task: int, path: str, rows: Tensor, own: Tensor) -> Tensor:
        return rows @ self.moments[task][path] @ rows.T

    @cached_property
    def _exact_refined(self) -> float:
        return self._merge(self._true_gram, self._samples(SampleOptions().tokens, half=False))[0]

    def refined(self, gram_of: GramOf, tokens: int) -> float:
        """Held-out error over the exact one's, both with the correction from sampled inputs, as the nodes merge.

        Args:
            gram_of: From records.
            tokens: Sampled inputs in the records, in half precision; the exact route has the default number.
        """
        return self._merge(gram_of, self._samples(tokens, half=True))[0] / self._exact_refined

    def _samples(self, tokens: int, half: bool) -> Mapping[str, tuple[InputSample, ...]]:
        found = {}
        for path in self.stacks:
            kept = []
            for inputs in self.inputs:
                sampler = TokenSampler(SampleOptions(tokens))
                sampler.add([inputs[path][None]], torch.ones(len(inputs[path]), dtype=torch.bool))
                sample = sampler.result()
                assert sample is not None
                kept.append(InputSample(sample.rows.half().double(), sample.weights) if half else sample)
            found[path] = tuple(kept)
        return found

    def judge(self, gram_of: GramOf) -> Found:
        """Merge with other Grams."""
        error, routers = self._merge(gram_of)
        gaps = [float((routers[p] - exact).norm() / exact.norm()) ** 2 for p, exact in self.exact[1].items()]
        return Found(error, math.sqrt(sum(gaps) / len(gaps)))

    def _merge(
        self, gram_of: GramOf, samples: Mapping[str, tuple[InputSample, ...]] | None = None
    ) -> tuple[float, dict[str, Tensor]]:
        errors, routers = [], {}
        for path, stack in self.stacks.items():
            rows, ranks = stack.basis.double(), stack.basis_ranks
            own = rows.split(list(ranks))
            grams = [gram_of(task, path, rows, own[task]) for task in range(len(ranks))]
            counts = torch.tensor([float(len(one[path])) for one in self.inputs], dtype=torch.float64)
            bad = torch.zeros(len(ranks), dtype=torch.int64)
            stats = GramStats(torch.stack(grams), counts, bad, ranks, None if samples is None else samples[path])
            (answer,) = SSRMerge().merge([stack], [stats], torch.device("cpu"))
            assert answer.view is not None
            routers[path] = answer.view.router
            errors.append(self._error(path, answer.up.double() @ answer.down.double()))
        return math.sqrt(sum(errors) / len(errors)), routers

    def _error(self, path: str, delta: Tensor) -> float:
        off = 0.0
        for inputs, deltas in zip(self.held_out, self.case.deltas, strict=True):
            off += _power(inputs[path], (delta - deltas[path].double()).float())
        return off / self._energies[path]

    @cached_property
    def _energies(self) -> dict[str, float]:
        """What the LoRAs put out on their own held-out tokens."""
        pairs = list(zip(self.held_out, self.case.deltas, strict=True))
        return {path: sum(_power(inputs[path], deltas[path]) for inputs, deltas in pairs) for path in self.stacks}


def _power(x: Tensor, delta: Tensor) -> float:
    """Mean square of a layer's output over the tokens x (N, in)."""
    return float((x @ delta.T).square().sum()) / len(x)


def spectrum(world: World, shares: Sequence[float] = (0.9, 0.99)) -> list[dict[str, object]]:
    """Directions that hold a share of each layer's energy, for the first LoRA."""
    rows: list[dict[str, object]] = []
    for path in world.stacks:
        values = torch.linalg.eigvalsh(world.moments[0][path]).flip(0)
        held = values.cumsum(0) / values.sum()
        counts = [int((held < share).sum()) + 1 for share in shares]
        rows.append({"layer": path, "inputs": len(values), "directions": counts})
    return rows
