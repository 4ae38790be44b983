"""One configuration's model, LoRAs and inputs, and the runs that are compared."""

from __future__ import annotations

from dataclasses import replace

import torch

from ssr_core import (
    Calibration,
    ForwardLoRA,
    MergeResult,
    PaperMerge,
    SampleOptions,
    SSRMerge,
    Tap,
    build_stacks,
    calibrate,
    merge,
)

from .arithmetic import Cell
from .loras import random_tasks
from .model import SpeedModel, inputs
from .published import Published, published_merge


class Workbench:
    """Everything is made once, before any clock or memory count starts."""

    def __init__(self, cell: Cell, device: torch.device, dtype: torch.dtype) -> None:
        self.cell, self.device, self.dtype = cell, device, dtype
        self.model = SpeedModel(cell.shape, device, dtype)
        self.tasks = random_tasks(self.model, cell.count, cell.rank, torch.float32 if device.type == "cpu" else dtype)
        self.inputs = [inputs(cell.shape, index, device, dtype) for index in range(cell.count)]
        self.calibration: Calibration | None = None
        self.sampled: Calibration | None = None
        self.answer: Published | None = None
        self.one(0)

    def one(self, index: int) -> None:
        """One forward pass on one LoRA's input."""
        self.model(*self.inputs[index])

    def bare(self) -> None:
        """K passes of the model alone."""
        for index in range(self.cell.count):
            self.one(index)

    def plain(self) -> None:
        """K passes, each with its LoRA in a hook and nothing recorded."""
        for index, task in enumerate(self.tasks):
            with ForwardLoRA(task.adapter.layers).attached(self.model, self.device, self.dtype):
                self.one(index)

    def calibrate(self) -> None:
        """The engine's calibration: factors are placed before each pass, as the nodes do it."""
        self.calibration = None
        self.calibration = self._calibrated(None)

    def calibrate_sampled(self) -> None:
        """The same, and some whole inputs are kept."""
        self.sampled = None
        self.sampled = self._calibrated(SampleOptions())

    def _calibrated(self, sample: SampleOptions | None) -> Calibration:
        def run(index: int, tap: Tap) -> None:
            tap.prepare(self.device, self.dtype)
            self.one(index)

        return calibrate(self.model, self.tasks, build_stacks(self.tasks), run, sample=sample)

    def merge(self, strength: float = 1.0, judge: bool = True) -> MergeResult:
        """Solve, absorb and report from the last calibration."""
        tasks = [replace(task, strength_model=strength) for task in self.tasks]
        return merge(tasks, SSRMerge(), self.calibration, device=self.device, judge=judge)

    def refined(self) -> MergeResult:
        """A merge that is corrected by the last sampled calibration's inputs."""
        return merge(self.tasks, SSRMerge(), self.sampled, device=self.device)

    def whole(self) -> MergeResult:
        """A merge from nothing."""
        self.calibrate()
        return self.merge()

    def published(self) -> None:
        """The published algorithm from nothing."""
        self.answer = None
        self.answer = published_merge(self.model, self.tasks, self.one)

    def router_difference(self) -> float:
        """Largest relative difference (Frobenius) between the published routers and the engine's mode `paper`."""
        assert self.calibration is not None and self.answer is not None
        stacks = build_stacks(self.tasks, like=self.calibration.stack_tasks)
        records = self.calibration.match(self.tasks)
        stats = [self.calibration.stats_for(stack, records) for stack in stacks]
        worst = 0.0
        for stack, factors in zip(stacks, PaperMerge().merge(stacks, stats, torch.device("cpu")), strict=True):
            theirs = self.answer.routers[stack.target.module_path]
            assert factors.view is not None
            worst = max(worst, float((factors.view.router - theirs).norm() / theirs.norm()))
        return worst
