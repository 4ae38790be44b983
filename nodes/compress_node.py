"""SSR Compress: a smaller file of the same merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..ssr_core import KEY_STYLES, LIMITS, CompressOptions, IncompatibleError
from . import compressing, host, pipeline
from .inputs import CATEGORY, LORA_MODEL, MODEL_TIP, SSR_CALIBRATION, merge_outputs
from .loading import load

_DEFAULTS = CompressOptions()


class SSRCompress(io.ComfyNode):
    """Lower ranks, chosen by what a merged LoRA does to real inputs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSRCompress",
            display_name="SSR Compress",
            category=CATEGORY,
            description="Makes a merged LoRA smaller: in every layer it keeps what the calibrated outputs need most, and "
            "leaves out the rest. Goes between SSR Merge or SSR Solve and SSR Save LoRA.",
            has_intermediate_output=True,
            search_aliases=[
                "compress lora",
                "resize lora",
                "lora rank",
                "shrink lora",
                "smaller lora",
                "truncate lora",
            ],
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TIP),
                LORA_MODEL.Input(
                    "lora", tooltip="From SSR Merge, SSR Solve, NP-LoRA Merge or another merge of this pack."
                ),
                io.Clip.Input("clip", optional=True, tooltip="The CLIP that was merged, if one was connected there."),
                SSR_CALIBRATION.Input(
                    "calibration",
                    optional=True,
                    tooltip="What the merge was solved from. Without it weights decide alone (the usual truncated SVD), "
                    "which keeps less of what the LoRA does at the same size.",
                ),
                *_limit_inputs(),
                *_advanced_inputs(),
            ],
            outputs=[
                *merge_outputs(),
                io.String.Output(display_name="report", tooltip="Rank and error of every layer."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        lora: Mapping[str, Tensor],
        clip: Any = None,
        calibration: pipeline.CalibrationSocket | None = None,
        **values: Any,
    ) -> io.NodeOutput:
        """Truncate, apply."""
        if not isinstance(lora, pipeline.MergedLoRA):
            raise IncompatibleError(
                "this LORA_MODEL does not come from SSR-Merge.",
                remedy="connect LORA_MODEL of SSR Merge, SSR Solve, NP-LoRA Merge or another merge of this pack; a single LoRA goes "
                "through them too.",
            )
        options = CompressOptions(
            values["limit"], values[values["limit"]], values["ridge"], values.get("key_style", _DEFAULTS.key_style)
        )
        progress = host.Progress(model)
        known = () if calibration is None else calibration.known(model)
        loaded = load(lora.origin.entries, model, clip, progress, known)
        statistics = None if calibration is None else calibration.calibration
        merged, report = compressing.compressed(lora.origin, loaded, model, clip, statistics, options, progress)
        text = report.to_markdown()
        return io.NodeOutput(merged.model, merged.clip, merged.lora, text, ui=ui.PreviewText(text))


def _limit_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "limit",
            options=list(LIMITS),
            default=_DEFAULTS.limit,
            tooltip="What sets the size: rank for every layer; error that each layer may have, which chooses its rank; "
            "megabytes of the file, or share of its size, which go to the layers that need them most.",
        ),
        io.Int.Input(
            "rank",
            default=int(_DEFAULTS.value),
            min=1,
            max=4096,
            tooltip="For limit rank: the rank of every layer; layers of a lower rank stay as they are. 32 recommended.",
        ),
        io.Float.Input(
            "error",
            default=0.05,
            min=0.0001,
            max=1.0,
            step=0.01,
            round=0.0001,
            tooltip="For limit error: the relative error of each layer's outputs on the calibrated prompts. 0.05 "
            "recommended.",
        ),
        io.Float.Input(
            "megabytes",
            default=150.0,
            min=0.001,
            max=100000.0,
            step=1.0,
            round=0.001,
            tooltip="For limit megabytes: the size of the file, without its header of names.",
        ),
        io.Float.Input(
            "share",
            default=0.5,
            min=0.001,
            max=1.0,
            step=0.05,
            round=0.001,
            tooltip="For limit share: the size as a share of what it was. 0.5 recommended.",
        ),
    ]


def _advanced_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "ridge",
            default=_DEFAULTS.ridge,
            min=0.0,
            max=10.0,
            step=0.01,
            round=0.0001,
            advanced=True,
            tooltip="How much inputs count that calibration did not see. 0 (recommended) is exact on those that it saw; "
            "0.01 keeps more for prompts far from the calibrated ones.",
        ),
        io.Combo.Input(
            "key_style",
            options=list(KEY_STYLES),
            default=_DEFAULTS.key_style,
            optional=True,
            advanced=True,
            tooltip="For limit megabytes and share: the key_style that SSR Save LoRA will have. diffusers files of models "
            "with fused layers are larger, for each of q, k and v takes a copy of what they share.",
        ),
    ]
