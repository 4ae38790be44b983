"""Calibrating a plain PyTorch model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from torch import nn

from .calibration import Calibration, Calibrator, assemble
from .padding import PaddingMode
from .sampling import ScoutOptions
from .scout import Scout
from .stacks import LayerStack, Task
from .taps import Tap


def calibrate(
    root: nn.Module,
    tasks: Sequence[Task],
    stacks: Sequence[LayerStack],
    run_pass: Callable[[int, Tap], None],
    *,
    padding: PaddingMode = "balance",
    scout: ScoutOptions | None = None,
) -> Calibration:
    """Calibrate a plain PyTorch model (no ComfyUI).

    Args:
        root: The module that the targets' paths start from.
        tasks: The LoRAs.
        stacks: `build_stacks(tasks)`.
        run_pass: Runs the model on task i's prompts; the hooks are attached while it runs. All tasks
            must see the same noise: other noise is a difference that the router would learn. With a
            scout it is called for all tasks twice; `tap.scouting` is True the first time, where fewer
            steps will do.
        padding: How padded text tokens count.
        scout: Find readers first, by which routers tell the tasks apart; None keeps to the LoRAs' own
            coordinates.

    Returns:
        The calibration.

    Raises:
        CalibrationError: A pass reached no layer of its LoRA, or a layer does not fit.
        SolveError: The scout's ridge is too small for a layer.
    """
    readers, settings = None, None
    if scout is not None:
        ahead = Scout(stacks, scout, padding)
        _run_all(root, ahead, len(tasks), run_pass)
        readers, settings = ahead.readers(), {"scout": asdict(scout)}
    calibrator = Calibrator(stacks, padding, readers)
    _run_all(root, calibrator, len(tasks), run_pass)
    return assemble(tasks, [calibrator], settings=settings)


def _run_all(root: nn.Module, collector: Scout | Calibrator, count: int, run_pass: Callable[[int, Tap], None]) -> None:
    for index in range(count):
        with collector.task(index) as tap, tap.attached(root):
            run_pass(index, tap)
