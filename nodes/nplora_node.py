"""NP-LoRA Merge: subject and style, without calibration."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ssr_core import DIRECTIONS, IncompatibleError, NPLoRAMerge, check_unsupported
from . import host, pipeline
from .entries import LoRAEntries
from .inputs import CATEGORY, MODEL_TIP, SSR_CALIBRATION, SSR_LORA, merge_outputs, result_inputs
from .loading import acting, load
from .options import solve_options
from .showing import merge_ui

SIDES = ("style", "content")
_DEFAULTS = NPLoRAMerge()


class SSRNPLoRAMerge(io.ComfyNode):
    """Content LoRAs kept out of the directions of a style, or the other way round."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSRNPLoRAMerge",
            display_name="NP-LoRA Merge",
            category=CATEGORY,
            has_intermediate_output=True,
            description="Merges a subject with a style without sampling: the subject's LoRA is taken out of "
            "the directions that the style reads, so that it cannot wash the style out (NP-LoRA, null-space projection).",
            search_aliases=[
                "np-lora",
                "np lora",
                "null space projection",
                "subject plus style",
                "subject and style",
                "content and style",
                "style lora merge",
                "merge lora",
                "combine loras",
            ],
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TIP),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The LoRAs' text-encoder layers are merged onto it. No prompt is needed.",
                ),
                SSR_LORA.Input("content", tooltip="SSR LoRA of the subject; a chain of them for several subjects."),
                SSR_LORA.Input("style", tooltip="SSR LoRA of the style. Strengths are set in the SSR LoRA nodes."),
                *_projection_inputs(),
                *result_inputs(),
                SSR_CALIBRATION.Input(
                    "calibration",
                    optional=True,
                    tooltip="From SSR Calibrate with the same SSR LoRA nodes. Only needed for directions by activations; "
                    "with weights it adds measured errors to the report.",
                ),
            ],
            outputs=[
                *merge_outputs(),
                io.String.Output(
                    display_name="report", tooltip="What was merged, and how much the projection removed."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        content: LoRAEntries,
        style: LoRAEntries,
        clip: Any = None,
        calibration: pipeline.CalibrationSocket | None = None,
        **values: Any,
    ) -> io.NodeOutput:
        """Project, sum, apply."""
        contents, styles = acting(content, clip), acting(style, clip)
        for side, entries in (("content", contents), ("style", styles)):
            if not entries:
                raise IncompatibleError(
                    f"{side} has no LoRA that is enabled, with a strength other than 0.",
                    remedy="enable one, or use SSR Merge or a LoRA loader for the other side alone.",
                )
        method = _method(values, len(contents), len(styles))
        if method.needs_calibration and calibration is None:
            raise IncompatibleError(
                "directions is activations, but no CALIBRATION is connected.",
                remedy="connect SSR Calibrate with the same SSR LoRA nodes, or set directions to weights.",
            )
        progress = host.Progress(model)
        known = () if calibration is None else calibration.known(model)
        loaded = load((*contents, *styles), model, clip, progress, known)
        options = solve_options(values, method)
        check_unsupported(loaded.tasks, options.unsupported)
        statistics = None if calibration is None else calibration.calibration
        merged = pipeline.solve(loaded, model, clip, statistics, options, progress)
        text = merged.report.to_markdown()
        return io.NodeOutput(merged.model, merged.clip, merged.lora, text, ui=merge_ui(merged.report, text))


def _method(values: dict[str, Any], contents: int, styles: int) -> NPLoRAMerge:
    """The method; LoRAs are in the order contents, styles."""
    protected = range(contents) if values["protect"] == "content" else range(contents, contents + styles)
    return NPLoRAMerge(
        mu=values["mu"],
        hard=values["hard"],
        protected=tuple(protected),
        energy=values["energy"],
        count=values["max_directions"],
        directions=values["directions"],
    )


def _projection_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "mu",
            default=_DEFAULTS.mu,
            min=0.0,
            max=1000.0,
            step=0.05,
            round=0.0001,
            tooltip="How far the content is taken out of the style's directions: 0 is the plain sum, 0.5 (recommended to "
            "start with) takes a third, 1 half. More favours the style. A change runs this node again, without sampling.",
        ),
        io.Boolean.Input(
            "hard",
            default=_DEFAULTS.hard,
            tooltip="Take the content out of the style's directions completely, whatever mu is. Off recommended.",
        ),
        io.Combo.Input(
            "protect",
            options=list(SIDES),
            default=SIDES[0],
            tooltip="Which side keeps its directions to itself. style (recommended) as in the paper; content if the "
            "subject loses its likeness.",
        ),
        io.Float.Input(
            "energy",
            default=_DEFAULTS.energy,
            min=0.001,
            max=1.0,
            step=0.01,
            round=0.0001,
            advanced=True,
            tooltip="Protect the fewest directions that hold this share of the protected LoRA's energy in each layer. "
            "1 protects all of them; less leaves the other side more room.",
        ),
        io.Int.Input(
            "max_directions",
            default=_DEFAULTS.count,
            min=0,
            max=4096,
            advanced=True,
            tooltip="Protect at most this many directions in each layer, the most important ones. 0 (recommended): no limit.",
        ),
        io.Combo.Input(
            "directions",
            options=list(DIRECTIONS),
            default=_DEFAULTS.directions,
            advanced=True,
            tooltip="What makes a direction important: weights (as in the paper) looks at the file alone; activations at "
            "what the protected LoRA really uses on its own prompt, and needs a CALIBRATION. They differ where "
            "energy or max_directions leave some out, and where that prompt never goes.",
        ),
    ]
