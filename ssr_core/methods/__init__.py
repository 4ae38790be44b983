"""The registry of merge methods. A new method is one file and one line here."""

from __future__ import annotations

from .base import MergedFactors, MergeMethod, RefitMethod, RoleMethod, RouterView, routes
from .linear import AverageMerge, GainsMerge, SumMerge
from .nplora import DIRECTIONS, Directions, NPLoRAMerge
from .paper import PaperMerge
from .ssr import SSRMerge

METHODS: dict[str, type[MergeMethod]] = {
    method.name: method for method in (SSRMerge, PaperMerge, GainsMerge, SumMerge, AverageMerge, NPLoRAMerge)
}

__all__ = [
    "DIRECTIONS",
    "METHODS",
    "AverageMerge",
    "Directions",
    "GainsMerge",
    "MergeMethod",
    "MergedFactors",
    "NPLoRAMerge",
    "PaperMerge",
    "RefitMethod",
    "RoleMethod",
    "RouterView",
    "SSRMerge",
    "SumMerge",
    "routes",
]
