"""Calibration shared by processes: time over their number beside the ideal line, and the difference to one alone.

World: the demo's stub transformer (random weights, float64, width 192, 4 blocks) with four random LoRAs
of rank 8 and four prompts each: 16 passes of 8 images. Each process has one thread; time runs from a
common start until every process has the summed statistics, without starting Python. The difference is
that of the Grams and of the solved layers' changes to those of one process, the largest relative
Frobenius norm over all layers and process counts.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from demo.loras import SIGMA, noise
from demo.model import StubTransformer
from ssr_core import (
    Adapter,
    LoRALayer,
    SSRMerge,
    Target,
    Task,
    build_stacks,
    calibrate_sharded,
    joined,
    load_calibration,
    merge,
    save_calibration,
)

SIZES, REPEATS, LORAS, RANK, PROMPTS, BATCH = (1, 2, 4), 3, 4, 8, 4, 8
OUT = Path("docs/benchmarks")


def world(d: int = 192, depth: int = 4) -> tuple[StubTransformer, list[Task]]:
    """The model and its tasks, the same in every process."""
    model = StubTransformer(d=d, depth=depth)
    prompts = [tuple(f"subject{k} in place{j}" for j in range(PROMPTS)) for k in range(LORAS)]
    tasks = []
    for k in range(LORAS):
        generator = torch.Generator().manual_seed(k)
        layers = {}
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                shape = module.weight.shape
                down = torch.randn(RANK, shape[1:].numel(), generator=generator, dtype=torch.float64)
                up = torch.randn(shape[0], RANK, generator=generator, dtype=torch.float64)
                layers[Target(path)] = LoRALayer(down / down.shape[1] ** 0.5, up / RANK, None, tuple(shape[2:]))
        tasks.append(Task(Adapter(f"lora{k}", f"lora{k}", layers), prompts=prompts[k]))
    return model.double(), tasks


def work(folder: Path, d: int, depth: int) -> None:
    """One process: calibrate, keep what came out and how long it took."""
    torch.set_num_threads(1)
    model, tasks = world(d, depth)
    stacks = build_stacks(tasks)
    for stack in stacks:
        _ = stack.basis  # made once, as when a LoRA is loaded

    def run(index: int, prompt: int, tap: object) -> None:
        model(noise(7, BATCH).double(), SIGMA, [tasks[index].prompts[prompt]] * BATCH)

    with joined() as ranks:
        if ranks.size > 1:
            dist.barrier()
        began, busy = time.perf_counter(), time.process_time()
        calibration = calibrate_sharded(model, tasks, stacks, run, ranks)
        spent = time.perf_counter() - began, time.process_time() - busy
    (folder / f"{ranks.rank}.json").write_text(json.dumps(spent), encoding="utf-8")
    if ranks.rank == ranks.size - 1:
        save_calibration(calibration, folder / "calibration.safetensors")


def measure(size: int, folder: Path, d: int = 192, depth: int = 4) -> tuple[float, float]:
    """Seconds of the slowest of several processes, and CPU seconds of the busiest."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "benchmarks.ranks",
        "--work",
        str(folder),
        "--width",
        str(d),
        "--depth",
        str(depth),
    ]
    running = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]
    if any(process.wait() for process in running):
        raise RuntimeError("a process failed; its message is above")
    spent = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    return max(wall for wall, _ in spent), max(busy for _, busy in spent)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp_min(1e-300))


def rank_difference(path: Path, reference: Path, tasks: Sequence[Task]) -> float:
    """Largest relative difference of two saved calibrations and of the merges solved from them."""
    found, expected = load_calibration(path), load_calibration(reference)
    ours, theirs = (merge(tasks, SSRMerge(), one).layers for one in (found, expected))
    return max(
        *(_difference(found.stats[target].gram, one.gram) for target, one in expected.stats.items()),
        *(_difference(ours[target].delta(), layer.delta()) for target, layer in theirs.items()),
    )


def measured(sizes: Sequence[int] = SIZES, repeats: int = REPEATS, d: int = 192, depth: int = 4) -> dict[str, Any]:
    """Times and differences of all process counts."""
    _, tasks = world(d, depth)
    seconds: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    differences = []
    with TemporaryDirectory() as root:
        for repeat in range(repeats):
            for size in sizes:  # in turn: other load on the machine hits all of them alike
                folder = Path(root) / f"{size}_{repeat}"
                folder.mkdir()
                seconds[size].append(measure(size, folder, d, depth))
                if size > 1:
                    first = Path(root) / f"{sizes[0]}_{repeat}" / "calibration.safetensors"
                    differences.append(rank_difference(folder / "calibration.safetensors", first, tasks))
    rows = [
        {
            "processes": size,
            "seconds": statistics.median(wall for wall, _ in seconds[size]),
            "cpu_seconds": statistics.median(busy for _, busy in seconds[size]),
            "all": [wall for wall, _ in seconds[size]],
        }
        for size in sizes
    ]
    return {"max_rank_difference": max(differences), "cores": os.cpu_count(), "rows": rows}


def max_rank_difference(sizes: Sequence[int] = SIZES) -> float:
    """Largest relative difference that sharing makes, on a small world."""
    return float(measured(sizes, 1, 48, 1)["max_rank_difference"])


def page(found: dict[str, Any]) -> str:
    """docs/benchmarks/ranks.md."""
    rows, cores = found["rows"], found["cores"]
    lines = ["# Many processes", "", *(__doc__ or "").strip().splitlines(), ""]
    lines += [
        f"Median of {REPEATS} runs on a machine with {cores} cores that other programs use as well: more than {cores}",
        "processes cannot be faster there, and fewer may not find a core of their own. `make bench-ranks` writes this",
        "page.",
        "",
        f"Largest difference to one process: {found['max_rank_difference']:.1e}.",
        "",
        "![Time over processes](ranks.png)",
        "",
        "The wall clock shows that load; CPU time of the busiest process is what remains where each has a free core.",
        "",
        "| processes | CPU seconds of the busiest | ideal | wall seconds, median | all runs |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        every = ", ".join(f"{one:.2f}" for one in row["all"])
        ideal = rows[0]["cpu_seconds"] / row["processes"]
        cells = (row["processes"], *(f"{value:.2f}" for value in (row["cpu_seconds"], ideal, row["seconds"])), every)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], path: Path) -> None:
    """Time over processes beside the ideal line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    sizes = [row["processes"] for row in found["rows"]]
    axes.plot(sizes, [row["cpu_seconds"] for row in found["rows"]], "o-", label="CPU time of the busiest process")
    axes.plot(sizes, [row["seconds"] for row in found["rows"]], "s:", lw=0.8, label="wall clock, machine under load")
    axes.plot(sizes, [found["rows"][0]["cpu_seconds"] / size for size in sizes], "k--", lw=0.8, label="ideal")
    axes.axvline(found["cores"], color="grey", lw=0.6, label=f"{found['cores']} cores")
    axes.set(xlabel="processes", ylabel="seconds", xticks=sizes, ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Calibration shared by processes.")
    parser.add_argument("--work", type=Path, help="be one of the processes")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    if given.work is not None:
        work(given.work, given.width, given.depth)
        return
    found = measured(d=given.width, depth=given.depth)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "ranks.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (given.out / "ranks.md").write_text(page(found), encoding="utf-8")
    draw(found, given.out / "ranks.png")
    print(
        f"max_rank_difference {found['max_rank_difference']:.1e}", [round(row["seconds"], 2) for row in found["rows"]]
    )


if __name__ == "__main__":
    main()
