"""SSR Report: what a merge did, or would do, in pictures and words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..ssr_core import IncompatibleError, MergeReport, SSRMerge, merge
from ..ssr_core.plots import THEMES, report_pages
from . import host, pipeline
from .inputs import CATEGORY, LORA_MODEL, SSR_CALIBRATION
from .loading import load
from .pictures import image_batch, theme_input

FORECAST = (
    "This is a forecast from the calibration, with mode ssr and its default settings: nothing was merged. "
    "Compatibility and crosstalk of the plain sum do not depend on the mode."
)


class SSRReport(io.ComfyNode):
    """Look at a merge, or at a calibration before merging."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSRReport",
            display_name="SSR Report",
            category=CATEGORY,
            description="Shows what a merge did: whose branch speaks under whose prompt, how much of each LoRA is kept, "
            "where in the model the LoRAs fight, and what to do next. From a calibration alone it tells beforehand which "
            "LoRAs will fight.",
            search_aliases=["lora compatibility", "lora interference", "crosstalk", "merge report", "diagnostics"],
            is_output_node=True,
            inputs=[
                LORA_MODEL.Input(
                    "lora",
                    optional=True,
                    tooltip="The LORA_MODEL of SSR Merge, SSR Solve, NP-LoRA Merge or another merge of this pack: reports on it.",
                ),
                SSR_CALIBRATION.Input(
                    "calibration",
                    optional=True,
                    tooltip="Instead of lora: reports on what this calibration shows before anything is merged.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The base model that was calibrated. Needed with calibration only: the LoRAs are read for it.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="With calibration: the text encoder that was calibrated, if any."
                ),
                theme_input(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="IMAGE",
                    tooltip="Crosstalk, errors, map of the model before and after: one picture each, in a batch.",
                ),
                io.String.Output(
                    display_name="report", tooltip="All of it in words (Markdown); what to do next is last."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        theme: str,
        lora: Mapping[str, Tensor] | None = None,
        calibration: pipeline.CalibrationSocket | None = None,
        model: Any = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        """Draw and write."""
        if lora is not None:
            report = _of_merge(lora)
        elif calibration is not None:
            report = _of_calibration(calibration, model, clip)
        else:
            raise IncompatibleError(
                "there is nothing to report on.",
                remedy="connect the LORA_MODEL of a merge, or a CALIBRATION and MODEL.",
            )
        images = image_batch(report_pages(report, THEMES[theme]))
        return io.NodeOutput(images, report.to_markdown(), ui=ui.PreviewImage(images, cls=cls))


def _of_merge(lora: Mapping[str, Tensor]) -> MergeReport:
    if not isinstance(lora, pipeline.MergedLoRA):
        raise IncompatibleError(
            "this LORA_MODEL does not come from SSR-Merge, so nothing is known about it.",
            remedy="connect the LORA_MODEL of SSR Merge, SSR Solve, SSR Compare or NP-LoRA Merge.",
        )
    return lora.origin.result.report


def _of_calibration(calibration: pipeline.CalibrationSocket, model: Any, clip: Any) -> MergeReport:
    if model is None:
        raise IncompatibleError(
            "a calibration holds statistics, not the LoRAs; they are read again for a model.",
            remedy="connect the MODEL that was calibrated (and CLIP, if it was).",
        )
    progress = host.Progress(model)
    loaded = load(pipeline.entries_of(calibration, ()), model, clip, progress, calibration.known(model))
    report = merge(
        loaded.tasks,
        SSRMerge(),
        calibration.calibration,
        device=host.compute_device(model),
        unsupported="pass_through",
        tick=lambda done, total: progress.at(done / max(1, total)),
    ).report
    return replace(report, notes=(FORECAST, *report.notes), forecast=True)
