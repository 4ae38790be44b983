"""What weighting padded text tokens does: held-out error on the prompt's own tokens, by padding mode.

World: the demo's stub transformer (random weights) and planted LoRAs. Prompts of 5 to 8 words are
padded to 16, 64 and 256 rows. The error is that of the text layers' outputs against each LoRA alone,
on noise that calibration did not see, for the real rows and for the padding rows.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from demo.__main__ import PROMPTS, _rows_of, read_tasks
from demo.loras import SIGMA, layer_inputs, noise
from demo.model import StubTransformer
from ssr_core import SSRMerge, Tap, TextRows, build_stacks, calibrate, merge

LENGTHS, MODES, MODEL_SEEDS = (16, 64, 256), ("include", "balance", "exclude"), (0, 1, 2, 3, 4)
OUT = Path("docs/benchmarks")


def text_errors(length: int, mode: str, seed: int) -> tuple[float, float]:
    """Held-out relative error of the text layers on real rows and on padding rows."""
    model = StubTransformer(seed=seed, text_length=length)
    words = [len(prompt.split()) for prompt in PROMPTS]
    with TemporaryDirectory() as folder:
        tasks = read_tasks(model, Path(folder))

    def run(index: int, tap: Tap) -> None:
        tap.describe_text(TextRows(torch.arange(length) < words[index], joint="first"))
        model(noise(7), SIGMA, [PROMPTS[index]])

    calibration = calibrate(model, tasks, build_stacks(tasks), run, padding=mode)
    layers = {t: layer for t, layer in merge(tasks, SSRMerge(), calibration).layers.items() if "txt_" in t.module_path}
    sums = {target: torch.zeros(2, 2) for target in layers}
    for index, task in enumerate(tasks):
        with layer_inputs(model) as inputs:
            model(noise(101), SIGMA, [PROMPTS[index]])
        for target, layer in layers.items():
            x = inputs[target.module_path].double()
            wanted = x @ _rows_of(task, target, layer.up.shape[0]).T
            off = (x @ layer.delta().T - wanted).square().sum(dim=1)
            energy = wanted.square().sum(dim=1)
            real = torch.arange(length) < words[index]
            for row, mask in enumerate((real, ~real)):
                sums[target][row] += torch.stack([off[mask].sum(), energy[mask].sum()])
    return tuple(
        math.sqrt(statistics.fmean(float(s[row, 0] / s[row, 1].clamp_min(1e-12)) for s in sums.values()))
        for row in (0, 1)
    )


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    rows = []
    for length in LENGTHS:
        for mode in MODES:
            found = [text_errors(length, mode, seed) for seed in MODEL_SEEDS]
            rows.append(
                {
                    "text_rows": length,
                    "padding": mode,
                    "error_real_rows": statistics.median(real for real, _ in found),
                    "error_padding_rows": statistics.median(pad for _, pad in found),
                    "seeds": len(MODEL_SEEDS),
                }
            )
            print(rows[-1])
    (OUT / "padding.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    lines = ["# Padded text tokens", "", *(__doc__ or "").split("\n\n", 1)[1].strip().splitlines(), ""]
    lines += [f"Median over {len(MODEL_SEEDS)} random models. `make bench-padding` writes this page.", ""]
    lines += ["| text rows | padding mode | error, prompt's rows | error, padding rows |", "|---|---|---|---|"]
    lines += [
        f"| {r['text_rows']} | {r['padding']} | {r['error_real_rows']:.3f} | {r['error_padding_rows']:.3f} |"
        for r in rows
    ]
    lines += [
        "",
        "Rows that are left out still flow through the layer, so excluding them spoils both columns. Balance, the",
        "default, bounds what padding can outweigh at nearly no cost in this world; include is as good here.",
    ]
    (OUT / "padding.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
