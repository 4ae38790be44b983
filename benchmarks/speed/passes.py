"""Calibration and whole merges: against bare passes, the arithmetic, and the published algorithm."""

from __future__ import annotations

from typing import Any

import torch

from .arithmetic import Cell, factor_bytes, gram_bytes, layers, predicted_ratio, transient_bytes
from .memory import peak_bytes
from .timing import Spread, by_turns
from .workbench import Workbench

Row = dict[str, Any]


def measure(cell: Cell, device: torch.device, dtype: torch.dtype) -> dict[str, Row]:
    """All figures of one configuration, by key of the .json; times and memory in separate runs."""
    bench = Workbench(cell, device, dtype)
    runs: dict[str, Any] = {
        "bare": bench.bare,
        "plain": bench.plain,
        "calibrate": bench.calibrate,
        "merge": bench.merge,
        "resolve": lambda: bench.merge(0.7),
    }
    if cell.memory:
        runs |= {"sampled": bench.calibrate_sampled, "refined": bench.refined}
    if cell.against:
        runs |= {"published": bench.published, "unjudged": lambda: bench.merge(judge=False)}
    times = by_turns(runs, cell.repeats, device)
    rows = _times(cell, times)
    if cell.against:
        rows["merge_time_over_published"]["router_difference"] = float(f"{bench.router_difference():.2g}")
    if cell.memory:
        rows |= _memory(cell, bench)
    return rows


def _times(cell: Cell, times: dict[str, list[float]]) -> dict[str, Row]:
    bare, calibrate, merge = times["bare"], times["calibrate"], times["merge"]

    def over(values: list[float], base: list[float]) -> Spread:
        return Spread.of([one / other for one, other in zip(values, base, strict=True)])

    whole = [one + other for one, other in zip(calibrate, merge, strict=True)]
    predicted = predicted_ratio(cell)
    ratio = over(calibrate, bare)
    rows: dict[str, Row] = {
        "calibration_over_forward": {
            **cell.name,
            **ratio.json(),
            "predicted": round(predicted, 4),
            "overhead_over_predicted": round((ratio.median - 1) / (predicted - 1), 3),
            "plain_lora_over_forward": over(times["plain"], bare).json()["median"],
            "bare_seconds": Spread.of(bare).json()["median"],
            "repeats": cell.repeats,
        },
        "resolve_over_merge": {
            **cell.name,
            **over(times["resolve"], whole).json(),
            "merge_seconds": Spread.of(whole).json()["median"],
            "resolve_seconds": Spread.of(times["resolve"]).json()["median"],
        },
    }
    if cell.memory:
        rows["sampling"] = {
            **cell.name,
            **over(times["sampled"], bare).json(),
            "over_plain_calibration": over(times["sampled"], calibrate).json()["median"],
            "refined_over_plain_merge": over(times["refined"], merge).json()["median"],
            "refined_seconds": Spread.of(times["refined"]).json()["median"],
            "layers": len(layers(cell.shape)),
        }
    if cell.against:
        ours = [one - other for one, other in zip(whole, bare, strict=True)]
        theirs = [one - other for one, other in zip(times["published"], bare, strict=True)]
        unjudged = [a + b - c for a, b, c in zip(calibrate, times["unjudged"], bare, strict=True)]
        rows["merge_time_over_published"] = {
            **cell.name,
            **_overhead(ours, theirs),
            "overhead_seconds": Spread.of(ours).json()["median"],
            "published_overhead_seconds": Spread.of(theirs).json()["median"],
            "whole_over_whole": over(whole, times["published"]).json()["median"],
            "without_judging": _overhead(unjudged, theirs)["median"],
            "arithmetic_alone": float(f"{(predicted - 1) * Spread.of(bare).median / Spread.of(theirs).median:.4g}"),
        }
    return rows


def _overhead(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Small differences over the median of others: within one repetition either may drown in noise."""
    middle = Spread.of(theirs).median
    return Spread.of([one / middle for one in ours]).json()


def _memory(cell: Cell, bench: Workbench) -> dict[str, Row]:
    """Peaks above a bare pass. Results and statistics count: they are alive at the end of each run."""
    device = bench.device
    bare = peak_bytes(lambda: bench.one(0), device)
    bench.calibration = bench.sampled = bench.answer = None
    calibrate = peak_bytes(bench.calibrate, device)
    merge = peak_bytes(bench.merge, device)
    on_cpu, itemsize = device.type == "cpu", bench.dtype.itemsize
    kept = gram_bytes(cell, on_cpu)
    predicted = kept + factor_bytes(cell, itemsize, on_cpu) + transient_bytes(cell, itemsize)
    rows: dict[str, Row] = {
        "calibration_memory": {
            **cell.name,
            "median": calibrate - bare,
            "predicted": predicted,
            "grams": kept,
            "bare": bare,
            "over_predicted": round((calibrate - bare) / predicted, 3),
            "with_samples": _sampled_bytes(bench) - bare,
        }
    }
    if cell.against:
        bench.calibration = None
        whole = peak_bytes(bench.whole, device) - bare
        bench.calibration = None
        published = peak_bytes(bench.published, device) - bare
        rows["merge_memory_over_published"] = {
            **cell.name,
            "median": float(f"{whole / published:.4g}"),
            "bytes": whole,
            "published_bytes": published,
            "solve_bytes": merge,
        }
    return rows


def _sampled_bytes(bench: Workbench) -> int:
    bench.calibration = None
    peak = peak_bytes(bench.calibrate_sampled, bench.device)
    bench.sampled = None
    return peak
