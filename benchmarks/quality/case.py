"""One set of LoRAs to merge, and what merging methods may look at."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ssr_core import (
    Calibration,
    SampleOptions,
    Scene,
    SSRMerge,
    Tap,
    Task,
    build_stacks,
    calibrate,
    merge,
    with_rounds,
)
from ssr_core.stacks import LayerStack

from .world.captions import encode, scene_caption
from .world.loras import Trained, reading, with_deltas
from .world.network import Painter, euler
from .world.pool import base_scene
from .world.scenes import SIZE

IMAGES = 8
"""Pictures in a calibration pass: 8 x 64 image tokens."""


@dataclass(frozen=True)
class Sampling:
    """Which noise levels and prompts calibration sees.

    Attributes:
        steps: Euler steps of a whole sampling run.
        used: How many of them, from pure noise on; None is all.
        images: Pictures with noises of their own.
        prompts: Captions of each task; None is the one that the LoRA was trained with.
        noise: "same" for every task, or "other".
        sample: How many whole inputs are kept; None for none.
        joint: Also calibrate on the case's joint prompts.
        neutral: Also calibrate on so many prompts that name no LoRA.
        rounds: How often all passes run, from the second time on with the merge so far in the model.
        shared: The rounds share one run instead: each goes on for its part of the steps where the last one stopped.
    """

    steps: int = 4
    used: int | None = None
    images: int = IMAGES
    prompts: tuple[tuple[str, ...], ...] | None = None
    noise: str = "same"
    sample: SampleOptions | None = field(default_factory=SampleOptions)
    joint: bool = False
    neutral: int = 0
    rounds: int = 1
    shared: bool = False


@dataclass
class Case:
    """LoRAs to merge in one world, for one seed; computes what methods ask for once.

    Attributes:
        base: The model.
        loras: What is merged.
        seed: Of the calibration's noise.
        joint: Prompts of pictures that show all of the LoRAs, known to methods that want them.
    """

    base: Painter
    loras: Sequence[Trained]
    seed: int
    joint: tuple[str, ...] = ()
    _kept: dict[object, object] = field(default_factory=dict, repr=False)

    def once(self, key: object, make: Callable[[], object]) -> object:
        """The value of `make`, computed at the first call with this key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @property
    def tasks(self) -> list[Task]:
        """As the engine wants them."""
        return [Task(one.adapter, prompts=(one.prompt,)) for one in self.loras]

    @property
    def stacks(self) -> list[LayerStack]:
        """The engine's stacks."""
        return self.once("stacks", lambda: build_stacks(self.tasks))  # type: ignore[return-value]

    @property
    def deltas(self) -> list[dict[str, Tensor]]:
        """Dense changes of each LoRA by module path, float32."""
        return self.once(  # type: ignore[return-value]
            "deltas",
            lambda: [
                {target.module_path: layer.delta(torch.float32) for target, layer in one.adapter.layers.items()}
                for one in self.loras
            ],
        )

    @property
    def singles(self) -> list[Painter]:
        """The model with each LoRA alone."""
        return self.once("singles", lambda: [with_deltas(self.base, one) for one in self.deltas])  # type: ignore[return-value]

    def passes(self, model: nn.Module, index: int, sampling: Sampling) -> Iterator[None]:
        """Run the calibration passes of one task through a model."""
        for words, noise in self.starts(index, sampling):
            yield from _run(model, words, noise, sampling)

    def starts(self, index: int, sampling: Sampling) -> Iterator[tuple[Tensor, Tensor]]:
        """Words and noise of each calibration pass of one task."""
        prompts = (self.loras[index].prompt,) if sampling.prompts is None else sampling.prompts[index]
        for number, prompt in enumerate(prompts):
            yield self.start(prompt, sampling, number + (1000 * index if sampling.noise == "other" else 0))

    def start(self, prompt: str, sampling: Sampling, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Words and noise of one pass."""
        generator = torch.Generator().manual_seed(7000 + 100 * self.seed + offset)
        noise = torch.randn(sampling.images, 3, SIZE, SIZE, generator=generator)
        return encode([prompt] * sampling.images), noise

    def one_pass(self, model: nn.Module, prompt: str, sampling: Sampling) -> Iterator[None]:
        """Sample one prompt."""
        return _run(model, *self.start(prompt, sampling), sampling)

    def scenes(self, sampling: Sampling) -> tuple[Scene, ...]:
        """Joint and neutral prompts of a calibration."""
        everyone = tuple(range(len(self.loras)))
        joint = [Scene(prompt, everyone) for prompt in self.joint if sampling.joint]
        chooser = random.Random(19000 + self.seed)
        return (*joint, *(Scene(scene_caption(base_scene(chooser)[0])) for _ in range(sampling.neutral)))

    def calibration(self, sampling: Sampling) -> Calibration:
        """The engine's statistics for these LoRAs."""
        model, scenes = self.base, self.scenes(sampling)
        part = sampling.steps // sampling.rounds if sampling.shared else None
        begun: dict[tuple[str, int], Iterator[None]] = {}

        def go_on(key: tuple[str, int], start: Callable[[], Iterator[None]]) -> None:
            """A whole run, or the next part of one that was begun."""
            steps = begun.setdefault(key, start()) if sampling.shared else start()
            for _ in itertools.islice(steps, part):
                pass

        def run(index: int, _: Tap) -> None:
            go_on(("task", index), lambda: self.passes(model, index, sampling))

        def run_scene(number: int, _: Tap) -> None:
            go_on(("scene", number), lambda: self.one_pass(model, scenes[number].prompt, sampling))

        def make() -> Calibration:
            more: dict[str, Any] = {"sample": sampling.sample, "scenes": scenes, "run_scene": run_scene}
            with torch.no_grad():
                found = [calibrate(model, self.tasks, self.stacks, run, **more)]
                while len(found) < sampling.rounds:
                    so_far = merge(self.tasks, SSRMerge(), with_rounds(found), dtype=torch.float32, judge=False)
                    found.append(calibrate(model, self.tasks, self.stacks, run, merged=so_far.layers, **more))
            return with_rounds(found)

        return self.once(sampling, make)  # type: ignore[return-value]

    def input_grams(self, sampling: Sampling) -> list[dict[str, Tensor]]:
        """Mean second moments (in, in) of each layer's inputs, each LoRA alone on its prompt."""

        def make() -> list[dict[str, Tensor]]:
            return [_grams(model, self.passes(model, index, sampling)) for index, model in enumerate(self.singles)]

        own = replace(sampling, sample=None, joint=False, neutral=0, rounds=1, shared=False)
        return self.once(("grams", own), make)  # type: ignore[return-value]

    def joint_grams(self, sampling: Sampling) -> list[dict[str, Tensor]]:
        """The same for each joint prompt, all LoRAs together."""
        total = {path: torch.stack([one[path] for one in self.deltas]).sum(0) for path in self.deltas[0]}
        model = with_deltas(self.base, total)
        return [_grams(model, self.one_pass(model, prompt, sampling)) for prompt in self.joint]

    def neutral_grams(self, sampling: Sampling) -> list[dict[str, Tensor]]:
        """The same for each neutral prompt, no LoRA at all."""
        prompts = [scene.prompt for scene in self.scenes(sampling) if not scene.tasks]
        return [_grams(self.base, self.one_pass(self.base, prompt, sampling)) for prompt in prompts]


def _run(model: nn.Module, words: Tensor, noise: Tensor, sampling: Sampling) -> Iterator[None]:
    for _ in euler(model, words, noise, sampling.steps, sampling.used):
        yield


def _grams(model: nn.Module, passes: Iterator[None]) -> dict[str, Tensor]:
    """Mean second moments (in, in) of each layer's inputs over all passes."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    with reading(model) as inputs:
        for _ in passes:
            for path, x in inputs.items():
                sums[path] = sums.get(path, 0) + (x.T @ x).double()
                counts[path] = counts.get(path, 0) + len(x)
    return {path: total / counts[path] for path, total in sums.items()}
