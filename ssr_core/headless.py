"""Calibrating a plain PyTorch model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import nn

from .adapters import LoRALayer
from .calibration import Calibration
from .calibrator import Calibrator, assemble
from .errors import CalibrationError
from .forward import ForwardLoRA
from .heldout import HELD_OUT
from .padding import PaddingMode
from .ranks import Ranks
from .sampling import SampleOptions
from .scenes import Scene
from .stacks import LayerStack, Task
from .taps import Tap
from .targets import Target


def calibrate(
    root: nn.Module,
    tasks: Sequence[Task],
    stacks: Sequence[LayerStack],
    run_pass: Callable[[int, Tap], None],
    *,
    padding: PaddingMode = "balance",
    sample: SampleOptions | None = None,
    held_out: int = HELD_OUT,
    scenes: Sequence[Scene] = (),
    run_scene: Callable[[int, Tap], None] | None = None,
    merged: Mapping[Target, LoRALayer] | None = None,
) -> Calibration:
    """Calibrate a plain PyTorch model (no ComfyUI).

    Args:
        root: The module that the targets' paths start from.
        tasks: The LoRAs.
        stacks: `build_stacks(tasks)`.
        run_pass: Runs the model on task i's prompts; the hooks are attached while it runs. All tasks
            must see the same noise: other noise is a difference that the router would learn.
        padding: How padded text tokens count.
        sample: Keep some whole inputs of every routed layer for `refinement`; None keeps none, and
            routers then see the LoRAs' own coordinates only.
        held_out: One token of so many is held out, so that the report can judge by tokens that a router
            was not fitted on; 0 for none, which takes a third less memory.
        scenes: Prompts of several LoRAs or none.
        run_scene: Runs the model on scene j's prompt, as `run_pass` does on a task's.
        merged: Layers of a merge that acts in all passes instead of the LoRAs, for a further round (`with_rounds`);
            only those of the stacks' parts of the model are added, and what a merge changes beside low-rank layers
            (`MergeResult.vectors`) is the caller's business.

    Returns:
        The calibration.

    Raises:
        CalibrationError: A pass reached no layer of its LoRA, or a layer does not fit.
    """
    calibrator = Calibrator(stacks, padding, sample, held_out, scenes, merged is not None)
    weight = next(root.parameters(), torch.zeros(0))
    parts = {stack.target.part for stack in stacks}
    layers = {target: layer for target, layer in (merged or {}).items() if target.part in parts}
    with ForwardLoRA(layers).attached(root, weight.device, weight.dtype):
        for index in range(len(tasks)):
            with calibrator.task(index) as tap, tap.attached(root):
                run_pass(index, tap)
        _run_scenes(calibrator, root, range(len(scenes)), run_scene)
    return assemble(tasks, [calibrator], settings=None if sample is None else {"sample": asdict(sample)})


def _run_scenes(
    calibrator: Calibrator, root: nn.Module, numbers: Sequence[int], run_scene: Callable[[int, Tap], None] | None
) -> None:
    for number in numbers:
        if run_scene is None:
            raise CalibrationError("there are scenes, and nothing that runs them.", remedy="give run_scene as well.")
        with calibrator.scene(number) as tap, tap.attached(root):
            run_scene(number, tap)


def calibrate_sharded(
    root: nn.Module,
    tasks: Sequence[Task],
    stacks: Sequence[LayerStack],
    run_prompt: Callable[[int, int, Tap], None],
    ranks: Ranks,
    *,
    padding: PaddingMode = "balance",
    sample: SampleOptions | None = None,
    held_out: int = HELD_OUT,
    scenes: Sequence[Scene] = (),
    run_scene: Callable[[int, Tap], None] | None = None,
) -> Calibration:
    """As `calibrate`, with the passes dealt out over processes; every process gets the whole calibration.

    Args:
        root: The module that the targets' paths start from; the same on every process.
        tasks: The LoRAs; each has as many passes as prompts.
        stacks: `build_stacks(tasks)`.
        run_prompt: Runs the model on prompt j of task i, while the hooks are attached.
        ranks: This process among the others.
        padding: How padded text tokens count.
        sample: As in `calibrate`; the prompts of a LoRA are then run by one process.
        held_out: As in `calibrate`; which tokens these are depends on where a LoRA's prompts are run.
        scenes: As in `calibrate`; each is one more pass.
        run_scene: As in `calibrate`.

    Raises:
        CalibrationError: A pass reached no layer, or a process was lost.
    """
    calibrator = Calibrator(stacks, padding, sample, held_out, scenes)
    counts = [len(task.prompts) for task in tasks] + [1] * len(scenes)
    shares = ranks.shares(counts, whole=sample is not None)
    for index, share in enumerate(shares[: len(tasks)]):
        if share:
            with calibrator.task(index) as tap, tap.attached(root):
                for prompt in share:
                    run_prompt(index, prompt, tap)
    mine = [number for number, share in enumerate(shares[len(tasks) :]) if share]
    _run_scenes(calibrator, root, mine, run_scene)
    settings = None if sample is None else {"sample": asdict(sample)}
    return assemble(tasks, [calibrator], settings=settings, ranks=ranks)
