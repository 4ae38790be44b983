"""Running the calibration passes and keeping what they found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .calibration import Calibration
from .errors import CalibrationError
from .gram import GramAccumulator, GramStats
from .heldout import HELD_OUT, HeldOut
from .padding import PaddingMode
from .ranks import Ranks
from .records import records_of
from .sampling import InputSample, SampleOptions
from .scenes import Scene, SceneStats
from .stacks import LayerStack, Task
from .taps import Tap
from .targets import Target
from .triangles import pack, packed_size


class Calibrator:
    """Gathers statistics task by task and scene by scene; a pass that fails leaves nothing behind.

    Args:
        stacks: The stacks of one part of the model; those that hooks cannot watch are left out.
        padding: How padded text tokens count.
        sample: Keep some whole inputs of the routed layers too, for `refinement`.
        held_out: One token of so many is held out, to judge by; 0 for none, which takes a third less memory.
        scenes: Prompts of several LoRAs or none.
        merged: The model has a merge of these LoRAs in it, for a further round (`round_sums`): none of them acts alone.
    """

    def __init__(
        self,
        stacks: Sequence[LayerStack],
        padding: PaddingMode = "balance",
        sample: SampleOptions | None = None,
        held_out: int = HELD_OUT,
        scenes: Sequence[Scene] = (),
        merged: bool = False,
    ) -> None:
        self.stacks = [stack for stack in stacks if stack.tapped]
        self.padding: PaddingMode = padding
        self.sample = sample
        self.held_out = held_out
        self.scenes = tuple(scenes)
        self.merged = merged
        self._done: dict[tuple[Target, int], GramAccumulator] = {}
        self._samples: dict[tuple[str, int], InputSample] = {}

    @contextmanager
    def task(self, index: int) -> Iterator[Tap]:
        """A tap for one task's passes; its statistics count only if the block succeeds."""
        tap = self._tap((index,), self.held_out)
        yield tap
        self._keep(tap, index)
        check_ran(tap, f"of LoRA number {index + 1}")

    @contextmanager
    def scene(self, number: int) -> Iterator[Tap]:
        """A tap for one scene's pass, likewise. All its tokens are fitted on; none is held out."""
        scene = self.scenes[number]
        tap = self._tap(scene.tasks, 0, scene=True)
        yield tap
        self._keep(tap, self._place(number))
        check_ran(tap, f"that the LoRAs share or that the {scene.label} {scene.prompt!r} needs")

    def _tap(self, acting: Sequence[int], held_out: int, scene: bool = False) -> Tap:
        count, merged = len(self.scenes), self.merged
        return Tap(self.stacks, acting, self.padding, self.sample, held_out, scenes=count, scene=scene, merged=merged)

    def _place(self, scene: int) -> int:
        """Where a scene is kept: below all tasks."""
        return -1 - scene

    def _keep(self, tap: Tap, place: int) -> None:
        for target, accumulator in tap.accumulators():
            accumulator.to_host()
            self._done[(target, place)] = accumulator
        for path, sample in tap.samples():
            self._samples[(path, place)] = sample

    def gather(self, ranks: Ranks) -> None:
        """Take over the samples of all processes."""
        if self.sample is not None:
            routed = [stack for stack in self.stacks if len(stack.blocks) > 1]
            places = [self._place(number) for number in range(len(self.scenes))]
            keys = sorted({(stack.target.module_path, one) for stack in routed for one in (*stack.tasks, *places)})
            self._samples = ranks.gathered(self._samples, keys)

    def result(self) -> dict[Target, GramStats]:
        """Statistics of every stack with two or more tasks; a layer that never ran has zero tokens.

        Hands the statistics over: call it once, when all passes are done.
        """
        return {stack.target: self._stats(stack) for stack in self.stacks if len(stack.blocks) > 1}

    def _stats(self, stack: LayerStack) -> GramStats:
        ranks, size = stack.basis_ranks, sum(stack.basis_ranks)
        # popped: two copies of all statistics would be alive otherwise
        found = [self._done.pop((stack.target, task), None) for task in stack.tasks]
        held = None
        if self.held_out:
            grams = [None if one is None else one.held_gram for one in found]
            tokens = [None if one is None else one.held_tokens for one in found]
            held = HeldOut(_stacked(grams, packed_size(size)), _counts(tokens))
        return GramStats(
            _stacked([None if one is None else one.gram for one in found], size, size),
            _counts([None if one is None else one.tokens for one in found]),
            _lost(found),
            ranks,
            self._sampled(stack, stack.tasks),
            held,
            self._scenes(stack) if self.scenes else None,
        )

    def _scenes(self, stack: LayerStack) -> SceneStats:
        places = [self._place(number) for number in range(len(self.scenes))]
        found = [self._done.pop((stack.target, place), None) for place in places]
        grams = [None if one is None else pack(one.gram[None])[0] for one in found]
        return SceneStats(
            _stacked(grams, packed_size(stack.basis.shape[0])),
            _counts([None if one is None else one.tokens for one in found]),
            _lost(found),
            torch.tensor([[task in scene.tasks for task in stack.tasks] for scene in self.scenes]),
            self._sampled(stack, places),
        )

    def _sampled(self, stack: LayerStack, places: Sequence[int]) -> tuple[InputSample, ...] | None:
        """Sampled inputs of all these passes; None where one has none."""
        keys = [(stack.target.module_path, place) for place in places]
        kept = [self._samples[key] for key in keys if key in self._samples]
        return tuple(kept) if len(kept) == len(keys) else None


def check_ran(tap: Tap, whose: str) -> None:
    """Refuse passes that reached no layer of their LoRA.

    Args:
        tap: What watched them.
        whose: Which layers these are, for the message.

    Raises:
        CalibrationError: Says what may be the reason.
    """
    if tap.paths and not tap.calls:
        raise CalibrationError(
            f"none of the {len(tap.paths)} layers {whose} ran in its calibration pass.",
            remedy="use at least one step, a CONDITIONING that is active at the calibration's noise level, and a "
            "MODEL that is not compiled or replaced by another engine.",
        )


def _stacked(grams: Sequence[Tensor | None], *shape: int) -> Tensor:
    """(K, *shape) in the widest of the dtypes; zeros for a task that never ran."""
    wide = any(gram is not None and gram.dtype == torch.float64 for gram in grams)
    dtype = torch.float64 if wide else torch.float32
    return torch.stack([torch.zeros(shape, dtype=dtype) if gram is None else gram.to(dtype) for gram in grams])


def _counts(tokens: Sequence[Tensor | None]) -> Tensor:
    return torch.tensor([0.0 if one is None else float(one) for one in tokens], dtype=torch.float64)


def _lost(found: Sequence[GramAccumulator | None]) -> Tensor:
    """Tokens that were not finite."""
    return torch.tensor([0 if one is None else int(one.nonfinite) for one in found], dtype=torch.int64)


def assemble(
    tasks: Sequence[Task],
    calibrators: Sequence[Calibrator],
    *,
    model: str = "",
    settings: Mapping[str, object] | None = None,
    ranks: Ranks | None = None,
) -> Calibration:
    """The calibration that the calibrators of all parts have gathered, on all processes."""
    ranks = ranks or Ranks()
    for calibrator in calibrators:
        calibrator.gather(ranks)
    stats = {target: one for calibrator in calibrators for target, one in calibrator.result().items()}
    stats = ranks.combined(stats)
    stacks = {stack.target: stack for calibrator in calibrators for stack in calibrator.stacks}
    return Calibration(
        records_of(tasks),
        stats,
        {target: stacks[target].tasks for target in stats},
        model,
        dict(settings or {}),
        {target: stacks[target].signature for target in stats},
        calibrators[0].scenes if calibrators else (),
    )
