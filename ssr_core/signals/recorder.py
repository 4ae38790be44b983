"""Making the record of one LoRA in its own calibration pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn

from ..input_hooks import InputLayer, input_layers, whole_module
from ..input_taps import InputCollector, InputTap
from ..memory import MemoryNeed
from ..padding import PaddingMode
from ..stacks import Task, build_stacks
from ..targets import KeyMap, Part, Target
from .budget import MB, fit_budget
from .factor import InputFactor, factorise
from .sketch import OwnSketches, RecordOptions


class Recorder:
    """Gathers what a record keeps of one part of the model; a pass that fails leaves nothing behind.

    Only the LoRA's own layers are recorded: another LoRA's inputs matter where both act, and there
    this one has a layer too.

    Args:
        task: The LoRA, active alone.
        key_map: Of the connected model.
        part: Which part.
        options: How much is kept.
        padding: How padded text tokens count.
    """

    def __init__(
        self, task: Task, key_map: KeyMap, part: Part, options: RecordOptions, padding: PaddingMode = "balance"
    ) -> None:
        stacks = [one for one in build_stacks([task]) if one.target.part == part and one.tapped]
        modules = {whole_module(one.target) for one in stacks}
        self.layers: list[InputLayer] = [one for one in input_layers(key_map, part) if one.target in modules]
        self.sketches = OwnSketches(self.layers, stacks, options)
        self.collector = InputCollector(self.layers, self.sketches.options, padding, [task], matrices=self.sketches)

    def task(self, index: int) -> AbstractContextManager[InputTap]:
        """A tap for the LoRA's passes, whatever its number is in the caller's list."""
        return self.collector.task(0)

    def need(self) -> MemoryNeed:
        """Bytes that the pass will hold, at most."""
        kept = 0
        for layer in self.layers:
            tokens = 0 if self.sketches.sample is None else self.sketches.sample.tokens + 1
            kept += layer.in_features * (8 * self.sketches.columns_of(layer) + 4 * tokens)
        return MemoryNeed(kept, kept)

    def factors(self, tick: Callable[[], None] = lambda: None) -> dict[Target, InputFactor]:
        """What the pass found, by module; a layer that never ran is absent."""
        made: dict[int, InputFactor] = {}
        found: dict[Target, InputFactor] = {}
        by_target = {layer.target: layer for layer in self.layers}
        for target, moments in self.collector.moments(0).items():
            tick()
            if id(moments) not in made:
                layer = by_target[target]
                made[id(moments)] = factorise(moments, self.sketches.matrix(layer), self.sketches.own(layer))
            found[target] = made[id(moments)]
        return found


def record(
    root: nn.Module,
    task: Task,
    key_map: KeyMap,
    run_pass: Callable[[InputTap], None],
    options: RecordOptions | None = None,
    *,
    padding: PaddingMode = "balance",
) -> dict[Target, InputFactor]:
    """Record one LoRA on a plain PyTorch model (no ComfyUI).

    Args:
        root: The module that the targets' paths start from.
        task: The LoRA.
        key_map: Of the model.
        run_pass: Runs the model on the task's prompt; hooks are attached while it runs. Records that
            are to be merged must see the same noise.
        options: How much is kept.
        padding: How padded text tokens count.

    Returns:
        Factors by module, cut to the budget and rounded as they will be on disk.
    """
    options = options or RecordOptions()
    recorder = Recorder(task, key_map, "model", options, padding)
    with recorder.task(0) as tap, tap.attached(root):
        run_pass(tap)
    return finished(recorder.factors(), options)


def finished(layers: Mapping[Target, InputFactor], options: RecordOptions) -> dict[Target, InputFactor]:
    """Factors within the budget, in half precision."""
    cut = fit_budget(layers, round(options.budget_mb * MB))
    rounded: dict[int, InputFactor] = {}
    for factor in cut.values():
        rounded.setdefault(id(factor), _half(factor))
    return {target: rounded[id(factor)] for target, factor in cut.items()}


def _half(factor: InputFactor) -> InputFactor:
    return replace(factor, columns=factor.columns.to(torch.float16), norms=factor.norms.to(torch.float32))


def unknown_share(layers: Mapping[Target, InputFactor]) -> float:
    """Mean share of the layers' energy that their factors do not hold."""
    shares: Sequence[float] = [one.unknown for one in layers.values()]
    return sum(shares) / len(shares) if shares else 0.0
