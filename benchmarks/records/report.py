"""The page and the plot."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .ways import CHOSEN, WAYS

Row = dict[str, Any]
_COLOURS = ("#999999", "#E69F00", "#56B4E9", "#CC79A7", "#D55E00", "#009E73", "#F0E442", "#0072B2")
"""Okabe and Ito's, which colour-blind people tell apart."""


_INTRO = """A record keeps low-rank factors of the second moments of one LoRA's layer inputs; a merge from
records needs no forward pass. `make bench-records` writes this page."""
_LOSES = """World: a small flow transformer (width {width}, MLP {mlp}, {depth} blocks) trained for {base_steps}
steps on drawings, and {loras} LoRAs of rank 8 trained on it for {lora_steps}: little training, but inputs whose
spectrum falls off as trained ones do. Merged rank {rank}; {steps} sampling steps, the nodes' default, of {images}
pictures with 64 tokens each. Held-out: another noise. The exact route's error there is {exact:.3f}; the table has the
error from records over that one, and in brackets the relative distance of the routers, root mean squares over the
layers. All factors in half precision."""
_ENGINE = """The engine's way (bold) keeps 8 columns more than the number above it: the LoRA's own rows. They make the
router's guide exact for any LoRAs that come later; the energy that the factors lack is spread evenly over the other
directions. At the default of {columns} columns the held-out error is {plain:.4f} times the exact one's. Those are
routers alone. The nodes also correct by sampled inputs. Against a calibration that keeps the default number of
them, records of {columns} columns with {tokens} sampled inputs of each layer come to {ratio:.4f} (the default); by
number: {by}."""
_COSTS = """FLUX.1's dimensions (d = 3072, MLP 12288, 1024 image and 512 text tokens, rank 32), {columns} columns and
{tokens} sampled inputs of each layer, random inputs; measured on one double and one single block without the model's
own arithmetic, and multiplied by their number (19 and 38). {machine} Meanwhile {load:.0f} processes wanted to run on
average."""
_WHOLE = """For the whole model, by multiplication: {mb:.0f} MB and {seconds:.0f} s a LoRA beside the forward
pass, {merge:.0f} s for the statistics of two LoRAs (the solve comes on top). `budget_mb` spreads a smaller size
over the layers."""


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 118)


def page(found: dict[str, Any], machine: str) -> str:
    """records.md."""
    world, sizes = found["world"], sorted({row["columns"] for row in found["curves"]})
    lines = ["# Calibration records", "", *_wrapped(_INTRO), "", "## What it loses", ""]
    lines += _wrapped(
        _LOSES.format(**world, mlp=4 * world["width"], rank=found["merged_rank"], exact=found["exact_error"])
    )
    lines += ["", "| kept, columns | " + " | ".join(map(str, sizes)) + " |", "|---|" + "---|" * len(sizes)]
    for name in WAYS:
        cells = [_cell(found["curves"], name, size) for size in sizes]
        lines.append(f"| {'**' + name + '**' if name == CHOSEN else name} | " + " | ".join(cells) + " |")
    lines += ["", "![error over size](records.png)", ""]
    ratios = {"ratio": found["default_error_ratio"], "plain": found["default_error_ratio_unrefined"]}
    ratios["tokens"] = found["default_sampled_tokens"]
    ratios["by"] = ", ".join(f"{n}: {ratio:.3f}" for n, ratio in found["error_ratio_by_sampled_tokens"].items())
    lines += _wrapped(_ENGINE.format(columns=found["default_columns"], **ratios))
    lines += ["", *_spectra(found["spectrum"]), "## What it costs", ""]
    about = {"columns": found["default_columns"], "tokens": found["default_sampled_tokens"], "load": found["load"]}
    lines += _wrapped(_COSTS.format(machine=machine, **about))
    lines += [
        "",
        "| block | number | MB | pass, s | factors and file, s | two LoRAs from records, s |",
        "|---|---|---|---|---|---|",
        *[
            f"| {row['block']} | {row['count']} | {row['bytes'] / 1e6:.1f} | {row['pass_seconds']:.2f} | "
            f"{row['finish_seconds']:.2f} | {row['merge_seconds']:.2f} |"
            for row in found["blocks"]
        ],
        "",
    ]
    lines += _wrapped(
        _WHOLE.format(
            mb=found["bytes_per_lora"] / 1e6,
            seconds=found["seconds_per_lora"],
            merge=found["merge_seconds_per_pair"],
        )
    )
    lines.append("")
    if found["max_rank_difference"] is not None:
        lines.append(
            f"Largest relative difference between one process and several: {found['max_rank_difference']:.1e}.\n"
        )
    return "\n".join(lines)


def _cell(rows: list[Row], name: str, size: int) -> str:
    row = next(row for row in rows if row["way"] == name and row["columns"] == size)
    return f"{row['error_ratio']:.3f} ({row['router_error']:.2f})"


def _spectra(rows: list[Row]) -> list[str]:
    lines = ["Directions that hold 90 % and 99 % of a layer's energy (the first LoRA):", ""]
    lines += ["| layer | inputs | 90 % | 99 % |", "|---|---|---|---|"]
    first = [row for row in rows if row["layer"].startswith("blocks.0.")]
    lines += [
        f"| {row['layer']} | {row['inputs']} | {row['directions'][0]} | {row['directions'][1]} |"
        for row in first
        if not row["layer"].endswith((".k", ".v"))
    ]
    return [*lines, ""]


def draw(rows: list[Row], default: int, path: Path) -> None:
    """Both errors over the number of columns."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    for (name, colour), style in zip(zip(WAYS, _COLOURS, strict=True), ("--", "-") * 4, strict=True):
        mine = [row for row in rows if row["way"] == name]
        x = [row["columns"] for row in mine]
        wide = 2.4 if name == CHOSEN else 1.1
        axes[0].plot(
            x, [max(row["error_ratio"] - 1, 1e-5) for row in mine], style, color=colour, lw=wide, marker="o", ms=3
        )
        axes[1].plot(
            x, [row["router_error"] for row in mine], style, color=colour, lw=wide, marker="o", ms=3, label=name
        )
    axes[0].axhline(0.02, color="k", ls=":", lw=0.8)
    axes[0].text(min(row["columns"] for row in rows), 0.0215, "2 %", fontsize=8)
    for one in axes:
        one.axvline(default, color="k", ls=":", lw=0.8)
        one.set(xscale="log", yscale="log", xlabel="columns kept of each layer's input")
    axes[0].set(ylabel="held-out error above the exact route's")
    axes[1].set(ylabel="distance of the routers")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
