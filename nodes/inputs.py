"""Inputs and outputs that several nodes share, as a person sees them."""

from __future__ import annotations

from comfy_api.latest import io

from ..ssr_core import ANCHORS, METHODS, PASS_DEFAULTS, PaddingMode, SampleOptions, SSRMerge
from . import host
from .forward import APPLY
from .options import DTYPES

SSR_LORA = io.Custom("SSR_LORA")
SSR_CALIBRATION = io.Custom("SSR_CALIBRATION")
LORA_MODEL = io.Custom("LORA_MODEL")
LORA_STACK = io.Custom("LORA_STACK")

CATEGORY = "model/merging/SSR-Merge"
PADDING: tuple[PaddingMode, ...] = ("balance", "include", "exclude")
UNSUPPORTED = ("refuse", "pass_through")
UNSEEN = ("anchor", "refuse")
_DEFAULTS = SSRMerge()
MODEL_TIP = "The base model that the LoRAs were trained for. LoRAs already on it stay active and are not merged."


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
            default=PASS_DEFAULTS["seed"],
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Noise of the calibration passes, the same for every LoRA. Any value works; keep it fixed, or every "
            "run calibrates again.",
        ),
        io.Int.Input(
            "steps",
            default=PASS_DEFAULTS["steps"],
            min=1,
            max=100,
            tooltip="Sampling steps of each calibration pass. 4 (recommended) looks at several noise levels; 1, as in the "
            "paper, takes a quarter of the time and merges worse.",
        ),
        io.Int.Input("width", default=PASS_DEFAULTS["width"], min=16, max=8192, step=8, tooltip=_size_tip("Width")),
        io.Int.Input("height", default=PASS_DEFAULTS["height"], min=16, max=8192, step=8, tooltip=_size_tip("Height")),
        io.Int.Input(
            "frames",
            default=PASS_DEFAULTS["frames"],
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
            default=PASS_DEFAULTS["scheduler"],
            advanced=True,
            tooltip="Which noise levels the steps visit; simple recommended. At 1 step every scheduler starts from pure noise.",
        ),
        io.Combo.Input(
            "padding",
            options=list(PADDING),
            default=PASS_DEFAULTS["padding"],
            advanced=True,
            tooltip="Padded text tokens: balance (recommended) lets them count at most as much as the prompt's own, "
            "include counts all alike, exclude leaves them out.",
        ),
        io.Float.Input(
            "memory_budget_gb",
            default=PASS_DEFAULTS["memory_budget_gb"],
            min=0.0,
            max=1024.0,
            step=0.5,
            advanced=True,
            tooltip="Memory that the statistics may take, in GiB; the node stops with the amount needed if that is "
            "more. 0: half of the main memory that is free, and half of the GPU's.",
        ),
    ]


def sample_input() -> io.Int.Input:
    """How many whole inputs calibration keeps; came later, so it stands last in its nodes."""
    return io.Int.Input(
        "sampled_tokens",
        default=PASS_DEFAULTS["sampled_tokens"],
        min=0,
        max=4096,
        optional=True,
        advanced=True,
        tooltip="Whole layer inputs that calibration keeps of each layer and LoRA, to tell LoRAs apart by more than they "
        f"read themselves. {SampleOptions().tokens} recommended; fewer merge worse and take less memory (about 0.8 GB "
        "of main memory for each of up to 5 LoRAs of Flux at 256; joint and neutral prompts count like LoRAs, and more of them "
        "share that room). 0: none, as in the paper.",
    )


def scene_inputs() -> list[io.Input]:
    """Prompts of several LoRAs or none; they came later, so they stand last in their nodes."""
    return [
        io.String.Input(
            "joint_prompts",
            multiline=True,
            default="",
            optional=True,
            tooltip="Prompts that show several of the LoRAs in one picture (two subjects, a subject in a style), one a "
            "line, as you will use them. Without one, routing keeps one LoRA there and mutes the others. All LoRAs act "
            "under such a prompt; [alice, bob] before it names some, by file name, or by number among those switched on. Each takes one more pass.",
        ),
        io.String.Input(
            "neutral_prompts",
            multiline=True,
            default="",
            optional=True,
            advanced=True,
            tooltip="Prompts that show none of the LoRAs, one a line: there the model should stay as it is. Four "
            "that differ (a street, a forest, people, food) took about a third off what merges do to other pictures in "
            "our tests, at little cost to the LoRAs. Each takes one more pass.",
        ),
    ]


def rounds_input() -> io.Int.Input:
    """How often the passes run; came later than everything else."""
    return io.Int.Input(
        "rounds",
        default=PASS_DEFAULTS["rounds"],
        min=1,
        max=4,
        optional=True,
        advanced=True,
        tooltip="1: each LoRA alone. 2: then all passes again with the merge in the model, which learns what its own small "
        "errors change; better pictures, twice the passes, and up to 4 times the memory of the statistics. More gains little.",
    )


def weight_inputs() -> list[io.Input]:
    """What scenes count. They came later than the rest of the solve's settings, so they stand last in their nodes."""
    joint = io.Float.Input(
        "joint_weight",
        default=_DEFAULTS.joint_weight,
        min=0.0,
        max=100.0,
        step=0.5,
        round=0.001,
        optional=True,
        advanced=True,
        tooltip="ssr: how much joint prompts count against each LoRA's own. More makes pictures that show several LoRAs "
        f"better and those of one LoRA worse; {_DEFAULTS.joint_weight:g} recommended, 4 if one of them is weak there. SSR "
        "Solve tries values without new passes. No effect without joint prompts.",
    )
    neutral = io.Float.Input(
        "neutral_weight",
        default=_DEFAULTS.neutral_weight,
        min=0.0,
        max=100.0,
        step=0.01,
        round=0.001,
        optional=True,
        advanced=True,
        tooltip="ssr: how much all neutral prompts count together, as a share of all LoRAs together. More keeps other "
        f"pictures as they are and costs the LoRAs; {_DEFAULTS.neutral_weight:g} recommended, 0.2 if pictures without the "
        "LoRAs still change. SSR Solve tries values without new passes. Hardly any effect without neutral prompts.",
    )
    return [joint, neutral]


def solve_inputs() -> list[io.Input]:
    """Advanced settings of the solve."""
    return [
        io.Combo.Input(
            "mode",
            options=list(METHODS),
            default=SSRMerge.name,
            advanced=True,
            tooltip="ssr (recommended) routes each signal to its LoRA; paper is the published formula (with padding at include and steps at 1 to the letter); "
            "gains scales each LoRA; sum is what chained loaders do; average divides by their number; np_lora keeps the "
            "others out of the last LoRA's directions (NP-LoRA Merge has its settings).",
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
        *result_inputs(),
    ]


def result_inputs() -> list[io.Input]:
    """Advanced settings of what is made of a merge, whatever the method."""
    return [
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


def merge_outputs() -> list[io.Output]:
    """MODEL, CLIP and LORA_MODEL of a merge."""
    return [
        io.Model.Output(display_name="MODEL", tooltip="The model with the merged LoRA; goes straight into KSampler."),
        io.Clip.Output(
            display_name="CLIP", tooltip="The text encoder with the merged LoRA; encode your prompts with it."
        ),
        LORA_MODEL.Output(
            display_name="LORA_MODEL", tooltip="The merged LoRA, for SSR Save LoRA or core's LoRA nodes."
        ),
    ]


def _size_tip(side: str) -> str:
    return (
        f"{side} of the calibration pass in pixels. It only needs to show the model typical signals: 512 is enough, "
        "larger costs time."
    )
