"""OSRM Refit: trained LoRAs, kept out of each other's way."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..ssr_core import REFIT_MODES, RefitMode, RefitOptions
from . import host, osrm_refit
from .entries import LoRAEntries, flatten
from .inputs import (
    CATEGORY,
    LORA_MODEL,
    SSR_LORA,
    calibration_inputs,
    lora_sockets,
    optional_calibration_inputs,
)
from .moment_inputs import features_input, moment_inputs
from .options import calibration_options, moment_options

_REFIT = RefitOptions()


class SSROSRMRefit(io.ComfyNode):
    """Trained LoRAs, kept out of each other's way."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSROSRMRefit",
            display_name="OSRM Refit",
            category=CATEGORY,
            description="Changes LoRAs so that each does less on the others' prompts, and reports what that costs its own "
            "function. Same ranks; merge the result with any method.",
            has_intermediate_output=True,
            search_aliases=["osrm", "post-osrm", "orthogonal lora", "reduce interference", "lora interference"],
            inputs=[
                io.Model.Input("model", tooltip="The base model. LoRAs already on it stay active and are not refit."),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts; text-encoder layers are refit too."),
                lora_sockets(minimum=1),
                io.Combo.Input(
                    "mode",
                    options=list(REFIT_MODES),
                    default=_REFIT.mode,
                    tooltip="contrast (recommended) gives a direction up as far as the others use it more than the LoRA "
                    "itself; project gives up the others' top directions, own or not; analytic is the paper's post-OSRM, "
                    "which can destroy a LoRA. Read the report.",
                ),
                io.Float.Input(
                    "strength",
                    default=_REFIT.strength,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="contrast: weight of the others' prompts against the LoRA's own; 1 recommended, both alike. project: share "
                    "that is removed, up to 1. 0 changes nothing. analytic ignores it.",
                ),
                io.Float.Input(
                    "energy",
                    default=_REFIT.energy,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="project, analytic: share of the energy of the others' inputs that counts as theirs. 1 for the "
                    "paper's analytic.",
                ),
                features_input("tokens"),
                *calibration_inputs(),
                *optional_calibration_inputs(),
                *moment_inputs(),
                io.Float.Input(
                    "ridge",
                    default=_REFIT.ridge,
                    min=0.000001,
                    max=10.0,
                    step=0.01,
                    round=0.000001,
                    advanced=True,
                    tooltip="contrast: how strongly directions that neither side uses much stay as they are, as a fraction "
                    "of the mean signal. 0.1 recommended; less fits the change to the noise of these very passes.",
                ),
            ],
            outputs=[
                SSR_LORA.Output(
                    display_name="loras", tooltip="The refit LoRAs, with their strengths and prompts, for SSR Merge."
                ),
                LORA_MODEL.Output(
                    display_name="lora_models",
                    is_output_list=True,
                    tooltip="The same one by one: SSR Save LoRA writes a file for each.",
                ),
                io.String.Output(
                    display_name="report", tooltip="What each LoRA keeps, and how the interference falls."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        loras: dict[str, LoRAEntries],
        mode: RefitMode,
        strength: float,
        energy: float,
        clip: Any = None,
        **values: Any,
    ) -> io.NodeOutput:
        """Gather and refit."""
        options = RefitOptions(mode, strength, energy, values["ridge"], values["seed"])
        passes, moments = calibration_options(values), moment_options(values)
        made = osrm_refit.refit(flatten(loras), model, clip, passes, moments, options, host.Progress(model))
        return io.NodeOutput(made.entries, made.tensors, made.report, ui=ui.PreviewText(made.report))
