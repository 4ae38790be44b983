"""SSR Combine Calibrations and SSR Edit Calibration."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..ssr_core import IncompatibleError
from . import host, pipeline, recording, updating
from .entries import LoRAEntries, flatten
from .inputs import CATEGORY, SSR_CALIBRATION, lora_sockets, sample_input
from .record_inputs import record_size_inputs

_FOR_SOLVE = "For SSR Solve and SSR Save Calibration."


class SSRCombineCalibrations(io.ComfyNode):
    """Runs made apart, added up."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        template = io.Autogrow.TemplatePrefix(
            SSR_CALIBRATION.Input("calibration", tooltip="From SSR Calibrate or SSR Load Calibration."),
            prefix="calibration",
            min=1,
            max=50,
        )
        return io.Schema(
            node_id="SSRCombineCalibrations",
            display_name="SSR Combine Calibrations",
            category=CATEGORY,
            description="Adds up calibrations of the same LoRAs that were made apart: with other prompts or seeds, or on "
            "other machines. The result is what one run over all of it would have found.",
            has_intermediate_output=True,
            search_aliases=["sum calibrations", "merge calibrations", "several machines", "distributed calibration"],
            inputs=[
                io.Autogrow.Input(
                    "calibrations",
                    template=template,
                    tooltip="Calibrations of the same LoRAs on the same model. A new socket appears as you connect.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="How much each counts, e.g. 1 0.5; 0 leaves one out. Empty: all alike. With prompts calibrated "
                    "apart this weighs or drops a prompt without sampling.",
                ),
            ],
            outputs=[
                SSR_CALIBRATION.Output(display_name="CALIBRATION", tooltip=_FOR_SOLVE),
                io.String.Output(display_name="report", tooltip="What the sum holds."),
            ],
        )

    @classmethod
    def execute(cls, calibrations: dict[str, pipeline.CalibrationSocket], weights: str = "") -> io.NodeOutput:
        """Add up."""
        sockets = [one for one in calibrations.values() if one is not None]
        socket = updating.combined(sockets, updating.parse_weights(weights, len(sockets)))
        text = pipeline.calibration_report(socket)
        if updating.lost_samples(socket.calibration, [one.calibration for one in sockets]):
            text += "\nWarning: not all runs kept sampled inputs, so the sum has none; use the same sampled_tokens.\n"
        return io.NodeOutput(socket, text, ui=ui.PreviewText(text))


class SSREditCalibration(io.ComfyNode):
    """LoRAs leave and join."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSREditCalibration",
            display_name="SSR Edit Calibration",
            category=CATEGORY,
            description="Drops LoRAs from a calibration without sampling, and adds others: those that it has are not run "
            "again if they have records, a new one takes one pass for each of its prompts.",
            has_intermediate_output=True,
            search_aliases=["drop lora", "add lora", "replace lora", "update calibration", "online update"],
            inputs=[
                SSR_CALIBRATION.Input("calibration", tooltip="From SSR Calibrate, SSR Merge or SSR Load Calibration."),
                io.String.Input(
                    "drop",
                    multiline=True,
                    default="",
                    tooltip="LoRAs to drop, one a line: the number (from 1) or the name. To replace one, drop it and "
                    "connect the other. Joint prompts with it go too.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="Needed to add LoRAs: the MODEL that the calibration was made with."
                ),
                io.Clip.Input("clip", optional=True, tooltip="The CLIP that it was made with, if any."),
                lora_sockets(minimum=0),
                io.Latent.Input(
                    "latent", optional=True, tooltip="If the calibration was made with a LATENT: the same."
                ),
                io.Sigmas.Input("sigmas", optional=True, tooltip="If it was made with SIGMAS: the same."),
                io.Combo.Input(
                    "missing",
                    options=list(recording.MISSING),
                    default=recording.MISSING[0],
                    tooltip="LoRAs without a record: record runs their pass once and keeps it; refuse stops and says why "
                    "there is none.",
                ),
                *record_size_inputs(),
                sample_input(),
            ],
            outputs=[
                SSR_CALIBRATION.Output(display_name="CALIBRATION", tooltip=_FOR_SOLVE),
                io.String.Output(display_name="report", tooltip="What it holds now, and how many passes were run."),
            ],
        )

    @classmethod
    def execute(
        cls,
        calibration: pipeline.CalibrationSocket,
        drop: str = "",
        model: Any = None,
        clip: Any = None,
        loras: dict[str, LoRAEntries] | None = None,
        latent: Any = None,
        sigmas: Any = None,
        **values: Any,
    ) -> io.NodeOutput:
        """Drop, then add."""
        socket, lost = updating.drop(calibration, drop)
        notes = ["No pass was run."]
        new = flatten(loras)
        if new:
            if model is None:
                raise IncompatibleError("LoRAs join on a model.", remedy="connect the MODEL of the calibration.")
            options = recording.recording_options(values)
            progress = host.Progress(model)
            socket, notes = updating.join(socket, new, model, clip, options, latent, sigmas, progress)
        text = pipeline.calibration_report(socket) + "".join(f"\n{note}\n" for note in (*lost, *notes))
        return io.NodeOutput(socket, text, ui=ui.PreviewText(text))
