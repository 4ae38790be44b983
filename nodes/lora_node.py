"""SSR LoRA: one LoRA with its strengths and calibration prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..ssr_core import RESTS, ConvertOptions, IncompatibleError, Rest
from . import host
from .entries import (
    LoRAEntries,
    entries_from_stack,
    entry_from_file,
    entry_from_tensors,
    file_hash,
    prompt_lines,
)
from .inputs import CATEGORY, LORA_MODEL, LORA_STACK, SSR_LORA

NO_FILE = "None"
_CONVERT = ConvertOptions()


class SSRLoRA(io.ComfyNode):
    """One LoRA for SSR Merge."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        strength: dict[str, Any] = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
        return io.Schema(
            node_id="SSRLoRA",
            display_name="SSR LoRA",
            category=CATEGORY,
            description="One LoRA with its strength and the prompts that call it up. Connect it to SSR Merge.",
            search_aliases=["lora", "lora stack", "merge lora", "combine characters"],
            inputs=[
                io.Combo.Input(
                    "lora",
                    options=[NO_FILE, *host.lora_files()],
                    tooltip="The LoRA file. None if a LORA_MODEL or a stack is connected instead.",
                ),
                io.Float.Input(
                    "strength_model",
                    **strength,
                    tooltip="Strength on the diffusion model, as in Load LoRA. 1 as trained, 0 leaves it out.",
                ),
                io.Float.Input(
                    "strength_clip",
                    **strength,
                    tooltip="Strength on the text encoder, as in Load LoRA. Only matters if the LoRA has such layers.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="What this LoRA shows, with its trigger word: a photo of sks dog. One prompt a line, each "
                    "costs one calibration pass. Prompts of different LoRAs must differ: the difference is what the "
                    "router learns.",
                ),
                io.Boolean.Input("enabled", default=True, tooltip="Off: the merge is made without this LoRA."),
                SSR_LORA.Input("previous", optional=True, tooltip="Another SSR LoRA: chain as many as you like."),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="Replaces the prompts for the diffusion model, where it needs more than text (reference or start "
                    "images); one pass. A LoRA with text-encoder layers needs a prompt as well: CLIP learns from that.",
                ),
                LORA_MODEL.Input(
                    "lora_model", optional=True, tooltip="A LoRA from Train LoRA or SSR Merge; replaces the file."
                ),
                LORA_STACK.Input(
                    "lora_stack",
                    optional=True,
                    tooltip="A stack of (name, model strength, CLIP strength) from another pack; replaces the file and "
                    "the strengths. Write one prompt line for each LoRA of the stack.",
                ),
                *_conversion_inputs(),
            ],
            outputs=[
                SSR_LORA.Output(
                    display_name="loras",
                    tooltip="For SSR Merge, SSR Calibrate, the next SSR LoRA, or any node that takes LoRAs.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str | None = None, **_: Any) -> str:
        """The file's content, so that a replaced file is noticed and a touched one is not."""
        return "" if lora is None or lora == NO_FILE else file_hash(host.lora_path(lora))

    @classmethod
    def execute(
        cls,
        lora: str,
        strength_model: float,
        strength_clip: float,
        prompts: str,
        enabled: bool,
        previous: LoRAEntries | None = None,
        conditioning: list[Any] | None = None,
        lora_model: dict[str, Any] | None = None,
        lora_stack: list[Any] | None = None,
        convert_rank: int = _CONVERT.max_rank,
        convert_error: float = _CONVERT.tolerance,
        residual: Rest = _CONVERT.rest,
    ) -> io.NodeOutput:
        """Make the entry; nothing is read but the file's hash."""
        before = previous or ()
        convert = ConvertOptions(convert_rank, convert_error, residual)
        if not enabled:
            return io.NodeOutput(before)
        if lora_model is not None and lora_stack is not None:
            raise IncompatibleError("both a LORA_MODEL and a stack are connected.", remedy="disconnect one of them.")
        lines = prompt_lines(prompts)
        if lora_stack is not None and conditioning is not None:
            raise IncompatibleError(
                "a CONDITIONING cannot be shared by the LoRAs of a stack.",
                remedy="write one prompt line for each LoRA of the stack, or use one SSR LoRA for each.",
            )
        if lora_stack is not None:
            stacked = entries_from_stack(lora_stack, prompts)
            return io.NodeOutput((*before, *(replace(entry, convert=convert) for entry in stacked)))
        if lora_model is not None:
            entry = entry_from_tensors(lora_model, strength_model, strength_clip, lines, conditioning)
        elif lora != NO_FILE:
            entry = entry_from_file(lora, strength_model, strength_clip, lines, conditioning)
        else:
            raise IncompatibleError(
                "SSR LoRA has no LoRA.", remedy="choose a file, connect a LORA_MODEL or a stack, or switch it off."
            )
        return io.NodeOutput((*before, replace(entry, convert=convert)))


def _conversion_inputs() -> list[io.Input]:
    """Optional, so that graphs saved before they existed still run."""
    return [
        io.Int.Input(
            "convert_rank",
            default=_CONVERT.max_rank,
            min=0,
            max=1024,
            optional=True,
            advanced=True,
            tooltip="Only for LoHa, LoKr, DoRA, OFT, GLoRA and full differences: the largest rank of a layer that they "
            "are turned into. 128 recommended; more keeps more and costs memory and time. 0: do not convert.",
        ),
        io.Float.Input(
            "convert_error",
            default=_CONVERT.tolerance,
            min=0.0,
            max=1.0,
            step=0.0001,
            round=0.000001,
            optional=True,
            advanced=True,
            tooltip="The relative error that a converted layer may have; the smallest rank that keeps it is taken. "
            "0.001 recommended.",
        ),
        io.Combo.Input(
            "residual",
            options=list(RESTS),
            default=_CONVERT.rest,
            optional=True,
            advanced=True,
            tooltip="What convert_rank cuts off: pass_through (recommended) applies it to MODEL and CLIP as an ordinary "
            "patch, the saved file lacks it; drop leaves it out. The report says how much it is.",
        ),
    ]
