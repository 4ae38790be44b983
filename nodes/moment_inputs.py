"""Inputs of the nodes that gather whole layer inputs."""

from __future__ import annotations

from comfy_api.latest import io

from ..ssr_core import FEATURES, Features, MomentOptions

_MOMENTS = MomentOptions()


def features_input(default: Features) -> io.Combo.Input:
    """What counts as a task's input."""
    return io.Combo.Input(
        "features",
        options=list(FEATURES),
        default=default,
        tooltip="What counts as a task's input: means (as in the paper) takes the mean over the tokens of each pass, "
        "tokens takes every token. With few prompts and steps there are few means: take tokens then.",
    )


def moment_inputs() -> list[io.Input]:
    """Advanced: how much is kept of a layer's inputs."""
    return [
        io.Int.Input(
            "exact_limit",
            default=_MOMENTS.exact_limit,
            min=0,
            max=16384,
            advanced=True,
            tooltip="Layers with up to this many inputs keep their exact covariance (inputs squared, 4 bytes each); "
            f"wider ones a sketch. {_MOMENTS.exact_limit} recommended.",
        ),
        io.Int.Input(
            "sketch",
            default=_MOMENTS.sketch,
            min=8,
            max=4096,
            advanced=True,
            tooltip="Columns of the sketch of wide layers. It knows about as many directions; of the others it knows the "
            f"total energy, so that the report gives estimates with bounds. {_MOMENTS.sketch} recommended; more takes memory.",
        ),
    ]
