"""The progress bar of a node."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import comfy.utils
import latent_preview
from torch import Tensor

from .device import check_cancel
from .news import PROGRESS_EVENT, announce


@dataclass(frozen=True)
class Activity:
    """What a node is doing, for the panel in the browser.

    Attributes:
        stage: Which part of the work.
        tasks: Names of the LoRAs.
        task: Index of the one at work.
        prompt: Index of its prompt.
        prompts: How many it has.
        steps: Sampling steps of one pass.
        round: Index of the round of passes.
        rounds: How many there are.
    """

    stage: Literal["load", "calibrate", "solve"]
    tasks: tuple[str, ...] = ()
    task: int = 0
    prompt: int = 0
    prompts: int = 0
    steps: int = 0
    round: int = 0
    rounds: int = 1


class Progress:
    """One progress bar with latent previews; every update is a chance to cancel."""

    _SCALE = 1000
    _NEWS_EVERY = 0.1
    """Seconds. A solve ticks thousands of times."""

    def __init__(self, model: Any) -> None:
        self._bar = comfy.utils.ProgressBar(self._SCALE)
        self._begin, self._end, self._units, self._done = 0.0, 1.0, 1, 0
        self._previewer = latent_preview.get_previewer(model.load_device, model.get_model_object("latent_format"))
        self._activity, self._step, self._told = Activity("load"), 0, 0.0

    def doing(self, activity: Activity) -> None:
        """Say what the coming steps are."""
        self._activity, self._step = activity, 0
        self._announce(now=True)

    def stage(self, begin: float, end: float, units: int) -> None:
        """The coming `units` steps fill the bar from `begin` to `end` (shares of 1)."""
        self._begin, self._end, self._units, self._done = begin, end, max(1, units), 0

    @property
    def reached(self) -> float:
        """Share of the bar that is filled."""
        return self._begin + (self._end - self._begin) * min(1.0, self._done / self._units)

    def at(self, share: float) -> None:
        """Fill the bar up to a share of 1."""
        self.stage(share, 1.0, 1)
        self.step(0)

    def step(self, count: int = 1, x0: Tensor | None = None) -> None:
        """Advance by `count` units, showing `x0` if previews are on."""
        check_cancel()
        self._done += count
        self._step += count
        preview = None
        if x0 is not None and self._previewer is not None:
            shown = x0.tensors[0] if getattr(x0, "is_nested", False) else x0
            preview = self._previewer.decode_latent_to_preview_image("JPEG", shown)
        self._announce(now=x0 is not None)  # before the picture, so that the browser knows whose it is
        self._bar.update_absolute(int(self._SCALE * self.reached), None, preview)

    def _announce(self, now: bool) -> None:
        if not now and time.monotonic() - self._told < self._NEWS_EVERY:
            return
        self._told = time.monotonic()
        announce(PROGRESS_EVENT, {**asdict(self._activity), "step": self._step, "share": round(self.reached, 4)})
