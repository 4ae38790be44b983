"""Settings of the nodes: typed values, and the inputs that a person sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from comfy_api.latest import io
from torch import Tensor

from ..ssr_core import ANCHORS, METHODS, Anchor, IncompatibleError, MergeMethod, PaddingMode, SSRMerge
from . import host
from .forward import APPLY, Apply

SSR_LORA = io.Custom("SSR_LORA")
SSR_CALIBRATION = io.Custom("SSR_CALIBRATION")
LORA_MODEL = io.Custom("LORA_MODEL")
LORA_STACK = io.Custom("LORA_STACK")

CATEGORY = "model/merging/SSR-Merge"
DTYPES: Mapping[str, torch.dtype | None] = {
    "auto": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
PADDING: tuple[PaddingMode, ...] = ("balance", "include", "exclude")
UNSUPPORTED = ("refuse", "pass_through")
UNSEEN = ("anchor", "refuse")
_DEFAULTS = SSRMerge()


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate."""

    seed: int
    steps: int
    width: int
    height: int
    frames: int
    scheduler: str
    padding: PaddingMode
    memory_budget_gb: float
    latent: Mapping[str, Any] | None = field(default=None, repr=False)
    sigmas: Tensor | None = field(default=None, repr=False)

    def latent_for(self, model: Any) -> Tensor:
        """The connected LATENT, or an empty one of the chosen size."""
        if self.latent is not None:
            return host.prepare_latent(model, self.latent)
        return host.empty_latent(model, self.width, self.height, self.frames)

    def sigmas_for(self, model: Any) -> Tensor:
        """The connected SIGMAS, or those of a short schedule; the last one is not evaluated."""
        sigmas = self.sigmas if self.sigmas is not None else host.step_sigmas(model, self.scheduler, self.steps)
        falling = bool(torch.isfinite(sigmas).all() and (sigmas[:-1] > 0).all() and (sigmas.diff() < 0).all())
        if len(sigmas) < 2 or not falling:
            raise IncompatibleError(
                f"SIGMAS has to fall from step to step and only end in 0; it is {sigmas.tolist()[:8]}.",
                remedy="connect a scheduler node, or disconnect sigmas.",
            )
        return sigmas

    def settings(self) -> dict[str, object]:
        """Plain values for the calibration's record."""
        return {
            "seed": self.seed,
            "steps": self.steps,
            "width": self.width,
            "height": self.height,
            "frames": self.frames,
            "scheduler": self.scheduler,
            "padding": self.padding,
            "custom_latent": self.latent is not None,
            "custom_sigmas": self.sigmas is not None,
        }


@dataclass(frozen=True)
class SolveOptions:
    """How to solve and what to make of the answer."""

    mode: str
    ridge: float
    anchor: Anchor
    balance: bool
    dtype: str
    unsupported: Literal["refuse", "pass_through"]
    unseen_layers: Literal["anchor", "refuse"]
    apply: Apply

    def method(self) -> MergeMethod:
        """The method with its parameters; all but ssr have none that a node sets."""
        if self.mode == SSRMerge.name:
            return SSRMerge(self.ridge, self.anchor, self.balance)
        return METHODS[self.mode]()

    def torch_dtype(self) -> torch.dtype | None:
        """Dtype of the merged factors; None for that of the inputs."""
        return DTYPES[self.dtype]


def calibration_options(values: Mapping[str, Any]) -> CalibrationOptions:
    """Take the calibration settings out of a node's inputs."""
    return CalibrationOptions(
        seed=values["seed"],
        steps=values["steps"],
        width=values["width"],
        height=values["height"],
        frames=values["frames"],
        scheduler=values["scheduler"],
        padding=cast(PaddingMode, values["padding"]),
        memory_budget_gb=values["memory_budget_gb"],
        latent=values.get("latent"),
        sigmas=values.get("sigmas"),
    )


def solve_options(values: Mapping[str, Any]) -> SolveOptions:
    """Take the solve settings out of a node's inputs."""
    return SolveOptions(
        mode=values["mode"],
        ridge=values["ridge"],
        anchor=values["anchor"],
        balance=values["balance"],
        dtype=values["dtype"],
        unsupported=values["unsupported"],
        unseen_layers=values["unseen_layers"],
        apply=values.get("apply", "auto"),  # workflows from before it existed
    )


def lora_sockets(minimum: int) -> io.Autogrow.Input:
    """Growing sockets for SSR LoRA nodes."""
    template = io.Autogrow.TemplatePrefix(
        SSR_LORA.Input("lora", tooltip="An SSR LoRA node, or a chain of them."), prefix="lora", min=minimum, max=50
    )
    return io.Autogrow.Input(
        "loras", template=template, tooltip="The LoRAs to merge. A new socket appears as you connect."
    )


def calibration_inputs() -> list[io.Input]:
    """Main inputs of calibration."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Noise of the calibration passes, the same for every LoRA. Any value works; keep it fixed, or every "
            "run calibrates again.",
        ),
        io.Int.Input(
            "steps",
            default=1,
            min=1,
            max=100,
            tooltip="Sampling steps of each calibration pass. 1 as in the paper; 4 looks at several noise "
            "levels and costs four times as much.",
        ),
        io.Int.Input("width", default=512, min=16, max=8192, step=8, tooltip=_size_tip("Width")),
        io.Int.Input("height", default=512, min=16, max=8192, step=8, tooltip=_size_tip("Height")),
        io.Int.Input(
            "frames",
            default=1,
            min=1,
            max=1025,
            tooltip="Video models: frames of the calibration pass. 1 is cheap; use a few if motion LoRAs are merged. "
            "Image models ignore it.",
        ),
    ]


def optional_calibration_inputs() -> list[io.Input]:
    """Links and advanced settings of calibration."""
    return [
        io.Latent.Input(
            "latent",
            optional=True,
            tooltip="Replaces width, height and frames, e.g. for edit or image-to-video models.",
        ),
        io.Sigmas.Input(
            "sigmas",
            optional=True,
            tooltip="Replaces steps and scheduler: the model is evaluated once at each value but the last.",
        ),
        io.Combo.Input(
            "scheduler",
            options=host.SCHEDULERS,
            default="simple",
            advanced=True,
            tooltip="Which noise levels the steps visit. At 1 step every scheduler starts from pure noise.",
        ),
        io.Combo.Input(
            "padding",
            options=list(PADDING),
            default="balance",
            advanced=True,
            tooltip="Padded text tokens: balance (recommended) lets them count at most as much as the prompt's own, "
            "include counts all alike, exclude leaves them out.",
        ),
        io.Float.Input(
            "memory_budget_gb",
            default=0.0,
            min=0.0,
            max=1024.0,
            step=0.5,
            advanced=True,
            tooltip="Memory that the statistics may take, in GiB; the node stops with the amount needed if that is "
            "more. 0: half of what the machine has.",
        ),
    ]


def solve_inputs() -> list[io.Input]:
    """Advanced settings of the solve."""
    return [
        io.Combo.Input(
            "mode",
            options=list(METHODS),
            default=SSRMerge.name,
            advanced=True,
            tooltip="ssr (recommended) routes each signal to its LoRA; paper is the published formula to the letter; "
            "gains scales each LoRA; sum is what chained loaders do; average divides by their number.",
        ),
        io.Float.Input(
            "ridge",
            default=_DEFAULTS.ridge,
            min=0.0,
            max=10.0,
            step=0.0001,
            round=0.000001,
            advanced=True,
            tooltip="ssr: how strongly signals that calibration hardly saw keep to the anchor, as a fraction of the "
            f"mean signal. {_DEFAULTS.ridge:g} recommended; more if a merge looks unstable.",
        ),
        io.Combo.Input(
            "anchor",
            options=list(ANCHORS),
            default=_DEFAULTS.anchor,
            advanced=True,
            tooltip="ssr: what unseen signals get: sum (each LoRA in full), average, gains (each LoRA's best scale) or "
            "zero (the LoRA is lost there, as in the paper).",
        ),
        io.Boolean.Input(
            "balance",
            default=_DEFAULTS.balance,
            advanced=True,
            tooltip="ssr: give every LoRA the same weight, however long its prompts are. Recommended.",
        ),
        io.Combo.Input(
            "dtype",
            options=list(DTYPES),
            default="auto",
            advanced=True,
            tooltip="Precision of the merged LoRA. auto: that of the plain LoRAs among the files, else float32.",
        ),
        io.Combo.Input(
            "unsupported",
            options=list(UNSUPPORTED),
            default="refuse",
            advanced=True,
            tooltip="Keys that can be neither routed nor converted: refuse names the first one and stops; "
            "pass_through applies them to MODEL and CLIP as ordinary patches, the saved file lacks them.",
        ),
        io.Combo.Input(
            "unseen_layers",
            options=list(UNSEEN),
            default="anchor",
            advanced=True,
            tooltip="Layers that never ran in calibration: anchor merges them by the anchor and reports them; refuse "
            "stops with their name.",
        ),
        io.Combo.Input(
            "apply",
            options=list(APPLY),
            default="auto",
            optional=True,
            advanced=True,
            tooltip="How the MODEL gets the merged LoRA. weights patches the base weights; on fp8, INT8, GGUF and other "
            "quantised models that rounds most of it away. forward adds it to each layer's output instead: exact, "
            "slightly slower. auto: forward for quantised layers, weights for the others. CLIP always gets weights.",
        ),
    ]


def _size_tip(side: str) -> str:
    return (
        f"{side} of the calibration pass in pixels. It only needs to show the model typical signals: 512 is enough, "
        "larger costs time."
    )
