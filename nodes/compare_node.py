"""SSR Compare: several methods or settings from one calibration."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..ssr_core import METHODS, Comparison, IncompatibleError, check_unsupported, compare, parse_method
from ..ssr_core.plots import THEMES, draw_comparison
from . import host, pipeline
from .entries import LoRAEntries, flatten, parse_strengths
from .inputs import CATEGORY, MODEL_TIP, SSR_CALIBRATION, lora_sockets, merge_outputs, result_inputs
from .loading import load
from .options import solve_options
from .pictures import image_batch, theme_input

BEST = "best"
_COMPARING = 0.8
"""Share of the progress bar; the rest is the chosen merge."""


class SSRCompare(io.ComfyNode):
    """Try methods side by side, keep one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SSRCompare",
            display_name="SSR Compare",
            category=CATEGORY,
            description="Merges by several methods or settings from one calibration, without sampling, and measures each "
            "on tokens that it was not fitted on. Hands on the best one, or the one that you choose.",
            has_intermediate_output=True,
            search_aliases=[
                "compare merges",
                "compare lora merge methods",
                "best merge",
                "np-lora",
                "merge lora",
            ],
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TIP),
                SSR_CALIBRATION.Input("calibration", tooltip="From SSR Calibrate, SSR Merge or SSR Load Calibration."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder that was calibrated, if any."),
                io.String.Input(
                    "methods",
                    multiline=True,
                    default="\n".join(METHODS),
                    tooltip="One method a line, with any settings: ssr ridge=0.1 anchor=average, np_lora mu=1. Methods: "
                    f"{', '.join(METHODS)}.",
                ),
                io.String.Input(
                    "choose",
                    default=BEST,
                    tooltip="Whose merge the outputs carry: best (smallest error on held-out tokens, all LoRAs together; joint and "
                    "neutral prompts do not count), or the number of a line of methods.",
                ),
                theme_input(),
                io.String.Input(
                    "strengths",
                    multiline=True,
                    default="",
                    tooltip="One line for each LoRA in order, as in SSR Solve. Empty: as calibrated.",
                ),
                lora_sockets(minimum=0),
                *result_inputs(),
            ],
            outputs=[
                *merge_outputs(),
                io.String.Output(
                    display_name="table",
                    tooltip="A line for each method, which one is best and by what, and what to do next.",
                ),
                io.Image.Output(
                    display_name="IMAGE", tooltip="The errors as bars; the best is marked, the merge in use framed."
                ),
                io.String.Output(display_name="report", tooltip="The report of the merge in use."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        calibration: pipeline.CalibrationSocket,
        methods: str,
        choose: str,
        theme: str,
        strengths: str = "",
        clip: Any = None,
        loras: dict[str, LoRAEntries] | None = None,
        **values: Any,
    ) -> io.NodeOutput:
        """Measure all, merge by one."""
        lines = method_lines(methods)
        entries = parse_strengths(strengths, pipeline.entries_of(calibration, flatten(loras)))
        progress = host.Progress(model)
        loaded = load(entries, model, clip, progress, calibration.known(model))
        check_unsupported(loaded.tasks, values["unsupported"])
        begin = progress.reached
        comparison = compare(
            loaded.tasks,
            lines,
            calibration.calibration,
            device=host.compute_device(model),
            unsupported=values["unsupported"],
            tick=lambda done, total: progress.at(begin + _COMPARING * (1 - begin) * done / total),
        )
        chosen = chosen_row(comparison, choose)
        options = solve_options(values, parse_method(lines[chosen]))
        merged = pipeline.solve(loaded, model, clip, calibration.calibration, options, progress)
        table, image = comparison.to_markdown(chosen), draw_comparison(comparison, THEMES[theme], chosen)
        images = image_batch([image])
        text = merged.report.to_markdown()
        return io.NodeOutput(
            merged.model, merged.clip, merged.lora, table, images, text, ui=ui.PreviewImage(images, cls=cls)
        )


def method_lines(text: str) -> list[str]:
    """Non-empty lines without what follows a #."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def chosen_row(comparison: Comparison, choose: str) -> int:
    """Index of the row that `choose` means.

    Raises:
        IncompatibleError: There is no such row, or its method does not apply.
    """
    word = choose.strip()
    if word.lower() in (BEST, ""):
        return comparison.best
    labels = [row.label for row in comparison.rows]
    index = labels.index(word) if word in labels else int(word) - 1 if word.isdecimal() else -1
    if not 0 <= index < len(labels):
        raise IncompatibleError(
            f"choose is {choose!r}.", remedy=f"write best, or a number from 1 to {len(labels)} (the lines of methods)."
        )
    if comparison.rows[index].refused:
        raise IncompatibleError(f"{labels[index]} does not apply.", remedy=comparison.rows[index].refused)
    return index
