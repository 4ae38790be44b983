"""Trains the world (once), measures, writes quality.json, quality.md and the plots: `make bench-quality`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..speed.machine import describe
from .measuring import measure
from .parts import PARTS, Job, jobs_of, method_names
from .records import Kept, rows
from .report import page, plot, write_json
from .world.building import FULL, TOY, build, fingerprint
from .world.training import CACHE


def main() -> None:
    options = _options()
    scale = TOY if options.toy else FULL
    start = time.perf_counter()
    out = Path(options.out)
    files = out / "cache" if options.toy else Path(options.cache)
    build(files, scale, options.processes)
    kept = Kept(files / f"records_{fingerprint(files, scale)}")
    if not (options.only or options.methods or options.go_on):
        kept.clear()
    todo = jobs_of(scale, options.only or list(PARTS), options.methods)
    if options.go_on:
        todo = _left(todo, kept)
    measure(todo, kept, scale, files, options.processes, add=bool(options.methods or options.go_on))
    records = [one for job in jobs_of(scale, list(PARTS)) for one in sorted(kept.read(job.name), key=job.place)]
    found = rows(records)
    out.mkdir(parents=True, exist_ok=True)
    write_json(found, out / "quality.json")
    plot(found, "preservation", "function distance", out / "quality_function.png")
    plot(found, "preservation", "success", out / "quality_success.png")
    machine = describe(torch.device("cpu")) | {"threads": 1}
    (out / "quality.md").write_text(page(found, records, machine, options.processes), "utf-8")
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")


def _left(todo: Sequence[Job], kept: Kept) -> list[Job]:
    """What is not measured yet."""
    found = []
    for job in todo:
        done = kept.methods(job.name)
        missing = tuple(name for name in job.methods if done is None or name not in done)
        if done is None or missing:
            found.append(replace(job, methods=missing))
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--out", default="docs/benchmarks")
    parser.add_argument("--cache", default=str(CACHE), help="where trained files and measured values are kept")
    parser.add_argument("--toy", action="store_true", help="toy size: only shows that it runs")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="of one thread each")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="run these parts, keep the others' values")
    parser.add_argument("--methods", nargs="+", default=[], help="measure these methods, keep the others' values")
    parser.add_argument("--go-on", action="store_true", help="keep what is measured, run what is missing")
    options = parser.parse_args()
    unknown = set(options.methods) - method_names(TOY if options.toy else FULL)
    if unknown:
        parser.error(f"no such method: {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    main()
