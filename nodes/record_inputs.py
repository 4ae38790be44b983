"""Inputs that the nodes around records share."""

from __future__ import annotations

from comfy_api.latest import io

from ..ssr_core import RecordOptions
from .recording import STORES

_DEFAULTS = RecordOptions()


def record_size_inputs() -> list[io.Input]:
    """Advanced: how much new records keep, and where they go."""
    return [
        io.Int.Input(
            "columns",
            default=_DEFAULTS.columns,
            min=1,
            max=4096,
            advanced=True,
            tooltip="Directions of each layer's input that a new record keeps beside the LoRA's own, which are exact; "
            "64 recommended. More is closer to a calibration run and a larger file. Smaller records are made again.",
        ),
        io.Int.Input(
            "exact_limit",
            default=_DEFAULTS.exact_limit,
            min=0,
            max=16384,
            advanced=True,
            tooltip="Layers with up to this many inputs keep all of their statistics instead of columns; 256 recommended, more "
            "makes larger files.",
        ),
        io.Float.Input(
            "budget_mb",
            default=_DEFAULTS.budget_mb,
            min=0.0,
            max=1e6,
            step=1.0,
            advanced=True,
            tooltip="Most MB of a new record, spread over its layers by what they need. 0: no limit but columns.",
        ),
        io.Combo.Input(
            "store",
            options=list(STORES),
            default=STORES[0],
            advanced=True,
            tooltip="Where new records go: library is output/calibrations/records; beside the LoRA is its own folder, "
            "from where they travel with it. Both are searched.",
        ),
    ]
