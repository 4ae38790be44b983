"""Measures, and writes speed.json, speed.md and the plots: `make bench-speed`."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from . import grid as grids
from .machine import describe
from .passes import measure
from .plots import draw
from .report import page
from .solving import exponent, measure_solve
from .storage import measure_storage

Found = dict[str, Any]

VIDEO = {"calibration_over_forward": "video", "calibration_memory": "video_memory"}
"""What is reported of the 30k-token case, and under which key."""


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    if options.threads and device.type == "cpu":
        torch.set_num_threads(options.threads)
    grid = grids.toy() if options.toy else grids.cuda() if device.type == "cuda" else grids.cpu()
    start = time.perf_counter()
    with torch.inference_mode():
        found = run(grid, device)
    found = {
        "machine": describe(device),
        "toy": options.toy,
        "minutes": round((time.perf_counter() - start) / 60, 1),
        **found,
    }
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    stem = "speed_cuda" if device.type == "cuda" else "speed"
    (out / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, out, stem)
    (out / f"{stem}.md").write_text(page(found, stem), encoding="utf-8")


def run(grid: grids.Grid, device: torch.device) -> Found:
    """All measurements of a grid, lists of rows by key."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for cell in grid.cells:
        for key, row in measure(cell, device, grid.dtype).items():
            found[key].append(_said(key, row))
        gc.collect()  # modules are cycles, and the next model needs their memory
    for key, row in measure(grid.video, device, grid.dtype).items():
        if key in VIDEO:
            case = {"frames": grid.video.shape.frames, "budget": grids.VIDEO_BUDGET}
            found[VIDEO[key]].append(_said(VIDEO[key], {**row, **case}))
    for d in grid.widths:
        for count in grid.counts:
            for rank in grid.ranks:
                repeats = 3 if count * rank > 500 else 5
                row = measure_solve(d, count, rank, grid.layers, repeats, device)
                found["solve_over_sequential"].append(_said("solve_over_sequential", row))
    for cell in grid.storage:
        found["storage"] += measure_storage(cell, cell.repeats)
    rows = found["solve_over_sequential"]
    exponents = [
        {"d": d, "of": name, "exponent_of_R": round(exponent(rows, name, d=d), 2)}
        for d in grid.widths
        for name in ("engine", "sequential", "batched", "general")
    ]
    return {**found, "solve_exponents": exponents}


def _said(key: str, row: dict[str, Any]) -> dict[str, Any]:
    print(key, row, flush=True)
    return row


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--toy", action="store_true", help="the same code at toy size, under 20 seconds")
    parser.add_argument("--out", default="docs/benchmarks", help="folder to write into")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for FLUX.1's dimensions in bfloat16")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="PyTorch's threads on the CPU (0: its own choice); 1 is timed by its processor time, more by the clock",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
