"""Saving and loading: calibrations, and the merged LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..ssr_core import KEY_STYLES, KeyStyle, load_calibration, save_calibration
from . import paths, pipeline, saving
from .entries import file_hash
from .inputs import CATEGORY, LORA_MODEL, SSR_CALIBRATION
from .model_source import model_source


class SSRSaveCalibration(io.ComfyNode):
    """Keep a calibration."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSRSaveCalibration",
            display_name="SSR Save Calibration",
            category=CATEGORY,
            description="Writes a calibration below the output folder. It holds statistics, not the LoRAs themselves.",
            search_aliases=["save calibration"],
            is_output_node=True,
            inputs=[
                SSR_CALIBRATION.Input(
                    "calibration", tooltip="From SSR Calibrate, SSR Merge, or any node with this output."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="ssr",
                    tooltip="Name below output/calibrations; a number is added, nothing is overwritten.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file is.")],
        )

    @classmethod
    def execute(cls, calibration: pipeline.CalibrationSocket, filename_prefix: str) -> io.NodeOutput:
        """Write the file."""
        path = paths.output_path(filename_prefix, paths.CALIBRATION_SUFFIX, paths.CALIBRATION_FOLDER)
        save_calibration(calibration.calibration, path)
        return io.NodeOutput(str(path), ui=ui.PreviewText(str(path)))


class SSRLoadCalibration(io.ComfyNode):
    """Take a calibration up again."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSRLoadCalibration",
            display_name="SSR Load Calibration",
            category=CATEGORY,
            description="Reads a saved calibration. SSR Solve finds its LoRAs in the loras folders by name and checks their content.",
            search_aliases=["load calibration"],
            inputs=[
                io.Combo.Input(
                    "calibration",
                    options=paths.calibration_files(),
                    tooltip="A file that SSR Save Calibration wrote. Press R after saving a new one.",
                )
            ],
            outputs=[
                SSR_CALIBRATION.Output(
                    display_name="CALIBRATION",
                    tooltip="For SSR Solve, SSR Compare, SSR Report and the other nodes that take it.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, calibration: str | None = None, **_: Any) -> str:
        """The file's content."""
        return "" if calibration is None else file_hash(paths.calibration_path(calibration))

    @classmethod
    def execute(cls, calibration: str) -> io.NodeOutput:
        """Read the file."""
        return io.NodeOutput(pipeline.socket_of(load_calibration(paths.calibration_path(calibration))))


class SSRSaveLoRA(io.ComfyNode):
    """Write the merged LoRA as a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSRSaveLoRA",
            display_name="SSR Save LoRA",
            category=CATEGORY,
            description="Writes a merged LoRA as an ordinary file, loads it back the way ComfyUI does and compares it with "
            "the live merge before it gets its name.",
            search_aliases=["save lora", "export lora"],
            is_output_node=True,
            inputs=[
                LORA_MODEL.Input(
                    "lora", tooltip="From a merge or OSRM Refit; other LORA_MODELs are written as they are."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="loras/ssr_merged",
                    tooltip="Name below the output folder; below loras/ the file shows up in LoRA loaders after a "
                    "refresh (R). A number is added, nothing is overwritten.",
                ),
                io.Combo.Input(
                    "key_style",
                    options=list(KEY_STYLES),
                    default="comfy",
                    tooltip="Names inside the file: comfy (diffusion_model.*, loads everywhere in ComfyUI), kohya "
                    "(lora_unet_*), diffusers (transformer.*, where the model family has them). LORA_MODELs that are no merge "
                    "of this pack, those of OSRM Refit too, only as comfy.",
                ),
                io.Boolean.Input(
                    "report",
                    default=True,
                    optional=True,
                    tooltip="Also write the merge's report as <name>.report.json beside the file: every number of SSR "
                    "Report, for every layer. Other LORA_MODELs have none.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file is.")],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, lora: Mapping[str, Tensor], filename_prefix: str, key_style: KeyStyle, report: bool = True
    ) -> io.NodeOutput:
        """Write, check, rename."""
        path = paths.output_path(filename_prefix, ".safetensors")
        source = model_source(cls.hidden.prompt, cls.hidden.unique_id)
        saving.save_lora(lora, path, key_style, source, report=report)
        return io.NodeOutput(str(path), ui=ui.PreviewText(str(path)))
