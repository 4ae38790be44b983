"""Calibrations and LoRA files: the engine's own writing and reading against plain writes of as many bytes.

Neither side waits for the disk (no fsync), and files are read from the page cache: what is compared is
the work around the system calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ssr_core import (
    KeyTarget,
    Target,
    atomic_path,
    load_calibration,
    read_adapter,
    read_safetensors,
    save_calibration,
    to_tensors,
    write_safetensors,
)

from .arithmetic import Cell
from .timing import Spread, by_turns
from .workbench import Workbench


def measure_storage(cell: Cell, repeats: int) -> list[dict[str, Any]]:
    """Rows for the calibration and for the merged LoRA."""
    cpu = torch.device("cpu")
    bench = Workbench(cell, cpu, torch.float32)
    merged = bench.whole()
    assert bench.calibration is not None
    calibration = bench.calibration
    names = {
        f"diffusion_model.{path}": KeyTarget(Target(path), tuple(module.weight.shape))
        for path, module in bench.model.named_modules()
        if isinstance(module, nn.Linear)
    }
    with TemporaryDirectory() as folder:
        statistics, lora = Path(folder) / "calibration.safetensors", Path(folder) / "lora.safetensors"

        def save_lora() -> None:
            with atomic_path(lora, overwrite=True) as temporary:
                write_safetensors(temporary, to_tensors(merged, names), {"format": "pt"})

        def load_lora() -> None:
            read_adapter(read_safetensors(lora)[0], names, name="lora", fingerprint="")

        return [
            _row(
                "calibration",
                cell,
                statistics,
                lambda: save_calibration(calibration, statistics, overwrite=True),
                lambda: load_calibration(statistics),
                repeats,
            ),
            _row("LoRA", cell, lora, save_lora, load_lora, repeats),
        ]


def _row(
    what: str, cell: Cell, path: Path, save: Callable[[], object], load: Callable[[], object], repeats: int
) -> dict[str, Any]:
    save()
    content, plain = path.read_bytes(), path.with_suffix(".plain")
    runs: dict[str, Callable[[], object]] = {
        "save": save,
        "write": lambda: plain.write_bytes(content),
        "load": load,
        "read": plain.read_bytes,
    }
    plain.write_bytes(content)
    times = by_turns(runs, repeats, torch.device("cpu"), time.perf_counter)

    def over(one: str, other: str) -> float:
        return Spread.of([a / b for a, b in zip(times[one], times[other], strict=True)]).json()["median"]

    return {
        "what": what,
        **cell.name,
        "bytes": len(content),
        "save_over_write": over("save", "write"),
        "load_over_read": over("load", "read"),
        "save_seconds": Spread.of(times["save"]).json()["median"],
        "load_seconds": Spread.of(times["load"]).json()["median"],
    }
