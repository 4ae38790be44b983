"""Trains the world (once), measures, writes quality.json, quality.md and the plots: `make bench-quality`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from ..speed.machine import describe
from .ablation import ablation, neutral_prompts, steps_and_tokens, wording
from .methods import Method, careful, compared, protecting, protecting_several, sampling_of, told, without_slow
from .protocols import baseline, composition, preservation
from .records import Record, rows
from .report import page, plot, write_json
from .sisters import crowd_styled, starts, styled
from .world.building import FULL, TOY, World, build
from .world.training import CACHE

Methods = dict[str, Method]
Part = Callable[[World, range, Callable[[Methods], Methods]], Iterator[Record]]


PARTS: dict[str, Part] = {
    "baseline": lambda world, seeds, chosen: baseline(world),
    "preservation": lambda world, seeds, chosen: preservation(
        world, chosen(compared(sampling_of(world)) | careful(sampling_of(world))), world.scale.ks, seeds
    ),
    "composition": lambda world, seeds, chosen: composition(
        world, chosen(without_slow(compared(sampling_of(world))) | told(sampling_of(world))), seeds
    ),
    "styled": lambda world, seeds, chosen: styled(
        world,
        chosen(without_slow(compared(sampling_of(world))) | told(sampling_of(world)) | protecting(sampling_of(world))),
        seeds,
    ),
    "crowd": lambda world, seeds, chosen: crowd_styled(
        world,
        chosen(
            without_slow(compared(sampling_of(world)))
            | told(sampling_of(world))
            | protecting_several(sampling_of(world))
        ),
        seeds,
    ),
    "starts": lambda world, seeds, chosen: starts(world, seeds[:3]),
    "solve": lambda world, seeds, chosen: ablation(world, seeds[:3]),
    "data": lambda world, seeds, chosen: steps_and_tokens(world, seeds[:3]),
    "neutral": lambda world, seeds, chosen: neutral_prompts(world, seeds[:3]),
    "wording": lambda world, seeds, chosen: wording(world, seeds[:3]),
    "many": lambda world, seeds, chosen: preservation(
        world,
        chosen(without_slow(compared(sampling_of(world)) | careful(sampling_of(world)))),
        world.scale.many,
        seeds[:2],
        table="many subjects",
    ),
}
"""Independent parts of the benchmark."""


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    scale = TOY if options.toy else FULL
    start = time.perf_counter()
    world = build(Path(options.cache) if not options.toy else Path(options.out) / "cache", scale)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "records.jsonl" if options.toy else Path(options.cache) / "records.jsonl"
    records = [] if not options.only or not kept.exists() else _load(kept)

    def chosen(methods: Methods) -> Methods:
        return {name: one for name, one in methods.items() if not options.methods or name in options.methods}

    for name, part in PARTS.items():
        if options.only and name not in options.only:
            continue
        for record in part(world, range(scale.seeds), chosen):
            records = [one for one in records if _place(one) != _place(record)] + [record]
            if record.metric in ("function distance", "both", "all right"):
                print(f"{name}: K {record.k} seed {record.seed} {record.method} {record.value:.3f}", flush=True)
                _keep(records, kept)
        _keep(records, kept)
    found_rows = rows(records)
    write_json(found_rows, out / "quality.json")
    plot(found_rows, "preservation", "function distance", out / "quality_function.png")
    plot(found_rows, "preservation", "success", out / "quality_success.png")
    minutes = round((time.perf_counter() - start) / 60, 1)
    (out / "quality.md").write_text(page(found_rows, records, describe(torch.device("cpu")), minutes), "utf-8")


def _keep(records: list[Record], path: Path) -> None:
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in records), encoding="utf-8")


def _place(record: Record) -> tuple[str, str, int, str, int]:
    return record.table, record.method, record.k, record.metric, record.seed


def _load(path: Path) -> list[Record]:
    return [Record(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--out", default="docs/benchmarks")
    parser.add_argument("--cache", default=str(CACHE), help="where trained files are kept")
    parser.add_argument("--toy", action="store_true", help="toy size: only shows that it runs")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), help="run these parts, keep the others' values")
    parser.add_argument("--methods", nargs="*", help="measure these methods only, where a part compares methods")
    return parser.parse_args()


if __name__ == "__main__":
    main()
