"""Calibrating a plain PyTorch model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from torch import nn

from .calibration import Calibration, Calibrator, assemble
from .heldout import HELD_OUT
from .padding import PaddingMode
from .sampling import SampleOptions
from .stacks import LayerStack, Task
from .taps import Tap


def calibrate(
    root: nn.Module,
    tasks: Sequence[Task],
    stacks: Sequence[LayerStack],
    run_pass: Callable[[int, Tap], None],
    *,
    padding: PaddingMode = "balance",
    sample: SampleOptions | None = None,
    held_out: int = HELD_OUT,
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

    Returns:
        The calibration.

    Raises:
        CalibrationError: A pass reached no layer of its LoRA, or a layer does not fit.
    """
    calibrator = Calibrator(stacks, padding, sample, held_out)
    for index in range(len(tasks)):
        with calibrator.task(index) as tap, tap.attached(root):
            run_pass(index, tap)
    return assemble(tasks, [calibrator], settings=None if sample is None else {"sample": asdict(sample)})
