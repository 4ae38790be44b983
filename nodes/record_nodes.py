"""SSR Record and SSR Merge from Records: calibrate each LoRA once, merge any set of them."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from comfy_api.latest import io, ui

from ..ssr_core import SMALL_RECORDS, check_unsupported
from . import host, pipeline, recording
from .entries import LoRAEntries, flatten
from .inputs import (
    CATEGORY,
    MODEL_TIP,
    SSR_CALIBRATION,
    calibration_inputs,
    lora_sockets,
    merge_outputs,
    optional_calibration_inputs,
    sample_input,
    solve_inputs,
)
from .loading import load
from .options import calibration_options, solve_method, solve_options
from .record_inputs import record_size_inputs
from .record_weights import parse_prompt_weights, put_together, record_notes
from .showing import merge_ui

_CLIP_TIP = "Encodes the prompts; text-encoder layers of the LoRAs are recorded too."
_ALIASES = ["calibrate once", "lora library", "reuse calibration", "merge without sampling"]


class SSRRecord(io.ComfyNode):
    """Make the records of LoRAs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSRRecord",
            display_name="SSR Record",
            category=CATEGORY,
            description="Runs each LoRA's calibration pass once and keeps what it says about the layers' inputs, so that "
            "SSR Merge from Records can merge it with any others later. LoRAs that have a record are skipped.",
            search_aliases=["record lora", *_ALIASES],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TIP),
                io.Clip.Input("clip", optional=True, tooltip=_CLIP_TIP),
                lora_sockets(minimum=1),
                *calibration_inputs(),
                *optional_calibration_inputs(),
                *record_size_inputs(),
                sample_input(),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="Which records were made, where, and their size.")
            ],
        )

    @classmethod
    def execute(cls, model: Any, loras: dict[str, LoRAEntries], clip: Any = None, **values: Any) -> io.NodeOutput:
        """Run what is missing."""
        options = recording.recording_options(values)
        progress = host.Progress(model)
        loaded = load(flatten(loras), model, clip, progress)
        begin = time.perf_counter()
        found = recording.obtain(loaded, model, clip, calibration_options(values), options, progress)
        lines = ["# SSR Record", "", found.sentence(), ""]
        lines += [
            f"- {one.identity.task.name}: {one.path} ({one.path.stat().st_size / 1e6:.1f} MB)" for one in found.files
        ]
        if found.made:
            lines.append(f"\n{time.perf_counter() - begin:.1f} s in all.")
        text = "\n".join(lines) + "\n"
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class SSRMergeFromRecords(io.ComfyNode):
    """A merge that needs no pass where records are there."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSRMergeFromRecords",
            display_name="SSR Merge from Records",
            category=CATEGORY,
            description="Merges any set of LoRAs from their records, without sampling. A LoRA that has none is recorded "
            "first: one pass, and never again.",
            has_intermediate_output=True,
            search_aliases=["merge lora", "combine loras", *_ALIASES],
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TIP),
                io.Clip.Input("clip", optional=True, tooltip=_CLIP_TIP),
                lora_sockets(minimum=1),
                *calibration_inputs(),
                *optional_calibration_inputs(),
                *solve_inputs(),
                *_own_inputs(),
                *record_size_inputs(),
                sample_input(),
            ],
            outputs=[
                *merge_outputs(),
                SSR_CALIBRATION.Output(
                    display_name="CALIBRATION", tooltip="For SSR Solve, SSR Edit Calibration, SSR Save Calibration."
                ),
                io.String.Output(display_name="report", tooltip="What was merged, how well, and from which records."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, loras: dict[str, LoRAEntries], clip: Any = None, **values: Any) -> io.NodeOutput:
        """Look up or record, then solve and apply."""
        progress = host.Progress(model)
        loaded = load(flatten(loras), model, clip, progress)
        solving = solve_options(values, solve_method(values))
        check_unsupported(loaded.tasks, solving.unsupported)
        weights = parse_prompt_weights(values.get("prompt_weights", ""), loaded)
        options = recording.recording_options(values)
        sampling = calibration_options(values)
        found = recording.obtain(loaded, model, clip, sampling, options, progress)
        loaded, found, calibration = put_together(loaded, found, weights, sampling, values["small_records"])
        merged = pipeline.solve(loaded, model, clip, calibration, solving, progress)
        report = replace(
            merged.report,
            notes=(*merged.report.notes, *record_notes(found, calibration.settings)),
        )
        text = report.to_markdown()
        socket = pipeline.socket_of(calibration, loaded)
        return io.NodeOutput(merged.model, merged.clip, merged.lora, socket, text, ui=merge_ui(report, text))


def _own_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "missing",
            options=list(recording.MISSING),
            default=recording.MISSING[0],
            tooltip="LoRAs without a record of these prompts, strengths, seed, steps and size: record runs their pass "
            "once and keeps it; refuse stops and says how the nearest record differs.",
        ),
        io.String.Input(
            "prompt_weights",
            multiline=True,
            default="",
            advanced=True,
            tooltip="One line for each LoRA: a weight for each of its prompts, e.g. 1 0.5. 0 leaves a prompt out. Empty: "
            "all count alike. Changing weights runs no pass.",
        ),
        io.Combo.Input(
            "small_records",
            options=list(SMALL_RECORDS),
            default=SMALL_RECORDS[0],
            advanced=True,
            tooltip="Records that keep fewer directions of a layer than the LoRAs read there: accept merges and says so "
            "in the report; refuse stops and says which columns would do.",
        ),
    ]
