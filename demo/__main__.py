"""The main job on an embedded default: write LoRAs, calibrate, merge, check on unseen noise, report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ssr_core import (
    AverageMerge,
    LoRALayer,
    MergeMethod,
    MergeResult,
    SSRMerge,
    SumMerge,
    Target,
    Task,
    atomic_path,
    build_stacks,
    calibrate,
    compare,
    content_hash,
    merge,
    merge_metadata,
    read_adapter,
    read_safetensors,
    to_tensors,
    write_safetensors,
)
from ssr_core.plots import THEMES, draw_comparison, report_pages, side_by_side

from .loras import SIGMA, layer_inputs, noise, plant_loras, write_lora
from .model import StubTransformer, key_map

PROMPTS = ("a photo of sks dog in the snow", "a portrait of zwx cat made of glass", "qrt teapot on a table")
DIALECTS = ("kohya", "diffusers", "kohya")
CALIBRATION_SEED, HELD_OUT_SEEDS = 7, (101, 102, 103)
OUTPUT = Path("demo_output")
METHOD_LINES = ("ssr", "ssr ridge=0.1", "paper", "gains", "sum", "average", "np_lora mu=0.5")


def read_tasks(model: StubTransformer, folder: Path) -> list[Task]:
    """Write the LoRA files and read them back, as a user's files would be."""
    tasks = []
    for index, (lora, prompt, dialect) in enumerate(zip(plant_loras(model, PROMPTS), PROMPTS, DIALECTS, strict=True)):
        path = folder / f"subject_{index + 1}_{dialect}.safetensors"
        write_lora(model, lora, path, dialect)
        tensors, _ = read_safetensors(path)
        adapter = read_adapter(tensors, key_map(model), name=path.stem, fingerprint=content_hash(path))
        tasks.append(Task(adapter, prompts=(prompt,)))
    return tasks


def held_out_error(model: StubTransformer, tasks: Sequence[Task], layers: Mapping[Target, LoRALayer]) -> float:
    """Relative error of merged layers against each LoRA alone, on noise that calibration did not see.

    Computed densely from the layers' inputs, not from the statistics: root mean square over layers.
    """
    errors: dict[Target, list[float]] = {}
    for task, prompt in zip(tasks, PROMPTS, strict=True):
        for seed in HELD_OUT_SEEDS:
            with layer_inputs(model) as inputs:
                model(noise(seed), SIGMA, [prompt])
            for target, layer in layers.items():
                x = inputs[target.module_path].double()
                wanted = x @ _rows_of(task, target, layer.up.shape[0]).T
                error = x @ layer.delta().T - wanted
                totals = errors.setdefault(target, [0.0, 0.0])
                totals[0] += float(error.square().sum())
                totals[1] += float(wanted.square().sum())
    return math.sqrt(sum(error / energy for error, energy in errors.values()) / len(errors))


def _rows_of(task: Task, target: Target, rows: int) -> Tensor:
    """The task's own dense delta on a merged target's rows."""
    start = 0 if target.out_slice is None else target.out_slice[0]
    total: Tensor | None = None
    for own, layer in task.adapter.layers.items():
        if own.module_path == target.module_path:
            delta = layer.delta()
            placed = delta.new_zeros(rows, delta.shape[1])
            first = (0 if own.out_slice is None else own.out_slice[0]) - start
            placed[first : first + delta.shape[0]] = delta
            total = placed if total is None else total + placed
    assert total is not None
    return total


def main() -> None:
    """Run the demo and write demo_output/."""
    OUTPUT.mkdir(exist_ok=True)
    model = StubTransformer()
    tasks = read_tasks(model, OUTPUT)
    started = time.perf_counter()
    calibration = calibrate(
        model, tasks, build_stacks(tasks), lambda i, tap: _run(model, tasks[i].prompts[0], CALIBRATION_SEED)
    )
    methods: dict[str, MergeMethod] = {"ssr": SSRMerge(), "sum": SumMerge(), "average": AverageMerge()}
    results: dict[str, MergeResult] = {name: merge(tasks, method, calibration) for name, method in methods.items()}
    seconds = time.perf_counter() - started
    errors = {name: held_out_error(model, tasks, result.layers) for name, result in results.items()}

    best = results["ssr"]
    with atomic_path(OUTPUT / "merged.safetensors", overwrite=True) as path:
        write_safetensors(
            path, to_tensors(best, key_map(model), "kohya"), merge_metadata(tasks, methods["ssr"], calibration)
        )
    report = {"reconstruction_error": errors, **best.report.to_json()}
    (OUTPUT / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (OUTPUT / "report.md").write_text(best.report.to_markdown() + _held_out_text(errors), encoding="utf-8")
    for name, theme in THEMES.items():
        side_by_side(report_pages(best.report, theme)).save(OUTPUT / f"report_{name}.png", optimize=True)
    comparison = compare(tasks, METHOD_LINES, calibration)
    chosen = METHOD_LINES.index("ssr")  # that of merged.safetensors and the report
    (OUTPUT / "compare.md").write_text(comparison.to_markdown(chosen), encoding="utf-8")
    draw_comparison(comparison, THEMES["light"], chosen).save(OUTPUT / "compare.png", optimize=True)

    print(f"Merged {len(tasks)} LoRAs ({', '.join(DIALECTS)} keys) on a small stub transformer in {seconds:.1f} s.")
    print(_held_out_text(errors).replace("## Held-out noise\n\n", ""))
    pictures = ", ".join(f"report_{name}.png" for name in THEMES)
    print(f"See in {OUTPUT}: {pictures}, report.md, report.json, compare.md, compare.png and merged.safetensors.")


def _run(model: StubTransformer, prompt: str, seed: int) -> None:
    model(noise(seed), SIGMA, [prompt])


def _held_out_text(errors: Mapping[str, float]) -> str:
    return (
        "\n## Held-out noise\n\n"
        "Reconstruction error on noise that calibration did not see (0: every LoRA acts as if it were alone):\n\n"
        "| SSR | plain sum | average |\n|---|---|---|\n"
        f"| {errors['ssr']:.3f} | {errors['sum']:.3f} | {errors['average']:.3f} |\n"
    )


if __name__ == "__main__":
    main()
