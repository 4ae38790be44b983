"""Calibration records: what a merge from them loses over their size, and what one costs.

`make bench-records` writes docs/benchmarks/records.{md,json,png}.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ranks import max_rank_difference
from benchmarks.speed.machine import describe, sentence
from ssr_core import RecordOptions

from .cost import Block, flux, measure, whole
from .report import draw, page
from .ways import CHOSEN, WAYS, curves, gram_of
from .world import TOY, Size, World, spectrum

SIZES, TOY_SIZES = (4, 8, 16, 32, 64, 128), (2, 8)
SAMPLES = (32, 64, 128, 256)
CACHE = Path(".cache/records")


def default_ratio(rows: list[dict[str, Any]]) -> float:
    """Held-out error at the default size over the exact one's; log-linear between the sizes around it."""
    columns = RecordOptions().columns
    mine = sorted((row["columns"], row["error_ratio"]) for row in rows if row["way"] == CHOSEN)
    below = max((row for row in mine if row[0] <= columns), default=mine[0])
    above = min((row for row in mine if row[0] >= columns), default=mine[-1])
    if below[0] == above[0]:
        return float(below[1])
    share = math.log(columns / below[0]) / math.log(above[0] / below[0])
    return float(below[1] + share * (above[1] - below[1]))


def main() -> None:
    """Train what the cache lacks, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--toy", action="store_true", help="a size that only shows that everything runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = TOY if options.toy else Size()
    world = World(size, options.cache / "toy" if options.toy else options.cache)
    begin = time.perf_counter()
    rows = curves(world, TOY_SIZES if options.toy else SIZES)
    default = gram_of(world, WAYS[CHOSEN][0], RecordOptions().columns, True)
    refined = {str(tokens): world.refined(default, tokens) for tokens in SAMPLES}
    model: dict[str, Block] = flux(96 if options.toy else 3072)
    costs = [measure(kind, block, RecordOptions()) for kind, block in model.items()]
    total = whole(costs)
    found = {
        "default_error_ratio": refined[str(RecordOptions().sampled_tokens)],
        "error_ratio_by_sampled_tokens": refined,
        "default_sampled_tokens": RecordOptions().sampled_tokens,
        "default_error_ratio_unrefined": default_ratio(rows),
        "default_columns": RecordOptions().columns,
        "bytes_per_lora": round(total["bytes"]),
        "seconds_per_lora": total["pass_seconds"] + total["finish_seconds"],
        "merge_seconds_per_pair": total["merge_seconds"],
        "max_rank_difference": max_rank_difference(),
        "exact_error": world.exact[0],
        "merged_rank": sum(next(iter(world.stacks.values())).basis_ranks),
        "curves": rows,
        "blocks": costs,
        "spectrum": spectrum(world),
        "world": vars(size),
        "load": os.getloadavg()[0],
        "machine": describe(torch.device("cpu")),
        "seconds": time.perf_counter() - begin,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "records.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "records.md").write_text(page(found, sentence(found["machine"])), encoding="utf-8")
    draw(rows, RecordOptions().columns, options.out / "records.png")
    print(f"default_error_ratio {found['default_error_ratio']:.4f}, {total['bytes'] / 1e6:.0f} MB a LoRA")


if __name__ == "__main__":
    main()
