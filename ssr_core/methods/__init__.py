"""The registry of merge methods. A new method is one file and one line here."""

from __future__ import annotations

from .base import MergedFactors, MergeMethod
from .linear import AverageMerge, GainsMerge, SumMerge
from .paper import PaperMerge
from .ssr import SSRMerge

METHODS: dict[str, type[MergeMethod]] = {
    method.name: method for method in (SSRMerge, PaperMerge, GainsMerge, SumMerge, AverageMerge)
}

__all__ = [
    "METHODS",
    "AverageMerge",
    "GainsMerge",
    "MergeMethod",
    "MergedFactors",
    "PaperMerge",
    "SSRMerge",
    "SumMerge",
]
