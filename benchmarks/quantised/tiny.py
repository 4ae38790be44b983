"""Tiny Flux and Wan models in a real ComfyUI: what each layer really adds, and the time of a step."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.host.merging import MergeGraph, pair
from tests.host.quantised import load_base, measure
from tests.host.server import Server
from tests.host.weights import base_weights

ROOT = Path(__file__).resolve().parents[2]
STEPS, WARM_UP = 40, 5


@contextmanager
def running(checkout: Path) -> Iterator[Server]:
    """A server with this pack and the test nodes, in a temporary base directory."""
    with TemporaryDirectory() as folder:
        base = Path(folder)
        for name in ("models/diffusion_models", "models/loras", "custom_nodes", "input", "output", "user", "temp"):
            (base / name).mkdir(parents=True)
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tests" / "host" / "tiny", base / "custom_nodes" / "tiny", ignore=skip)
        (base / "custom_nodes" / "ssr-merge").symlink_to(ROOT, target_is_directory=True)
        with Server(checkout, base) as server:
            yield server


def accuracy(server: Server, case: str, kind: str, scale: float) -> dict[str, Any]:
    """Relative error of what the LoRA adds to each layer's output, both ways."""
    row: dict[str, Any] = {"case": case, "kind": kind, "scale": scale}
    for apply in ("weights", "forward"):
        found = measure(server, server.base, case, kind, apply, scale)
        row[apply] = {"mean": statistics.mean(found.errors.values()), "max": max(found.errors.values())}
    weights = base_weights(server.base, case.split("-")[0])
    sizes = [float(delta.norm() / weights[name].double().norm()) for name, delta in found.deltas.items()]
    return {**row, "relative_size": statistics.median(sizes)}


def step_time(server: Server, case: str, kind: str, rounds: int) -> dict[str, Any]:
    """Median CPU seconds of one model call, both ways, by turns."""
    family, tasks = pair(server.base, case)
    seconds: dict[str, list[float]] = {"weights": [], "forward": []}
    for turn in range(rounds):
        for apply, found in seconds.items():
            graph = MergeGraph(server)
            merged = graph.merge(family, tasks, model=load_base(graph, family, kind), apply=apply)
            prefix = f"time_{case}_{kind}_{apply}"
            graph.sample(family, graph.add("TimeSteps", model=merged, prefix=f"{prefix}_{turn}"), steps=STEPS)
            server.run(graph.prompt).ok()
            path = server.base / "output" / "probes" / f"{prefix}_{turn}.json"
            found += json.loads(path.read_text(encoding="utf-8"))[WARM_UP:]
    medians = {apply: statistics.median(found) for apply, found in seconds.items()}
    return {"kind": kind, "seconds": medians, "ratio": medians["forward"] / medians["weights"]}
