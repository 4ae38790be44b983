"""The page that the measurements become."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .grid import LEFT_OUT, PAPER_SECONDS
from .machine import sentence
from .texts import CALIBRATION, INTRO, MEMORY, ONE_THREAD, PUBLISHED, SAMPLING, SOLVE, STORAGE

Row = dict[str, Any]


def page(found: dict[str, Any], stem: str) -> str:
    """Markdown."""
    parts = [
        INTRO,
        sentence(found["machine"]),
        *_clock(found),
        f"The run took {found['minutes']} minutes. `{_command(found)}`",
    ]
    if found["toy"]:
        parts.append("**Toy sizes: this only shows that the code runs.**")
    elif "gpu" not in found["machine"]:
        parts += [LEFT_OUT, Path(__file__).with_name("findings.md").read_text(encoding="utf-8").strip()]
    parts += [CALIBRATION, _calibration(found["calibration_over_forward"]), f"![calibration]({stem}_calibration.png)"]
    parts += ["A video's tokens, attention within frames:", _calibration(found["video"])]
    parts += [PUBLISHED, _published(found), f"![published]({stem}_published.png)"]
    parts += [SAMPLING, _sampling(found["sampling"])]
    parts += [MEMORY, _memory(found["calibration_memory"]), *_video(found["video_memory"])]
    parts += ["Peak of a whole merge above a bare pass:", _whole_memory(found["merge_memory_over_published"])]
    parts += [SOLVE, _solve(found["solve_over_sequential"]), *_exponents(found), f"![solve]({stem}_solve.png)"]
    parts += ["## Solving again", "A merge at another strength from the same calibration, over a whole merge."]
    parts += [_resolve(found["resolve_over_merge"]), STORAGE, _storage(found["storage"]), *_gpu(found)]
    return "\n\n".join(parts) + "\n"


def _clock(found: dict[str, Any]) -> list[str]:
    if "gpu" in found["machine"] or found["machine"]["threads"] != 1:
        return []
    return [ONE_THREAD]


def _command(found: dict[str, Any]) -> str:
    if "gpu" in found["machine"]:
        return "python -m benchmarks.speed --device cuda"
    threads = found["machine"]["threads"]
    return "make bench-speed" if threads == 1 else f'make bench-speed ARGS="--threads {threads}"'


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def _cell(row: Row) -> list[object]:
    return [row["d"], row["tokens"], row["K"], row["r"]]


def _spread(row: Row) -> str:
    return f"{row['median']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f}" if size >= 2**20 else f"{size / 2**20:.2f}"


def _calibration(rows: Sequence[Row]) -> str:
    return _table(
        ["d", "N", "K", "r", "calibration / bare", "predicted", "factor", "plain LoRA", "bare, s"],
        [
            [
                *_cell(row),
                _spread(row),
                f"{row['predicted']:.3f}",
                f"{row['overhead_over_predicted']:.2f}",
                f"{row['plain_lora_over_forward']:.3f}",
                f"{row['bare_seconds']:.3g}",
            ]
            for row in rows
        ],
    )


def _sampling(rows: Sequence[Row]) -> str:
    return _table(
        ["d", "N", "K", "r", "calibration / bare", "/ calibration above", "merge / merge above", "merge, s", "layers"],
        [
            [
                *_cell(row),
                _spread(row),
                f"{row['over_plain_calibration']:.3f}",
                f"{row['refined_over_plain_merge']:.2f}",
                f"{row['refined_seconds']:.3g}",
                row["layers"],
            ]
            for row in rows
        ],
    )


def _refined(found: dict[str, Any], row: Row) -> float | None:
    """Overhead of a refined merge over the published one's, from medians; None where it was not timed."""
    cell = _cell(row)
    timed = [one for one in found["sampling"] if _cell(one) == cell]
    bare = [one["bare_seconds"] for one in found["calibration_over_forward"] if _cell(one) == cell]
    if not timed:
        return None
    seconds = (timed[0]["median"] - 1) * bare[0] + timed[0]["refined_seconds"]
    return float(seconds / row["published_overhead_seconds"])


def _published(found: dict[str, Any]) -> str:
    rows: Sequence[Row] = found["merge_time_over_published"]
    refined = [_refined(found, row) for row in rows]
    return _table(
        [
            "d",
            "N",
            "K",
            "r",
            "overhead / published",
            "not judged",
            "refined",
            "arithmetic alone",
            "overhead, s",
            "published, s",
            "whole / whole",
            "routers",
        ],
        [
            [
                *_cell(row),
                _spread(row),
                f"{row['without_judging']:.3f}",
                "" if more is None else f"{more:.2f}",
                f"{row['arithmetic_alone']:.3f}",
                f"{row['overhead_seconds']:.3g}",
                f"{row['published_overhead_seconds']:.3g}",
                f"{row['whole_over_whole']:.3f}",
                f"{row['router_difference']:.0e}",
            ]
            for row, more in zip(rows, refined, strict=True)
        ],
    )


def _memory(rows: Sequence[Row]) -> str:
    return _table(
        ["d", "N", "K", "r", "calibration", "predicted", "R^2 terms", "factor", "with samples", "bare pass"],
        [
            [
                *_cell(row),
                _mib(row["median"]),
                _mib(row["predicted"]),
                _mib(row["grams"]),
                f"{row['over_predicted']:.2f}",
                _mib(row["with_samples"]),
                _mib(row["bare"]),
            ]
            for row in rows
        ],
    )


def _video(rows: Sequence[Row]) -> list[str]:
    kept = [
        f"The video case: {row['tokens']} tokens in {row['frames']} frames, budget {_mib(row['budget'])} MiB, "
        f"{'kept' if row['median'] <= row['budget'] else 'EXCEEDED'}."
        for row in rows
    ]
    return [*kept, _memory(rows)]


def _whole_memory(rows: Sequence[Row]) -> str:
    return _table(
        ["d", "N", "K", "r", "engine / published", "engine, MiB", "published, MiB", "solve alone, MiB"],
        [
            [
                *_cell(row),
                f"{row['median']:.3f}",
                *(_mib(row[key]) for key in ("bytes", "published_bytes", "solve_bytes")),
            ]
            for row in rows
        ],
    )


def _solve(rows: Sequence[Row]) -> str:
    return _table(
        ["d", "K", "r", "engine, layers/s", "sequential, layers/s", "time / sequential", "solver alone"],
        [
            [
                row["d"],
                row["K"],
                row["r"],
                f"{row['engine_layers_per_second']:.4g}",
                f"{row['sequential_layers_per_second']:.4g}",
                _spread(row),
                f"{row['solver_alone']:.2f}",
            ]
            for row in rows
        ],
    )


def _exponents(found: dict[str, Any]) -> list[str]:
    words = {"batched": "batched Cholesky alone", "general": "general solver alone"}
    return [
        "Exponent of R in the time of a layer, fitted over all K and r: "
        + ", ".join(
            f"{words.get(row['of'], row['of'])} {row['exponent_of_R']} (d = {row['d']})"
            for row in found["solve_exponents"]
        )
        + "."
    ]


def _resolve(rows: Sequence[Row]) -> str:
    return _table(
        ["d", "N", "K", "r", "again / whole merge", "again, s", "whole, s"],
        [[*_cell(r), _spread(r), f"{r['resolve_seconds']:.3g}", f"{r['merge_seconds']:.3g}"] for r in rows],
    )


def _storage(rows: Sequence[Row]) -> str:
    return _table(
        ["file", "K", "r", "MiB", "save / write", "load / read", "save, s", "load, s"],
        [
            [
                row["what"],
                row["K"],
                row["r"],
                _mib(row["bytes"]),
                f"{row['save_over_write']:.2f}",
                f"{row['load_over_read']:.2f}",
                f"{row['save_seconds']:.3g}",
                f"{row['load_seconds']:.3g}",
            ]
            for row in rows
        ],
    )


def _gpu(found: dict[str, Any]) -> list[str]:
    if "gpu" not in found["machine"]:
        return [
            "## On a GPU",
            "Not run on one. `python -m benchmarks.speed --device cuda` takes FLUX.1's dimensions (19 double and 38 "
            "single blocks, d = 3072, bfloat16, random weights), K = 3, 5, 7, 9 at rank 32, and writes speed_cuda.md.",
        ]
    rows = [
        [row["K"], f"{row['merge_seconds']:.1f}", PAPER_SECONDS[row["K"]]]
        for row in found["resolve_over_merge"]
        if row["K"] in PAPER_SECONDS
    ]
    return ["## Beside the paper's times (A100)", _table(["K", "whole merge here, s", "paper, s"], rows)]
