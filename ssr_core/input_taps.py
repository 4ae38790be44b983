"""Gathering second moments of whole layer inputs, with the life cycle of calibration.

What is kept of one task can be asked for any later down: `Z Z^T` for Z = down X (`InputMoments.gram_of`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .errors import CalibrationError
from .input_hooks import Family, InputHook, InputLayer, SketchMatrices, family_of
from .moments import InputMoments, MomentOptions
from .padding import PaddingMode, RowWeights, TextRows
from .stacks import Task, build_stacks
from .taps import PassState, Tap, submodule
from .targets import Target


class InputTap:
    """All hooks of one task; attach it around the passes.

    Args:
        layers: Whose inputs are gathered.
        matrices: Sketch matrices.
        padding: How padded text tokens count.
        adapter: Applies the task's LoRA while its passes run; None for the model as it is.
        share: Whether layers that read the same tensor share their moments.
    """

    def __init__(
        self,
        layers: Sequence[InputLayer],
        matrices: SketchMatrices,
        padding: PaddingMode,
        adapter: Tap | None,
        share: bool,
    ) -> None:
        self._padding, self._adapter, self._matrices = padding, adapter, matrices
        self._state = PassState(Counter(), RowWeights(None, padding))
        families: dict[tuple[str, int], Family] = {}
        self._hooks: list[InputHook] = []
        for layer in layers:
            family = None
            if share and not layer.kernel:
                family = families.setdefault(family_of(layer), Family())
            self._hooks.append(InputHook(self._state, layer, family, matrices))

    @property
    def calls(self) -> Counter[str]:
        """How often each module ran while attached."""
        return self._state.calls

    @property
    def paths(self) -> list[str]:
        """Modules whose inputs are gathered."""
        return [hook.path for hook in self._hooks]

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Upload all that the hooks need now, so that no forward pass has to wait for a copy."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for hook in self._hooks:
            self._matrices.of(hook.layer, device, wide)
        if self._adapter is not None:
            self._adapter.prepare(device, dtype)

    def describe_text(self, rows: TextRows | None) -> None:
        """Say which rows of the coming passes are text padding."""
        self._state.weights = RowWeights(rows, self._padding)

    @contextmanager
    def attached(self, root: nn.Module) -> Iterator[list[nn.Module]]:
        """Hooks on the modules below `root` for the length of the block; always removed.

        Yields:
            The modules that have them.

        Raises:
            CalibrationError: A layer is not a module of `root`.
        """
        modules = []
        with ExitStack() as stack:
            if self._adapter is not None:
                modules += stack.enter_context(self._adapter.attached(root))
            for hook in self._hooks:
                module = submodule(root, hook.path)
                stack.callback(module.register_forward_pre_hook(hook.before).remove)
                modules.append(module)
            yield modules

    def result(self) -> dict[Target, InputMoments]:
        """Moments by module; layers that share their input share one object. A layer that never ran has none."""
        ready: dict[int, InputMoments] = {}
        found = {}
        for hook in self._hooks:
            parts = hook.parts()
            for part in parts:
                taken = part.take() if id(part) not in ready else None
                if taken is not None:
                    ready[id(part)] = taken
                    if not bool(torch.isfinite(ready[id(part)].total).all()):
                        raise CalibrationError("the sums over its inputs overflow.", layer=part.path)
            if parts:
                pieces = [ready[id(part)] for part in parts]
                found[hook.layer.target] = sum(pieces[1:], start=pieces[0])
        return found


class InputCollector:
    """Gathers moments task by task, as `Calibrator` gathers Grams; a pass that fails leaves nothing behind.

    Args:
        layers: Whose inputs are gathered; all of one part of the model.
        options: What is kept.
        padding: How padded text tokens count.
        tasks: LoRAs that are active alone while their own passes run; empty for the model as it is.
        share: Whether layers that read the same tensor share their moments.
        matrices: Sketch matrices of one's own; None for those of `options`.
    """

    def __init__(
        self,
        layers: Sequence[InputLayer],
        options: MomentOptions,
        padding: PaddingMode = "balance",
        tasks: Sequence[Task] = (),
        share: bool = True,
        matrices: SketchMatrices | None = None,
    ) -> None:
        self.layers, self.tasks, self.padding, self.share = list(layers), tuple(tasks), padding, share
        self._matrices = matrices or SketchMatrices(options)
        self._done: dict[int, dict[Target, InputMoments]] = {}

    @contextmanager
    def task(self, index: int) -> Iterator[InputTap]:
        """A tap for one task's passes; its moments count only if the block succeeds."""
        tap = InputTap(self.layers, self._matrices, self.padding, self._alone(index), self.share)
        yield tap
        found = tap.result()
        if tap.paths and not tap.calls:
            raise CalibrationError(
                f"none of the {len(tap.paths)} layers ran in calibration pass number {index + 1}.",
                remedy="use at least one step, a CONDITIONING that is active at the calibration's noise level, and a "
                "MODEL that is not compiled or replaced by another engine.",
            )
        self._done[index] = found

    def _alone(self, index: int) -> Tap | None:
        """A tap that applies one LoRA and records nothing: no layer of it is shared with another one."""
        if not self.tasks or not self.layers:
            return None
        part = self.layers[0].target.part
        stacks = [one for one in build_stacks([self.tasks[index]]) if one.target.part == part and one.tapped]
        return Tap(stacks, (0,), self.padding) if stacks else None

    def moments(self, index: int) -> Mapping[Target, InputMoments]:
        """Moments of one task by module; nothing if it was not gathered."""
        return self._done.get(index, {})
