"""Hooks that read a layer's input through the stacked downs and add the active adapters' output.

One pre-hook computes `z = basis x`; the statistics need it, and `up_k z_k` is exactly what LoRA k
adds to the layer's output. So no weight is patched and nothing is copied: the base model runs as it
is, quantised or offloaded, and every LoRA takes its turn in the hooks, or several act in a scene. Where
the caller wants them, a few whole inputs of each routed layer are kept as well, for `refinement`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CalibrationError
from .gram import GramAccumulator
from .heldout import HELD_OUT
from .padding import PaddingMode, RowWeights, TextRows
from .projection import add, columns, compute_dtype, patches, project
from .router import block_slices
from .sampling import InputSample, SampleOptions, TokenSampler
from .stacks import LayerStack
from .targets import Target


@dataclass
class _Slot:
    """One stack during one pass: its columns in the module's z, and those of the blocks that act."""

    stack: LayerStack
    columns: slice
    active: Mapping[int, slice]
    accumulator: GramAccumulator | None = None
    up: Tensor | None = None

    @property
    def recorded(self) -> bool:
        """Whether another LoRA shares the layer, so that statistics are needed."""
        return len(self.stack.blocks) > 1


@dataclass
class PassState:
    """What all hooks of one tap look up.

    They hold this instead of the tap: a cycle would keep every task's tensors on the device until
    the garbage collector happens to run.
    """

    calls: Counter[str]
    weights: RowWeights


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The layer at a path.

    Raises:
        CalibrationError: The model has none.
    """
    try:
        return root.get_submodule(path)
    except AttributeError as err:
        raise CalibrationError("the model has no such layer.", layer=path) from err


def input_of(args: tuple[Any, ...], path: str) -> Tensor:
    """What a layer was called with.

    Raises:
        CalibrationError: No tensor.
    """
    if not args or not isinstance(args[0], Tensor):
        raise CalibrationError("the model calls this layer without a tensor.", layer=path)
    return args[0]


class _ModuleTap:
    """The hook pair of one module for one pass."""

    def __init__(
        self,
        shared: PassState,
        path: str,
        stacks: Sequence[LayerStack],
        acting: Collection[int],
        sample: SampleOptions | None,
        held_out: int,
        scenes: int,
    ) -> None:
        self.shared, self.path, self.kernel, self.held_out = shared, path, stacks[0].kernel, held_out
        self.slots: list[_Slot] = []
        at = 0
        for stack in stacks:
            ranks = stack.basis_ranks
            size = sum(ranks)
            if size == 0:  # every down here is zero: nothing to see, nothing to add
                continue
            places = [slice(at + rows.start, at + rows.stop) for rows in block_slices(ranks)]
            active = {i: rows for i, rows in enumerate(places) if stack.tasks[i] in acting}
            self.slots.append(_Slot(stack, slice(at, at + size), active))
            at += size
        sharing = max((len(slot.stack.blocks) for slot in self.slots if slot.recorded), default=0)
        self.sampler: TokenSampler | None = None
        if sharing and sample is not None:
            self.sampler = TokenSampler(sample.shared_by(sharing + scenes, stacks[0].in_features), held_out)
        self._basis: Tensor | None = None
        self._pending: list[Tensor] = []

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Put the factors where the layer computes; done once, before the pass where possible."""
        compute = compute_dtype(dtype)
        bases = [slot.stack.basis.to(device, compute) for slot in self.slots]
        self._basis = bases[0] if len(bases) == 1 else torch.cat(bases)
        gram_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        for slot in self.slots:
            ups = [slot.stack.canonical_up(position) for position in slot.active]
            slot.up = torch.cat(ups, dim=1).to(device, compute) if ups else None
            if slot.accumulator is not None and slot.accumulator.gram.device != device:
                raise CalibrationError("the layer moved to another device during its pass.", layer=self.path)
            if slot.recorded and slot.accumulator is None:
                rows = slot.columns.stop - slot.columns.start
                slot.accumulator = GramAccumulator(rows, device, gram_dtype, self.held_out)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook: project, accumulate, keep z for `after`."""
        x = input_of(args, self.path)
        with torch.no_grad():
            if self._basis is None or self._basis.device != x.device or self._basis.dtype != compute_dtype(x.dtype):
                self.prepare(x.device, x.dtype)
            assert self._basis is not None
            z = project(module, x, self._basis, self.kernel, self.path)
            leading: Sequence[int] = () if self.kernel else x.shape[:-1]
            tokens = (z.flatten(2).transpose(1, 2) if self.kernel else z[None]).flatten(0, -2)
            weight = self.shared.weights(self.path, leading, x.device) if leading else None
            for slot in self.slots:
                if slot.accumulator is not None:
                    slot.accumulator.add(tokens[:, slot.columns], weight)
            if self.sampler is not None:
                # What is not finite in x is not finite in z: both leave out the same tokens.
                usable = torch.isfinite(tokens.abs().amax(dim=1))
                inputs = patches(module, x, self.kernel, self.path) if self.kernel else [x.reshape(1, -1, x.shape[-1])]
                self.sampler.add(inputs, usable, weight)
        self.shared.calls[self.path] += 1
        self._pending.append(z)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Hook: add `up_k z_k` of every LoRA that acts, in the rows of each slot."""
        z = self._pending.pop()
        for slot in self.slots:
            if slot.up is not None:
                parts = [columns(z, rows, self.kernel) for rows in slot.active.values()]
                active = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1 if self.kernel else -1)
                add(output, active, slot.up, slot.stack.target.out_slice, self.kernel, self.path)
        return output


class Tap:
    """All hooks of one task or scene; attach it around the passes.

    Args:
        stacks: All stacks of one part of the model.
        acting: The LoRAs that are active: one alone, or those of a scene, which may be none.
        padding: How padded text tokens count.
        sample: Keep some whole inputs of the routed layers too.
        held_out: One token of so many is held out; 0 for none.
        scenes: Number of all scenes, whose samples share the room with those of the LoRAs.
        scene: Also watch the shared layers on which none of them acts.
        merged: The model has a merge in it: nothing is added, and only what LoRAs share is watched.
    """

    def __init__(
        self,
        stacks: Sequence[LayerStack],
        acting: Collection[int],
        padding: PaddingMode,
        sample: SampleOptions | None = None,
        held_out: int = HELD_OUT,
        *,
        scenes: int = 0,
        scene: bool = False,
        merged: bool = False,
    ) -> None:
        self._padding = padding
        self._shared = PassState(Counter(), RowWeights(None, padding))
        by_module: dict[str, list[LayerStack]] = {}
        for stack in stacks:
            shared, own = len(stack.blocks) > 1, any(task in acting for task in stack.tasks)
            if (own and not merged) or (shared and (own or scene)):
                by_module.setdefault(stack.target.module_path, []).append(stack)
        adding = () if merged else acting
        modules = [
            _ModuleTap(self._shared, path, group, adding, sample, held_out, scenes) for path, group in by_module.items()
        ]
        self._modules = [module for module in modules if module.slots]

    @property
    def calls(self) -> Counter[str]:
        """How often each module ran while attached."""
        return self._shared.calls

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Upload all factors now, so that no forward pass has to wait for a copy."""
        for module in self._modules:
            module.prepare(device, dtype)

    def describe_text(self, rows: TextRows | None) -> None:
        """Say which rows of the coming passes are text padding."""
        self._shared.weights = RowWeights(rows, self._padding)

    @contextmanager
    def attached(self, root: nn.Module) -> Iterator[list[nn.Module]]:
        """Hooks on the modules below `root` for the length of the block; always removed.

        Yields:
            The modules that have them.

        Raises:
            CalibrationError: A layer of the LoRAs is not a module of `root`.
        """
        handles, modules = [], []
        try:
            for module_tap in self._modules:
                module = submodule(root, module_tap.path)
                handles.append(module.register_forward_pre_hook(module_tap.before))
                handles.append(module.register_forward_hook(module_tap.after))
                modules.append(module)
            yield modules
        finally:
            for handle in handles:
                handle.remove()
            for module_tap in self._modules:
                module_tap._pending.clear()

    def accumulators(self) -> Iterator[tuple[Target, GramAccumulator]]:
        """What was gathered; a layer that never ran has nothing."""
        for module in self._modules:
            for slot in module.slots:
                if slot.accumulator is not None:
                    yield slot.stack.target, slot.accumulator

    def samples(self) -> Iterator[tuple[str, InputSample]]:
        """Whole inputs, by module; stacks of one module read the same."""
        for module in self._modules:
            sample = None if module.sampler is None else module.sampler.result()
            if sample is not None:
                yield module.path, sample

    @property
    def paths(self) -> list[str]:
        """Modules that are watched."""
        return [module.path for module in self._modules]
