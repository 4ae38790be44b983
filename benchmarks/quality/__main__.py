"""Trains the world (once), measures, writes quality.json, quality.md and the plots: `make bench-quality`."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

from ..speed.machine import describe
from .measuring import measure
from .parts import PARTS, jobs
from .records import Kept, rows
from .report import page, plot, write_json
from .world.building import FULL, TOY, build
from .world.training import CACHE


def main() -> None:
    options = _options()
    scale = TOY if options.toy else FULL
    start = time.perf_counter()
    out = Path(options.out)
    files = out / "cache" if options.toy else Path(options.cache)
    build(files, scale, options.jobs)
    todo, kept = jobs(scale, options.only or list(PARTS)), Kept(files / "records")
    if options.go_on:
        todo = [job for job in todo if not kept.has(job.name)]
    elif not options.only:
        kept.clear()
    measure(todo, kept, scale, files, options.jobs, options.methods)
    records = kept.read([job.name for job in jobs(scale, list(PARTS))])
    found = rows(records)
    out.mkdir(parents=True, exist_ok=True)
    write_json(found, out / "quality.json")
    plot(found, "preservation", "function distance", out / "quality_function.png")
    plot(found, "preservation", "success", out / "quality_success.png")
    (out / "quality.md").write_text(page(found, records, describe(torch.device("cpu")), options.jobs), "utf-8")
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--out", default="docs/benchmarks")
    parser.add_argument("--cache", default=str(CACHE), help="where trained files and measured values are kept")
    parser.add_argument("--toy", action="store_true", help="toy size: only shows that it runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), help="run these parts, keep the others' values")
    parser.add_argument("--methods", nargs="*", default=(), help="measure these methods only, keep the others' values")
    parser.add_argument("--go-on", action="store_true", help="keep what is measured, run the rest")
    return parser.parse_args()


if __name__ == "__main__":
    main()
