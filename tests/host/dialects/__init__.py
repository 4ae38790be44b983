"""How trainers name the layers of each family, written down from the trainers' side.

Nothing here is read back from the host's key map: a name that the host does not know must show.
"""

from __future__ import annotations

from collections.abc import Mapping

from . import flux_kin, image_dits, unets, video_dits
from .naming import SPELLINGS, Dialect, Entry, Naming, Shape, native
from .unets import TEXT_DIALECTS

__all__ = ["DIALECTS", "PRIMARY", "SPELLINGS", "TEXT_DIALECTS", "Dialect", "Entry", "Naming", "Shape", "all_names"]

DIALECTS: dict[str, dict[str, Dialect]] = {
    **flux_kin.DIALECTS,
    **unets.DIALECTS,
    **image_dits.DIALECTS,
    **video_dits.DIALECTS,
}
_NAMINGS: dict[str, Naming] = {**flux_kin.NAMINGS, **unets.NAMINGS, **image_dits.NAMINGS, **video_dits.NAMINGS}

PRIMARY = {family: "kohya" if family in ("sd15", "sdxl") else "native" for family in DIALECTS}
"""The dialect in which every kind of adapter is tried."""


def all_names(family: str, modules: Mapping[str, Shape]) -> dict[str, Entry]:
    """Every name that a file for this family may use, over all namings and prefixes."""
    names = {}
    for naming in (native, _NAMINGS.get(family, native)):
        for entry in naming(modules):
            names["lora_unet_" + entry.name.replace(".", "_")] = entry
            for prefix in ("diffusion_model.", "transformer.", "unet."):
                names[prefix + entry.name] = entry
    return names
