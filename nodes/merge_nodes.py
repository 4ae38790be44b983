"""SSR Merge, and its two halves SSR Calibrate and SSR Solve."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ssr_core import check_unsupported
from . import host, pipeline
from .calibrating import calibrate
from .entries import LoRAEntries, flatten, parse_strengths
from .inputs import (
    CATEGORY,
    MODEL_TIP,
    SSR_CALIBRATION,
    calibration_inputs,
    lora_sockets,
    merge_outputs,
    optional_calibration_inputs,
    rounds_input,
    sample_input,
    scene_inputs,
    solve_inputs,
    weight_inputs,
)
from .loading import load
from .options import calibration_options, solve_method, solve_options
from .showing import calibration_ui, merge_ui

_CLIP_TIP = (
    "Encodes the prompts; its LoRA layers are merged too. Not needed if every SSR LoRA has a CONDITIONING and there are no joint "
    "or neutral prompts."
)
_ALIASES = ["merge lora", "lora merge", "combine characters", "combine loras", "two characters", "identity bleed"]


def _calibration_sockets() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip=MODEL_TIP),
        io.Clip.Input("clip", optional=True, tooltip=_CLIP_TIP),
        lora_sockets(minimum=1),
        *calibration_inputs(),
        *optional_calibration_inputs(),
    ]


class SSRMergeNode(io.ComfyNode):
    """The whole merge in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSRMerge",
            display_name="SSR Merge",
            category=CATEGORY,
            has_intermediate_output=True,
            description="Merges LoRAs so that each keeps its subject: one short sampling pass for each LoRA shows which "
            "signals belong to it, and a least-squares router sends them there. No training.",
            search_aliases=_ALIASES,
            inputs=[
                *_calibration_sockets(),
                *solve_inputs(),
                sample_input(),
                *scene_inputs(),
                *weight_inputs(),
                rounds_input(),
            ],
            outputs=[
                *merge_outputs(),
                SSR_CALIBRATION.Output(display_name="CALIBRATION", tooltip="For SSR Solve and SSR Save Calibration."),
                io.String.Output(display_name="report", tooltip="What was merged, how well, and what to do next."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, loras: dict[str, LoRAEntries], clip: Any = None, **values: Any) -> io.NodeOutput:
        """Calibrate, solve, apply."""
        progress = host.Progress(model)
        loaded = load(flatten(loras), model, clip, progress)
        options = solve_options(values, solve_method(values))
        check_unsupported(loaded.tasks, options.unsupported)
        calibration = calibrate(loaded, model, clip, calibration_options(values), progress)
        merged = pipeline.solve(loaded, model, clip, calibration, options, progress)
        text = merged.report.to_markdown()
        socket = pipeline.socket_of(calibration, loaded)
        return io.NodeOutput(merged.model, merged.clip, merged.lora, socket, text, ui=merge_ui(merged.report, text))


class SSRCalibrate(io.ComfyNode):
    """The slow half."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSRCalibrate",
            display_name="SSR Calibrate",
            category=CATEGORY,
            has_intermediate_output=True,
            description="Runs the calibration passes of SSR Merge once. SSR Solve then merges from them without sampling, "
            "at any strength and ridge, with any subset of the LoRAs.",
            search_aliases=[*_ALIASES, "calibration"],
            inputs=[*_calibration_sockets(), sample_input(), *scene_inputs(), rounds_input()],
            outputs=[
                SSR_CALIBRATION.Output(display_name="CALIBRATION", tooltip="For SSR Solve and SSR Save Calibration."),
                io.String.Output(display_name="report", tooltip="What each pass saw."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, loras: dict[str, LoRAEntries], clip: Any = None, **values: Any) -> io.NodeOutput:
        """Run the passes."""
        progress = host.Progress(model)
        loaded = load(flatten(loras), model, clip, progress)
        calibration = calibrate(loaded, model, clip, calibration_options(values), progress)
        socket = pipeline.socket_of(calibration, loaded)
        text = pipeline.calibration_report(socket)
        return io.NodeOutput(socket, text, ui=calibration_ui(socket, text))


class SSRSolve(io.ComfyNode):
    """The quick half."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSRSolve",
            display_name="SSR Solve",
            category=CATEGORY,
            has_intermediate_output=True,
            description="Merges LoRAs from a calibration, without sampling. Change strengths or settings and run again: "
            "only this node works.",
            search_aliases=[*_ALIASES, "lora strength", "router"],
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TIP),
                SSR_CALIBRATION.Input("calibration", tooltip="From SSR Calibrate, SSR Merge or SSR Load Calibration."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder that was calibrated, if any."),
                io.String.Input(
                    "strengths",
                    multiline=True,
                    default="",
                    tooltip="One line for each LoRA in order: its strength, or model and CLIP strength (0.8 0.5). 0 leaves "
                    "it out. Empty: as calibrated. Far from the calibrated strength the statistics are approximate.",
                ),
                lora_sockets(minimum=0),
                *solve_inputs(),
                *weight_inputs(),
            ],
            outputs=[
                *merge_outputs(),
                io.String.Output(display_name="report", tooltip="What was merged, how well, and what to do next."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        calibration: pipeline.CalibrationSocket,
        strengths: str = "",
        clip: Any = None,
        loras: dict[str, LoRAEntries] | None = None,
        **values: Any,
    ) -> io.NodeOutput:
        """Solve and apply."""
        entries = parse_strengths(strengths, pipeline.entries_of(calibration, flatten(loras)))
        progress = host.Progress(model)
        loaded = load(entries, model, clip, progress, calibration.known(model))
        options = solve_options(values, solve_method(values))
        merged = pipeline.solve(loaded, model, clip, calibration.calibration, options, progress)
        text = merged.report.to_markdown()
        return io.NodeOutput(merged.model, merged.clip, merged.lora, text, ui=merge_ui(merged.report, text))
