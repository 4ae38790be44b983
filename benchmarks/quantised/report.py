"""The page that the measurements become."""

from __future__ import annotations

from typing import Any

ACCURACY = """# Merges on quantised base models

How much of the merged LoRA acts when it is patched into the base weights (`weights`) and when it is added in
the forward pass (`forward`). Each layer's output is compared with the base model's own layer on the same
input; the error is that of the difference against the saved LoRA in float64, relative to what the LoRA should
add. Mean and maximum over the layers that have a LoRA. `size` is the median of |change| / |weight|: each merge
was measured at the test LoRAs' full strength and at a twentieth of it. More than 100 %: rounding the patched
weights again changed the output by more than the LoRA did. Tiny random models in ComfyUI on a CPU, float32
activations, merged LoRA in float32; not a claim about images of real checkpoints.
Plain LoRAs: what the conversion of a DoRA or LoKr leaves over is a patch in any case.

In short: in the forward pass nothing is lost that float32 would show. Patched into fp8 weights, a LoRA of a quarter
to a third of the weight loses 14 to 32 %, one of a sixtieth more than all of itself. So `auto` takes forward for every
kind below (tests/host/test_quantised.py checks that).

| base | model | size | weights, mean | weights, max | forward, mean | forward, max |
|---|---|---|---|---|---|---|"""

KINDS = """
`unscaled_*` is UNETLoader's weight_dtype; it also stores the layers that the other files leave in float32.
`scaled_fp8` is the older layout with one scale a matrix. `nvfp4_smoothed` has a pre_quant_scale: there ComfyUI
multiplies the input inside the layer, so that a patched weight sees another input than the LoRA was trained
for. `packed` is a loader in the manner of the GGUF packs; it adds patches in float whenever a layer unpacks, so
nothing is lost there, and forward saves that work. Formats without a row: ComfyUI 0.33 loads no svdquant and no
int4 files other than these.

## Time of a step
"""


def page(found: dict[str, Any]) -> str:
    """Markdown from what `__main__` measured."""
    lines = [ACCURACY]
    for row in sorted(found["accuracy"], key=lambda row: (row["kind"], row["case"], -row["scale"])):
        cells = " | ".join(_share(row[apply][part]) for apply in ("weights", "forward") for part in ("mean", "max"))
        model = row["case"].split("-")[0]
        lines.append(f"| {row['kind']} | {model} | {row['relative_size']:.3f} | {cells} |")
    lines += [
        KINDS,
        f"CPU time on one thread, PyTorch {found['torch']}; medians, forward and weights by turns, on a busy machine.",
        "Not measured on a GPU.",
        "",
        "Tiny Flux, one model call in ComfyUI. At this size the fixed cost of the hooks is what shows.",
        "",
        "| base | weights, ms | forward, ms | forward / weights |",
        "|---|---|---|---|",
        *(f"| {row['kind'] or 'float32'} | {_times(row, 1)} |" for row in found["steps"]),
        "",
        "Four layers of width 1024 (MLP 4096) alone. `arithmetic` is the ratio of multiplications.",
        "",
        "| base | tokens | rank | weights, ms | forward, ms | forward / weights | arithmetic |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["stack"]:
        lines.append(
            f"| {row['kind']} | {row['tokens']} | {row['rank']} | {_times(row, 0)} | {row['arithmetic']:.3f} |"
        )
    return "\n".join([*lines, "", "`make bench-quantised COMFYUI_PATH=...` writes this page.", ""])


def _share(value: float) -> str:
    return f"{value:.0e}" if value < 1e-3 else f"{100 * value:.1f} %"


def _times(row: dict[str, Any], digits: int) -> str:
    both = (f"{1e3 * row['seconds'][apply]:.{digits}f}" for apply in ("weights", "forward"))
    return f"{' | '.join(both)} | {row['ratio']:.3f}"
