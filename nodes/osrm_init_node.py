"""OSRM Init: the start of a LoRA that will merge well."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..ssr_core import INIT_STYLES, LAYER_CHOICES, InitOptions, MomentOptions
from . import host, osrm_init
from .inputs import CATEGORY, calibration_inputs, optional_calibration_inputs
from .moment_inputs import features_input, moment_inputs
from .options import DTYPES, calibration_options, moment_options

_INIT = InitOptions()


def _main_inputs() -> list[io.Input]:
    template = io.Autogrow.TemplatePrefix(
        io.Conditioning.Input("other", tooltip="What another task's LoRA shows."), prefix="other", min=0, max=50
    )
    return [
        io.Model.Input("model", tooltip="The base model. LoRAs already on it stay active."),
        io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts. Not needed with CONDITIONINGs alone."),
        io.String.Input(
            "prompts",
            multiline=True,
            default="",
            tooltip="What the OTHER LoRAs show, one prompt a line: those that this one will be merged with. Each "
            "costs one pass. The more, the better they are avoided.",
        ),
        io.Autogrow.Input(
            "others",
            template=template,
            tooltip="CONDITIONINGs of other tasks. A new socket appears as you connect.",
        ),
        io.String.Input(
            "filename_prefix",
            default="osrm_init",
            tooltip="Name below output/loras. _0_steps and a number are added (core's Train LoRA reads the steps "
            "from the name); nothing is overwritten.",
        ),
        io.Int.Input(
            "rank",
            default=_INIT.rank,
            min=1,
            max=1024,
            tooltip="Rank of the LoRA that will be trained; 16 recommended, and the same in the trainer.",
        ),
        io.Combo.Input(
            "layers",
            options=list(LAYER_CHOICES),
            default=_INIT.layers,
            tooltip="linear: linear layers and 1x1 convolutions; all: larger convolutions too; attention: those "
            "with attn or attention in their path. A trainer starts the others its own way.",
        ),
        features_input(MomentOptions().features),
        io.Combo.Input(
            "key_style",
            options=list(INIT_STYLES),
            default=_INIT.style,
            tooltip="Names inside the file: comfy for core's Train LoRA (existing_lora), kohya for kohya-style "
            "trainers (network_weights).",
        ),
    ]


def _advanced_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "energy",
            default=_INIT.energy,
            min=0.01,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Share of the energy of the others' inputs that the LoRA keeps out of. 1: all of it, as in the "
            "paper; less leaves more directions to learn in.",
        ),
        io.Float.Input(
            "alpha",
            default=_INIT.alpha,
            min=0.0001,
            max=1024.0,
            step=0.5,
            round=0.0001,
            advanced=True,
            tooltip="Alpha in the file. kohya-style trainers take it; core's Train LoRA always starts from 1.",
        ),
        io.String.Input(
            "only",
            default=_INIT.only,
            advanced=True,
            tooltip="Regular expression that the path of a layer has to contain, e.g. double_blocks. Empty: all.",
        ),
        io.Boolean.Input(
            "text_encoder",
            default=_INIT.text_encoder,
            advanced=True,
            tooltip="Give layers of CLIP a start too (prompts only). Core's Train LoRA does not train them.",
        ),
        io.Combo.Input(
            "dtype",
            options=[name for name in DTYPES if name != "auto"],
            default="float32",
            advanced=True,
            tooltip="Precision of the file; float32 recommended.",
        ),
    ]


class SSROSRMInit(io.ComfyNode):
    """A start for training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSROSRMInit",
            display_name="OSRM Init",
            category=CATEGORY,
            description="Writes a LoRA to start training from: it reads only directions that the other tasks' prompts do "
            "not use, and changes nothing yet. What trains from there disturbs those tasks less.",
            search_aliases=["osrm", "train lora", "existing lora", "orthogonal lora", "network weights", "lora init"],
            is_output_node=True,
            inputs=[
                *_main_inputs(),
                *calibration_inputs(),
                *optional_calibration_inputs(),
                *_advanced_inputs(),
                *moment_inputs(),
            ],
            outputs=[
                io.Combo.Output(
                    display_name="existing_lora", tooltip="For core's Train LoRA: the file's name below output/loras."
                ),
                io.String.Output(display_name="path", tooltip="Where the file is, for network_weights."),
                io.String.Output(display_name="report", tooltip="Which layers have a start, and what it avoids."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        prompts: str,
        filename_prefix: str,
        clip: Any = None,
        others: dict[str, list[Any]] | None = None,
        **values: Any,
    ) -> io.NodeOutput:
        """Gather, choose directions, write."""
        path, name = osrm_init.init_path(filename_prefix)
        loaded = osrm_init.other_tasks(prompts, list((others or {}).values()), clip)
        options = InitOptions(
            values["rank"],
            values["alpha"],
            values["layers"],
            values["only"],
            values["text_encoder"],
            values["energy"],
            values["key_style"],
            DTYPES[values["dtype"]],
        )
        passes, moments = calibration_options(values), moment_options(values)
        report = osrm_init.write_init(path, loaded, model, clip, passes, moments, options, host.Progress(model))
        return io.NodeOutput(name, str(path), report, ui=ui.PreviewText(f"{path}\n\n{report}"))
