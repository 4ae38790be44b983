"""A merge truncated by its outputs beside the plain truncated SVD of the same merge, at equal size.

World: the demo's stub transformer (random weights) with its three planted LoRAs, merged by SSR: layers
of rank 24. The error is that of the truncated layer's outputs against the whole merge's, relative,
computed densely from the layers' inputs in float64, as root mean square over layers: on the inputs of
the calibration passes (each LoRA alone at work), and on noise that calibration did not see. The ridge
weighs inputs in all directions beside those seen. The budget columns share the bytes of an equal rank
out over the layers.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

from demo.__main__ import CALIBRATION_SEED, HELD_OUT_SEEDS, PROMPTS, read_tasks
from demo.loras import SIGMA, layer_inputs, noise
from demo.model import StubTransformer
from ssr_core import (
    CompressOptions,
    LoRALayer,
    MergeResult,
    SSRMerge,
    Tap,
    Target,
    Task,
    build_stacks,
    calibrate,
    compress,
    merge,
)

RANKS, MODEL_SEEDS = (1, 2, 4, 6, 8, 12, 16, 20, 24), (0, 1, 2)
OUT = Path("docs/benchmarks")
Inputs = Mapping[str, Sequence[Tensor]]
KINDS = {
    "plain SVD": "plain truncated SVD",
    "outputs": "by outputs",
    "outputs, ridge 0.01": "by outputs, ridge 0.01",
    "outputs, ridge 0.1": "by outputs, ridge 0.1",
    "plain SVD, budget": "plain truncated SVD, size shared out",
    "outputs, budget": "by outputs, size shared out",
    "outputs, ridge 0.01, budget": "by outputs, ridge 0.01, size shared out",
}


def inputs_of(model: StubTransformer, tasks: Sequence[Task], seeds: Sequence[int]) -> Inputs:
    """What every layer reads with each LoRA alone at work, one (N, in) for each, the noise of all seeds together."""
    found: dict[str, list[Tensor]] = {}
    for index, prompt in enumerate(PROMPTS):
        rows: dict[str, list[Tensor]] = {}
        for seed in seeds:
            tap = Tap(build_stacks(tasks), (index,), "include")
            with tap.attached(model), layer_inputs(model) as inputs:
                model(noise(seed), SIGMA, [prompt])
            for path, x in inputs.items():
                rows.setdefault(path, []).append(x.double())
        for path, parts in rows.items():
            found.setdefault(path, []).append(torch.cat(parts))
    return found


def output_error(whole: Mapping[Target, LoRALayer], small: Mapping[Target, LoRALayer], inputs: Inputs) -> float:
    """Root mean square over layers of the relative error; every prompt weighs the same."""
    squares = []
    for target, layer in whole.items():
        left = energy = 0.0
        change = small[target].delta() - layer.delta()
        for x in inputs[target.module_path]:
            left += float((x @ change.T).square().sum()) / len(x)
            energy += float((x @ layer.delta().T).square().sum()) / len(x)
        squares.append(left / energy)
    return math.sqrt(statistics.fmean(squares))


def _run(model: StubTransformer, prompt: str) -> None:
    model(noise(CALIBRATION_SEED), SIGMA, [prompt])


def measure(seed: int, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """All kinds at all ranks on one random model."""
    model = StubTransformer(seed=seed)
    with TemporaryDirectory() as folder:
        tasks = read_tasks(model, Path(folder))
    calibration = calibrate(model, tasks, build_stacks(tasks), lambda i, tap: _run(model, PROMPTS[i]))
    result = merge(tasks, SSRMerge(), calibration)
    seen, unseen = inputs_of(model, tasks, (CALIBRATION_SEED,)), inputs_of(model, tasks, HELD_OUT_SEEDS)
    rows = []
    for rank in ranks:
        size = compress(result, CompressOptions("rank", rank))[1].bytes_after
        for kind in KINDS:
            ridge = float(kind.split("ridge ")[1].split(",")[0]) if "ridge" in kind else 0.0
            limit = ("megabytes", size / 1e6) if "budget" in kind else ("rank", rank)
            known = () if kind.startswith("plain") else (tasks, calibration)
            small, report = compress(result, CompressOptions(*limit, ridge), *known)
            half = _rounded(small)
            rows.append(
                {
                    "seed": seed,
                    "rank": rank,
                    "kind": kind,
                    "bytes": report.bytes_after,
                    "calibrated": output_error(result.layers, small.layers, seen),
                    "held_out": output_error(result.layers, small.layers, unseen),
                    "calibrated_fp16": output_error(result.layers, half, seen),
                }
            )
    return rows


def _rounded(result: MergeResult) -> dict[Target, LoRALayer]:
    """The same factors as a float16 file holds them."""
    return {
        target: LoRALayer(layer.down.half(), layer.up.half(), layer.alpha, layer.kernel)
        for target, layer in result.layers.items()
    }


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    found = [row for seed in MODEL_SEEDS for row in measure(seed, RANKS)]
    rows = []
    for rank in RANKS:
        for kind in KINDS:
            own = [row for row in found if (row["rank"], row["kind"]) == (rank, kind)]
            medians = {
                name: statistics.median(row[name] for row in own)
                for name in ("bytes", "calibrated", "held_out", "calibrated_fp16")
            }
            rows.append({"rank": rank, "kind": kind, **medians})
    pairs = {(row["seed"], row["rank"], row["kind"]): row["calibrated"] for row in found}
    ratio = max(pairs[s, r, "outputs"] / pairs[s, r, "plain SVD"] for s in MODEL_SEEDS for r in RANKS if r < max(RANKS))
    record = {"largest_ratio_to_plain_on_calibrated_outputs": ratio, "seeds": len(MODEL_SEEDS), "rows": rows}
    (OUT / "compression.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (OUT / "compression.md").write_text(page(rows, ratio), encoding="utf-8")
    draw(rows, OUT / "compression.png")
    print(f"largest ratio to the plain SVD on calibrated outputs: {ratio:.3f}")


def page(rows: Sequence[Mapping[str, Any]], ratio: float) -> str:
    """docs/benchmarks/compression.md."""
    lines = ["# Compression", "", *(__doc__ or "").strip().splitlines(), ""]
    lines += [f"Median over {len(MODEL_SEEDS)} random models. `make bench-compression` writes this page.", ""]
    lines += [
        f"At equal ranks the error on calibrated outputs is at most {ratio:.3f} times that of the plain SVD, in every",
        "model and at every rank below the full one.",
        "",
        "![Error over size](compression.png)",
        "",
    ]
    for name, title in (
        ("calibrated", "Calibrated outputs"),
        ("held_out", "Outputs on noise that calibration did not see"),
        ("calibrated_fp16", "Calibrated outputs, factors rounded to float16"),
    ):
        lines += [f"## {title}", "", "| rank | " + " | ".join(KINDS.values()) + " |", "|---" * (len(KINDS) + 1) + "|"]
        for rank in RANKS:
            values = {row["kind"]: row[name] for row in rows if row["rank"] == rank}
            lines.append(f"| {rank} | " + " | ".join(f"{values[kind]:.2g}" for kind in KINDS) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Two panels, calibrated and held-out outputs, over size."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    styles = {"plain SVD": "C1o-", "outputs": "C0o-", "plain SVD, budget": "C1s--", "outputs, budget": "C0s--"}
    for axis, name, title in zip(axes, ("calibrated", "held_out"), ("calibrated outputs", "unseen noise"), strict=True):
        for kind, style in styles.items():
            own = [row for row in rows if row["kind"] == kind and row["rank"] < max(RANKS)]
            axis.plot([r["bytes"] / 1e6 for r in own], [r[name] for r in own], style, ms=4, lw=1, label=KINDS[kind])
        axis.set(yscale="log", xlabel="size, MB", title=title)
    axes[0].set_ylabel("relative error of the outputs")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
