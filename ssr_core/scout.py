"""A pass ahead of calibration that finds what routers should read beside the LoRAs' own coordinates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .calibration import check_ran
from .padding import PaddingMode
from .readers import InputRegression
from .sampling import InputSample, ScoutOptions
from .stacks import LayerStack
from .taps import Tap
from .targets import Target


class Scout:
    """Samples the inputs of routed layers task by task; a pass that fails leaves nothing behind.

    Args:
        stacks: The stacks of one part of the model; those that hooks cannot watch are left out.
        options: How many tokens, and how readers are found in them.
        padding: How padded text tokens count.
    """

    def __init__(self, stacks: Sequence[LayerStack], options: ScoutOptions, padding: PaddingMode = "balance") -> None:
        self.stacks = [stack for stack in stacks if stack.tapped]
        self.options = options
        self.padding: PaddingMode = padding
        self._done: dict[tuple[str, int], InputSample] = {}

    @contextmanager
    def task(self, index: int) -> Iterator[Tap]:
        """A tap for one task's passes; its samples count only if the block succeeds."""
        tap = Tap(self.stacks, index, self.padding, scout=self.options)
        yield tap
        check_ran(tap, index)
        for path, sample in tap.samples():
            self._done[(path, index)] = sample

    def readers(self, device: torch.device | None = None) -> dict[Target, Tensor]:
        """The readers of every stack that has any, for `Calibrator`.

        Hands the samples over: call it once, when all passes are done. A layer that did not run for
        one of its LoRAs has no readers.

        Args:
            device: Where to compute; None is the CPU.

        Returns:
            (E, in) rows by stack.

        Raises:
            SolveError: The ridge is too small for a layer.
        """
        by_inputs: dict[tuple[str, tuple[int, ...]], list[LayerStack]] = {}
        for stack in self.stacks:
            if len(stack.blocks) > 1 and sum(stack.basis_ranks) > 0:
                by_inputs.setdefault((stack.target.module_path, stack.tasks), []).append(stack)
        found: dict[Target, Tensor] = {}
        for (path, tasks), stacks in by_inputs.items():
            samples = [self._done[(path, task)] for task in tasks if (path, task) in self._done]
            if len(samples) < len(tasks):
                continue
            regression = InputRegression(samples, self.options.ridge, device or torch.device("cpu"), path)
            for stack in stacks:
                rows = regression.readers(stack.basis, stack.basis_ranks, self.options.limit)
                if rows is not None:
                    found[stack.target] = rows
        self._done.clear()
        return found
