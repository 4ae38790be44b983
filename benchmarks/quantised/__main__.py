"""Runs everything and writes docs/benchmarks/quantised.md and .json: `make bench-quantised COMFYUI_PATH=...`.

With the argument `times` the accuracy stays as the .json has it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.host.quantised import STORED

from .report import page
from .stack import overhead
from .tiny import accuracy, running, step_time

OUT = Path("docs/benchmarks")
CASES = ("flux-fused-split", "wan21")
SCALES = (1.0, 0.05)
FORMATS = ("unscaled_fp8_e4m3fn", "float8_e4m3fn", "mxfp8", "nvfp4", "int8", "int8_convrot", "convrot_w4a4")
TIMED = (None, *FORMATS, "packed")
SIZES = ((1024, 1, 256), (1024, 1, 1024))


def main() -> None:
    """Measure and write."""
    checkout = Path(os.environ["COMFYUI_PATH"]).resolve()
    os.environ["OMP_NUM_THREADS"] = "1"  # the server's; CPU time of one thread is what other programs do not disturb
    torch.set_num_threads(1)
    found: dict[str, Any] = {"torch": torch.__version__}
    with running(checkout) as server:
        if sys.argv[1:] == ["times"]:
            found["accuracy"] = json.loads((OUT / "quantised.json").read_text(encoding="utf-8"))["accuracy"]
        else:
            found["accuracy"] = [
                _said(accuracy(server, case, kind, scale)) for case in CASES for kind in STORED for scale in SCALES
            ]
        found["steps"] = [_said(step_time(server, CASES[0], kind, rounds=3)) for kind in TIMED]
    sys.path.append(str(checkout))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    with torch.inference_mode():
        found["stack"] = [_said(overhead(kind, *size)) for kind in ("float32", *FORMATS) for size in SIZES]
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "quantised.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (OUT / "quantised.md").write_text(page(found), encoding="utf-8")


def _said(row: dict[str, Any]) -> dict[str, Any]:
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
